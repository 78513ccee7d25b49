"""A kind of task that the library does not know, as a user would add it: a class, and an entry that names it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import transformers

from dynalora.common.names import IGNORED_LABEL
from dynalora.errors import ConfigError
from dynalora.evaluation.benchmarks import BENCHMARKS
from dynalora.evaluation.heads import CAUSAL_LM, CLASSIFIER, LANGUAGE_MODELS, Head, common_heads, head_of
from dynalora.evaluation.kinds.base import Benchmark, Example, Measuring, Prepared, Subject
from dynalora.evaluation.kinds.encoder import EncoderKind, Outcome
from dynalora.evaluation.kinds.generate import GENERATE
from dynalora.evaluation.metrics import Metric
from dynalora.evaluation.run import measure, prepare
from dynalora.evaluation.sources import Source
from dynalora.evaluation.tasks import Item
from dynalora.evaluation.tokens import TokenizedSet
from dynalora.jobs.compare.run import run_compare
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.jobs.evaluate.run import evaluate
from dynalora.jobs.evaluate.settings import EvaluateSpec
from dynalora.lab.tasks.loading import load_experiment_task

from . import tiny

# --- what the user writes -------------------------------------------------------------------------------------------

TAGGER = Head(
    "TokenClassification", "a model that tags tokens", "models that tag tokens", "TOKEN_CLS",
    new="token-classification", labelled=True,
)  # fmt: skip


class TagKind(EncoderKind):
    """The tagging of tokens."""

    heads = (TAGGER,)
    noun = "tagging"

    def item(self, example: Example) -> Item:
        return Item(example.prompt, " ".join(map(str, example.reference)))

    def _row(self, example: Example, tokenizer: Any, max_length: int) -> dict[str, Any]:
        inputs = tokenizer(example.prompt, truncation=True, max_length=max_length, return_offsets_mapping=True)
        offsets = inputs.pop("offset_mapping")
        return {**inputs, "labels": [example.reference[first] for first, _ in offsets]}

    def training(
        self, task: Benchmark, examples: Sequence[Example], tokenizer: Any, *, system: str = "", max_length: int = 512
    ) -> TokenizedSet:  # fmt: skip
        rows = [self._row(example, tokenizer, max_length) for example in examples]
        return TokenizedSet(cast("Any", rows), 0, 0)

    def collator(self, tokenizer: Any) -> Any:
        return transformers.DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED_LABEL)

    def outcome(self, subject: Subject, prepared: Prepared, how: Measuring, what: str) -> Outcome:
        tags, losses = [], []
        subject.progress(what, 0, len(prepared.items))
        for done, item in enumerate(prepared.items, start=1):
            row = {name: torch.tensor([ids]) for name, ids in self._row(item, subject.tokenizer, 64).items()}
            labels = row.pop("labels")[0]
            with torch.inference_mode():
                logits = subject.model(**row).logits[0]
            tags.append(logits.argmax(-1).tolist())
            losses.append(float(F.cross_entropy(logits, labels)))
            subject.progress(what, done, len(prepared.items))
        return Outcome(tags, losses)


def read_tags(row: Any, where: str) -> list[Example]:
    return [Example(row["text"], row["tags"], where=where)]


def share(answers: Sequence[Any], references: Sequence[Any]) -> dict[str, list[float | None]]:
    pairs = zip(answers, references, strict=True)
    return {"tagged": [sum(a == b for a, b in zip(*pair, strict=True)) / len(pair[1]) for pair in pairs]}


VOWELS = Benchmark(
    "vowels", "Vowels", Source("tags/vowels"), read_tags, (Metric(("tagged",), items=share),), TagKind(), labels=2
)  # fmt: skip


# --- what works then ------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an encoder and rows of the benchmark."""
    monkeypatch.setitem(BENCHMARKS, VOWELS.name, VOWELS)
    words = tiny.tokenizer(chat=False)
    words.add_special_tokens({"pad_token": "[PAD]"})
    words.save_pretrained(str(tmp_path / "encoder"))
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(str(tmp_path / "encoder"))
    (tmp_path / "tags").mkdir()
    for split, first, count in (("train", 0, 40), ("test", 40, 6)):
        texts = [f"{'aeiou'[n % 5]}{'bcd'[n % 3]}{n}" for n in range(first, first + count)]
        rows = [{"text": text, "tags": [int(sign in "aeiou") for sign in text]} for text in texts]
        tiny.write_jsonl(tmp_path / "tags" / f"vowels.{split}.jsonl", rows)
    return tmp_path


def test_a_new_kind_is_trained_and_compared(place: Path) -> None:
    spec = CompareSpec(
        tasks=["vowels"], data=str(place), model=str(place / "encoder"), output=str(place / "runs"),
        methods=["lora", "dira"], r=4, learning_rates=[3e-2], seeds=1, steps=30, batch_size=8, held_out=6,
        validation=4, max_length=32,
    )  # fmt: skip
    done = run_compare(spec, apart=False)
    assert done.failed == ()
    base = done.grid.result(done.grid.base("vowels"))
    assert base is not None
    for contestant in done.grid.contestants:
        result = done.grid.result(done.grid.cell("vowels", contestant, 3e-2, 42))
        assert result is not None
        assert result["training"]["trainable_parameters"] == contestant.parameters
        assert result["test"]["loss"] < base["test"]["loss"] / 2
        assert result["test"]["metrics"]["tagged"] > 0.9


def test_a_saved_model_of_a_new_kind_is_evaluated(place: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(str(place / "encoder"))
    model = transformers.AutoModelForTokenClassification.from_pretrained(str(place / "encoder"))
    model.save_pretrained(str(place / "tagger"))
    words.save_pretrained(str(place / "tagger"))
    (result,) = evaluate(EvaluateSpec(source=str(place / "tagger"), task=["vowels"], data=str(place)))
    expected = measure(model.eval(), words, prepare("vowels", data=place))
    assert (result.main, result.items) == ("tagged", 6)
    assert result.values == expected.values
    with pytest.raises(ConfigError, match="has no trained token-classification head"):
        evaluate(EvaluateSpec(source=str(place / "encoder"), task=["vowels"], data=str(place)))


def test_a_new_kind_is_refused_where_others_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny.tokenizer()
    with pytest.raises(ConfigError, match=r"needs a model that tags tokens \(AutoModelForTokenClassification\)"):
        measure(tiny.model(len(words)), words, prepare("vowels", data=place))
    with pytest.raises(ConfigError, match="vowels is tagging, which is trained and measured on one task"):
        load_experiment_task("gsm8k -> vowels", data=place)
    both = EvaluateSpec(source=str(place / "encoder"), task=["vowels", "text"], data=str(place))
    monkeypatch.setitem(BENCHMARKS, "text", replace(VOWELS, name="text", kind=GENERATE))
    with pytest.raises(ConfigError, match="vowels and text need different kinds of models"):
        evaluate(both)


def test_which_models_serve_several_tasks() -> None:
    assert common_heads([LANGUAGE_MODELS, (CAUSAL_LM,)]) == (CAUSAL_LM,)
    assert common_heads([LANGUAGE_MODELS, (CLASSIFIER,)]) == ()
    both = transformers.BartConfig()
    assert head_of(both, LANGUAGE_MODELS) is LANGUAGE_MODELS[1]
    assert head_of(both, (CAUSAL_LM,)) is None
    assert head_of(both, (CLASSIFIER,)) is CLASSIFIER


def test_the_benchmark_of_the_guide_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    *_, example = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    monkeypatch.setitem(BENCHMARKS, "riddles", VOWELS)  # taken out again after the test
    exec(compile(example, "the guide", "exec"), {})
    (tmp_path / "riddles").mkdir()
    for split, count in (("train", 6), ("test", 2)):
        rows = [{"riddle": f"{split} {n}?", "solution": str(n)} for n in range(count)]
        tiny.write_jsonl(tmp_path / "riddles" / f"riddles.{split}.jsonl", rows)
    words = tiny.tokenizer()
    task = load_experiment_task("riddles", data=tmp_path)
    score = task.measure(tiny.model(len(words)), words, Measuring(generated_tokens=4))
    assert (len(task.items), score.questions, score.correct) == (6, 2, (False, False))
    result = prepare("riddles", data=tmp_path).scored(["0", "2"])
    assert result.scores["accuracy"].value == 0.5
