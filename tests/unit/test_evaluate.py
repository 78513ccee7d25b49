"""`dynalora evaluate`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from dynalora import DiraConfig
from dynalora.common.statistics import Interval
from dynalora.errors import ConfigError
from dynalora.evaluation.prompts import TEMPLATES, use_template
from dynalora.evaluation.results import TaskResult
from dynalora.evaluation.run import measure, prepare
from dynalora.jobs.evaluate.run import evaluate, is_adapter, results_table
from dynalora.jobs.evaluate.settings import EvaluateSpec
from dynalora.lab.models import load_model

from . import benchmark_files, tiny
from .program import Program


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark_files.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = tiny.tokenizer()
    words.save_pretrained(folder)
    made = tiny.model(len(words))
    made.config.max_position_embeddings = 1024
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "adapter"
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = DiraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False)
    peft.get_peft_model(base, config).save_pretrained(folder)
    return folder


def test_a_model_on_several_tasks(model: Path, data: Path, tmp_path: Path, program: Program) -> None:
    file = tmp_path / "results.json"
    shown = program(
        "evaluate", str(model), "--task", "gsm8k,arc_easy", "-t", "svamp", "--data", str(data), "--limit", "2",
        "--max-new-tokens", "4", "--batch-size", "2", "--json", str(file),
    )  # fmt: skip
    assert shown.code == 0, shown.err
    for said in ("GSM8K", "strict %", "flexible %", "ARC-Easy", "SVAMP", "95 % interval", "0.00 – "):
        assert said in shown.out
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert [result["task"] for result in kept["results"]] == ["gsm8k", "arc_easy", "svamp"]
    assert kept["settings"]["limit"] == 2
    first = kept["results"][0]
    assert (first["items"], first["split"], len(first["answers"])) == (2, "dev", 2)
    assert set(first["scores"]["strict"]) == {"value", "low", "high"}
    assert first["values"]["strict"] == [0.0, 0.0]
    again = program("evaluate", str(model), "--task", "gsm8k", "--data", str(data), "--json", str(file))
    assert again.code == 2
    assert "exists already" in again.err
    assert json.loads(file.read_text(encoding="utf-8")) == kept


def test_an_adapter_changes_what_is_measured(
    model: Path, adapter: Path, data: Path, tmp_path: Path, program: Program
) -> None:
    losses = []
    for source in (model, adapter.parent, adapter):
        file = tmp_path / f"{len(losses)}.json"
        shown = program(
            "evaluate", str(source), "--task", "arc-easy", "--likelihood", "--data", str(data), "--json", str(file)
        )
        assert shown.code == 0, shown.err
        kept = json.loads(file.read_text(encoding="utf-8"))["results"][0]
        losses.append(kept["scores"]["right_loss"]["value"])
        assert "right_loss" not in kept["percent"]
    assert losses[0] != losses[1] == losses[2]


def test_weights_may_be_quantised(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wide = tiny.saved_model(tmp_path / "wide", width=64)
    base = transformers.AutoModelForCausalLM.from_pretrained(wide)
    config = DiraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    given = {"task": ["wikitext2"], "data": str(data), "window": 64}
    found = {}
    for source in ("wide", "adapter"):
        for how in (None, "4bit"):
            (result,) = evaluate(EvaluateSpec(source=str(tmp_path / source), quantization=how, **given))
            found[source, how] = result.scores["perplexity"].value
    assert len(set(found.values())) == 4
    words = transformers.AutoTokenizer.from_pretrained(wide)
    prepared = prepare("wikitext2", data=data)
    for source in ("wide", "adapter"):
        four: Any = load_model(str(wide), quantization="4bit")
        if source == "adapter":
            four = peft.PeftModel.from_pretrained(four, tmp_path / "adapter")
        again = measure(four, words, prepared, window=64).scores["perplexity"].value
        assert found[source, "4bit"] == pytest.approx(again, rel=1e-5)
    with pytest.raises(ConfigError, match="quantization is '3bit'"):
        EvaluateSpec(source=str(wide), quantization="3bit", **given)


def test_the_template_saved_with_an_adapter_is_used(
    adapter: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    asked: list[str] = []

    def say(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[str]:
        asked.extend(tokenizer.decode(ids) for ids in prompts)
        return ["5"] * len(prompts)

    monkeypatch.setattr("dynalora.evaluation.kinds.generate.generate", say)
    arguments = ("--task", "gsm8k", "--data", str(data), "--limit", "1")
    assert program("evaluate", str(model), *arguments, "--template", "magicoder").code == 0
    words = tiny.tokenizer()
    use_template(words, "alpaca")
    try:
        words.save_pretrained(adapter)
        shown = program("evaluate", str(adapter), *arguments)
    finally:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
            (adapter / name).unlink(missing_ok=True)
    assert shown.code == 0
    assert "100.00" in shown.out  # flexible
    question = benchmark_files.ROWS["math/gsm8k.dev"][0]["question"]
    assert asked == [TEMPLATES["magicoder"].prompt(question), TEMPLATES["alpaca"].prompt(question)]


def test_a_classifier(data: Path, tmp_path: Path, program: Program) -> None:
    pytest.importorskip("sklearn")
    words = tiny.tokenizer(chat=False)
    words.add_special_tokens({"pad_token": "[PAD]"})
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    for name, kind in (("tuned", transformers.BertForSequenceClassification), ("plain", transformers.BertModel)):
        words.save_pretrained(tmp_path / name)
        kind(config).save_pretrained(tmp_path / name)
    shown = program("evaluate", str(tmp_path / "tuned"), "--task", "cola", "--data", str(data))
    assert shown.code == 0, shown.err
    assert "matthews %" in shown.out
    refused = program("evaluate", str(tmp_path / "plain"), "--task", "cola", "--data", str(data))
    assert refused.code == 2
    assert "has no trained classification head" in refused.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--task", "gsm9k"], "There is no task 'gsm9k'"),
        (["--task", "humaneval"], "allow it with run_code=True (--run-code)"),
        (["--task", "gsm8k", "--split", "train"], "has no split 'train'"),
        (["--task", "gsm8k", "--metric", "bleu"], "has no metric 'bleu'"),
        (["--task", "gsm8k", "--template", "alpacca"], "template is 'alpacca'"),
        (["--task", "gsm8k", "--batch-size", "0"], "--batch-size is 0"),
        (["--task", "gsm8k", "--dtype", "int3"], "dtype is 'int3'"),
        (["--task", "gsm8k", "--task", "wikitext2_masked"], "need different kinds of models"),
        ([], "task"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    arguments: list[str], told: str, data: Path, program: Program
) -> None:
    shown = program("evaluate", "./no-model", "--data", str(data), *arguments)
    assert shown.code == 2
    assert told in shown.err
    assert "Traceback" not in shown.err


def test_finetune_takes_a_template(model: Path, tmp_path: Path, program: Program) -> None:
    from dynalora.jobs.finetune.prepare import prepare
    from dynalora.jobs.finetune.settings import FinetuneSpec

    rows = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.rows(6))
    spec = FinetuneSpec(
        model=str(model), data=str(rows), output=str(tmp_path / "run"), template="alpaca", max_length=400
    )
    prepared = prepare(spec)
    text = prepared.tokenizer.decode(prepared.training.rows[0]["input_ids"])
    assert text.startswith("Below is an instruction")
    assert text.endswith("!<|im_end|>")
    shown = program("finetune", "-m", str(model), "-d", str(rows), "-o", str(tmp_path / "b"), "--template", "alpacca")
    assert shown.code == 2
    assert "no prompt template 'alpacca'" in shown.err


def test_what_is_an_adapter(model: Path, adapter: Path) -> None:
    assert is_adapter(str(adapter))
    assert is_adapter(str(adapter.parent))
    assert not is_adapter(str(model))
    assert not is_adapter("./nowhere")
    assert not is_adapter("smollm2")


def test_the_table_has_the_mean_of_a_whole_group() -> None:
    results = [
        TaskResult(name, name, "test", 10, "pass@1", {"pass@1": Interval(value, value - 0.1, value + 0.1)},
                   ("pass@1",), too_long=long)
        for name, value, long in (("humaneval", 0.2, 0), ("mbpp", 0.4, 3))
    ]  # fmt: skip
    table = results_table(results)
    assert [row[0] for row in table.rows] == ["humaneval", "mbpp", "mean of code"]
    assert table.rows[2][4:6] == ["30.00", "22.93 – 37.07"]
    assert "mbpp 3" in table.note
    assert len(results_table(results[:1]).rows) == 1
