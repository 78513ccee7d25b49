"""What is done with a trained adapter: chat, answers to a file, merging, and who can serve it."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynalora
from dynalora.errors import DataError, UnsupportedError
from dynalora.evaluation.generation import generate
from dynalora.export import check_serving
from dynalora.forgetting.texts import own_text
from dynalora.jobs.chat.run import Chat
from dynalora.jobs.finetune.run import finetune
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.jobs.finetune.trained import load_trained
from dynalora.jobs.merge.run import merge
from dynalora.jobs.serve_check.run import SERVERS, serve_check
from dynalora.lab.adapters import load_adapter
from dynalora.lab.baselines import prepare_start
from dynalora.lab.choices import method_names
from dynalora.lab.configs import adapter_config
from dynalora.lab.data.prompts import PromptFields, load_prompts
from dynalora.lab.distance import continued, in_words
from dynalora.lab.models import load_tokenizer
from dynalora.lab.run_folder import read_metrics
from tests.unit import tiny
from tests.unit.program import Program, program

__all__ = ["program"]  # a fixture


def change(model: Any) -> None:
    """Let every trained weight be something else than at its start, so that the adapter does something."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)


def saved(method: str, place: Path, *, chat: bool = True) -> Path:
    """An adapter of a method with its tokenizer, and its base model beside it."""
    base = tiny.saved_model(place / "base", chat=chat)
    words = AutoTokenizer.from_pretrained(base)
    targets: dict[str, Any] = {} if method == "p-tuning" else {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    config = adapter_config(method, r=2, **targets)
    model = AutoModelForCausalLM.from_pretrained(base)
    prepare_start(model, config, words)
    adapted = peft.get_peft_model(model, config)
    change(adapted)
    adapted.save_pretrained(place / "adapter")
    words.save_pretrained(place / "adapter")
    return place / "adapter"


@pytest.fixture(scope="module", params=method_names())
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(40).view(2, 20)).logits


def test_a_chat_says_what_the_adapter_and_what_the_base_model_say(adapter: Path) -> None:
    trained = load_trained(str(adapter))
    chat = Chat(trained.model, trained.tokenizer, max_new_tokens=8)
    pieces: list[str] = []
    answer = chat.answer("Say 3.", pieces.append)
    assert "".join(pieces) == answer
    expected = generate(trained.model, trained.tokenizer, ["Say 3."], max_new_tokens=8, strip=False)[0]
    assert answer.strip() == expected.strip()
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    chat.base = True  # it has heard nothing of what the adapter was asked
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base").eval()
    if "pissa" not in str(adapter.parent.name):  # its start changes the base weights
        of_base = generate(base, trained.tokenizer, ["Say 3."], max_new_tokens=8, strip=False)[0]
        assert chat.answer("Say 3.").strip() == of_base.strip()
        assert [turn["content"] for turn in chat.turns] == ["Say 3.", of_base.strip()]
    chat.base = False
    assert [turn["content"] for turn in chat.turns] == ["Say 3.", answer.strip()]
    chat.reset()
    assert chat.answer("Say 3.") == answer


def test_a_merged_model_is_the_adapter_without_peft(adapter: Path, tmp_path: Path) -> None:
    with_adapter = load_adapter(adapter).eval()
    gated = bool(getattr(with_adapter.active_peft_config, "gated", False))
    if gated or with_adapter.active_peft_config.is_prompt_learning:
        with pytest.raises(UnsupportedError, match=r"--calibrate DATA" if gated else "virtual tokens"):
            merge(str(adapter), str(tmp_path / "whole"))
        assert not (tmp_path / "whole").exists()
        return
    report = merge(str(adapter), str(tmp_path / "whole"))
    assert report.max_error < 1e-4
    assert {file.suffix for file in (tmp_path / "whole").iterdir()} <= {".safetensors", ".json", ".jinja"}
    whole, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(logits(whole), logits(with_adapter), atol=1e-4, rtol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    assert (logits(base) - logits(whole)).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template == tiny.CHAT_TEMPLATE


def test_what_to_type_for_a_server_makes_it_take_the_adapter(adapter: Path, tmp_path: Path, program: Program) -> None:
    verdicts = serve_check(str(adapter))
    assert [verdict.server for verdict in verdicts] == ["PEFT", *SERVERS]
    assert verdicts[0].takes
    tried: dict[str, Any] = {}
    for verdict in verdicts[1:]:
        if verdict.takes or not verdict.remedy:
            continue
        assert verdict.reason
        command = verdict.remedy.partition(",")[0]
        if command not in tried:
            output = tmp_path / str(len(tried))
            (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(4)))
            words = command.replace("OUTPUT", str(output)).replace("FOLDER", str(output))
            shown = program(*words.replace("DATA", str(tmp_path / "data.jsonl")).split()[1:])
            assert shown.code == 0, shown.err
            tried[command] = output
        if " merge " not in command:
            taken = {serving.server: serving for serving in check_serving(tried[command])}
            assert not taken[verdict.server].problems


def test_a_plain_lora_is_taken_as_it_is(tmp_path: Path, program: Program) -> None:
    shown = program("serve-check", str(saved("lora", tmp_path)))
    assert shown.code == 0, shown.err
    rows = [line.split()[:2] for line in shown.out.splitlines() if line.split()[:1] and line.split()[0] in SERVERS]
    assert rows == [[server, "yes"] for server in SERVERS]


def test_a_head_of_its_own_is_written_although_it_was_tied(tmp_path: Path) -> None:
    base = tiny.saved_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=True)
    model.save_pretrained(base)
    adapted = peft.get_peft_model(model, dynalora.DiraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    change(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), str(tmp_path / "whole"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), logits(load_adapter(tmp_path / "adapter")), atol=1e-4, rtol=1e-4)
    assert not torch.equal(whole.lm_head.weight, whole.model.embed_tokens.weight)


def test_merged_weights_have_the_type_of_the_files_or_the_one_that_is_asked_for(tmp_path: Path) -> None:
    adapter = saved("dira", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    assert merge(str(adapter), str(tmp_path / "a")).dtype == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "a" / "model.safetensors").values()} == {torch.bfloat16}
    assert merge(str(adapter), str(tmp_path / "b"), dtype="float32").dtype == "float32"


def test_merge_overwrites_nothing(tmp_path: Path, program: Program) -> None:
    adapter = saved("dira", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    shown = program("merge", str(adapter), "--output", str(tmp_path / "mine"))
    assert shown.code == 2
    assert "is not an empty folder" in shown.err.replace("\n", " ")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["x"]
    shown = program("merge", str(adapter), "--output", str(tmp_path / "whole"))
    assert shown.code == 0, shown.err
    assert "AutoModelForCausalLM.from_pretrained" in shown.out


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_chat_reads_lines_from_a_pipe(tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = saved("disel", tmp_path)
    ask = ["chat", str(adapter), "--max-new-tokens", "5"]
    typed(monkeypatch, "Say 1.")
    one = program(*ask)
    assert (one.code, one.err) == (0, "")
    typed(monkeypatch, "Say 1.", "", "/base", "/RESET", "Say 1.", "/base", "/bse", "/help", "/quit", "Say 2.")
    shown = program(*ask)
    assert shown.code == 0, shown.err
    assert shown.out.startswith(one.out)
    for words in ("The base model answers now.", "What was said is forgotten.", "The adapter answers again."):
        assert words in shown.out
    assert "There is no command /bse; did you mean '/base'?" in shown.out
    assert shown.out.rstrip().endswith("Ctrl-C breaks an answer off.")  # nothing after /quit
    typed(monkeypatch, "x" * 300, "/reset", "Say 1.")
    shown = program(*ask)
    assert "all that the model can take; type /reset" in shown.out.replace("\n", " ")
    assert shown.out.endswith(one.out)


def test_a_chat_remembers_and_an_interrupted_answer_is_kept(tmp_path: Path) -> None:
    trained = load_trained(str(saved("dira", tmp_path)))
    chat = Chat(trained.model, trained.tokenizer, system="Be brief.", max_new_tokens=6)

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    said = chat.answer("One.", interrupt)
    second = chat.answer("Two.")
    assert [turn["role"] for turn in chat.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.turns[2]["content"] == said.strip()
    fresh = Chat(trained.model, trained.tokenizer, system="Be brief.", max_new_tokens=6)
    fresh.turns = chat.turns[:3]
    assert fresh.answer("Two.") == second
    drawn = Chat(trained.model, trained.tokenizer, max_new_tokens=6, temperature=5.0)
    torch.manual_seed(0)
    first = drawn.answer("One.")
    drawn.reset()
    assert drawn.answer("One.") != first


def test_a_model_without_a_chat_format_goes_on_with_the_text(tmp_path: Path) -> None:
    trained = load_trained(str(saved("dira", tmp_path, chat=False)))
    chat = Chat(trained.model, trained.tokenizer, max_new_tokens=6)
    ids = trained.tokenizer("The number 3")["input_ids"]
    expected = generate(trained.model, trained.tokenizer, [ids], max_new_tokens=6, strip=False)[0]
    assert chat.plain
    assert chat.answer("The number 3") == expected
    assert chat.turns == []


def test_answers_are_written_beside_prompts_and_references(tmp_path: Path, program: Program) -> None:
    adapter = saved("disel", tmp_path)
    data = tiny.write_jsonl(
        tmp_path / "data.jsonl",
        [
            {"prompt": "Say 1.", "response": "One"},
            {"question": "Say 2?"},
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Hello"}]},
            {"text": "The number"},
        ],
    )  # fmt: skip
    out = tmp_path / "answers.jsonl"
    flags = ["--data", str(data), "--output", str(out), "--base", "--max-new-tokens", "5", "--batch-size", "3"]
    shown = program("generate", str(adapter), *flags)
    assert shown.code == 0, shown.err
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [record.get("prompt") for record in records] == ["Say 1.", "Say 2?", None, "The number"]
    assert [record.get("reference") for record in records] == ["One", None, "Hello", None]
    assert [turn["role"] for turn in records[2]["messages"]] == ["system", "user"]
    trained = load_trained(str(adapter))
    answers = generate(trained.model, trained.tokenizer, ["Say 1.", "Say 2?"], max_new_tokens=5)
    assert [record["response"] for record in records[:2]] == answers
    with trained.model.disable_adapter():
        answers = generate(trained.model, trained.tokenizer, ["Say 1.", "Say 2?"], max_new_tokens=5)
    assert [record["base_response"] for record in records[:2]] == answers
    ids = trained.tokenizer("The number")["input_ids"]
    assert records[3]["response"] == generate(trained.model, trained.tokenizer, [ids], max_new_tokens=5)[0]
    before = out.read_bytes()
    shown = program("generate", str(adapter), *flags)
    assert shown.code == 2
    assert "exists already" in shown.err.replace("\n", " ")
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("rows", "fields", "words"),
    [
        ([{"a": "x"}], None, r"no field that is usual for prompts .* its fields are 'a'"),
        ([{"prompt": "x"}, {"prompt": " "}], None, "line 2: field 'prompt' is empty"),
        ([{"a": "x"}], PromptFields(prompt="b"), "has no field 'b'; its fields are 'a'"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], None, "asks nothing"),
        ([{"prompt": ["x"]}], None, "holds a list, not text"),
    ],
)
def test_rows_without_a_prompt_are_named(
    rows: list[Any], fields: PromptFields | None, words: str, tmp_path: Path
) -> None:
    file = tiny.write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=words):
        load_prompts(file, fields=fields)


def test_a_text_file_is_gone_on_with_passage_by_passage(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("One.\n\nTwo.\n\nThree.\n")
    assert [prompt.conversation[0]["content"] for prompt in load_prompts(tmp_path / "x.txt", limit=2)] == [
        "One.",
        "Two.",
    ]


def test_a_prompt_that_is_too_long_is_said_before_anything_is_written(tmp_path: Path, program: Program) -> None:
    adapter = saved("dira", tmp_path)
    data = tiny.write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x" * 300}])
    shown = program("generate", str(adapter), "--data", str(data), "--output", str(tmp_path / "out.jsonl"))
    assert shown.code == 2
    assert "can take 256 together with its answer" in shown.err.replace("\n", " ")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_shows_what_it_says_and_what_to_type_next(plain: bool, tmp_path: Path) -> None:
    base = tiny.saved_model(tmp_path / "model")
    rows: list[Any] = [{"text": f"{n} is even, or else it is odd."} for n in range(20)] if plain else tiny.rows(20)
    spec = FinetuneSpec(
        model=str(base), data=str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows)), output=str(tmp_path / "run"),
        steps=3, batch_size=4, r=2, learning_rate=5e-2, eval_fraction=0.25, samples=2, retention=False,
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    finetune(spec, console=console)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (samples,) = (record["samples"] for record in metrics if "samples" in record)
    assert len(samples) == 2
    trained = load_trained(str(tmp_path / "run"))
    for sample in samples:
        if plain:
            assert f"{sample['prompt']} {sample['response']}" in {row["text"] for row in rows}
            continue
        assert {"prompt": sample["prompt"], "response": sample["response"]} in rows
        asked = [sample["prompt"]]
        assert [sample["after"]] == generate(trained.model, trained.tokenizer, asked, max_new_tokens=64)
        with trained.model.disable_adapter():
            assert [sample["before"]] == generate(trained.model, trained.tokenizer, asked, max_new_tokens=64)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What it says" in page
    assert html.escape(samples[0]["prompt"]) in page
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for command in ("chat", "evaluate", "serve-check"):
        assert f"dynalora {command} {tmp_path / 'run'}" in shown


def test_the_report_says_what_the_distance_means(tmp_path: Path) -> None:
    folder = tiny.saved_model(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(12))
    spec = FinetuneSpec(
        model=str(folder), data=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "run"), steps=3, batch_size=4, r=2,
        learning_rate=5e-2, eval_fraction=0.25,
    )  # fmt: skip
    result = finetune(spec)
    metrics = list(read_metrics(tmp_path / "run"))
    (shown,) = (record["continued"] for record in metrics if "continued" in record)
    (measured,) = (record["retention"] for record in metrics if "retention" in record)
    curve = {point["factor"]: point["kl"] for record in metrics for point in record.get("scaled", ())}
    assert [each["name"] for each in shown[:2]] == ["base model", "as trained"]
    assert [each["kl"] for each in shown] == [0.0, measured["kl"], *(kl for factor, kl in curve.items() if factor != 1)]
    words = load_tokenizer(str(folder))
    text = own_text(result.model, words)
    assert shown[1]["said"] == continued(result.model, words, text)  # the update is whole again
    assert shown[0]["said"] == continued(result.model, words, text, base=True)
    page = html.unescape((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert in_words(measured["kl"]) in page
    assert f"KL from the base model is {measured['kl']:.4f} ± {measured['kl_error']:.4f} nats per token" in page


@pytest.mark.parametrize(
    ("kl", "times"), [(0.0, "1.00 times"), (0.05, "2.72 times"), (0.2, "55 times"), (9.0, "over a million times")]
)
def test_a_distance_in_words(kl: float, times: str) -> None:
    assert times in in_words(kl)
