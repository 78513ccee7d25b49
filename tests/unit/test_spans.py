"""Answers marked in passages: windows, marks and what is said, against one window and one pair of places at a time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

import dynalora
from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.benchmarks import benchmark
from dynalora.evaluation.heads import MARKER
from dynalora.evaluation.kinds.base import Example
from dynalora.evaluation.run import measure, prepare
from dynalora.evaluation.spans import LONGEST_ANSWER, mark_answers, read_windows
from dynalora.jobs.compare.run import run_compare
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.jobs.evaluate.run import evaluate
from dynalora.jobs.evaluate.settings import EvaluateSpec
from dynalora.lab.lab_settings import LabSettings
from dynalora.lab.models import load_model
from dynalora.lab.tasks.loading import load_experiment_task
from dynalora.lab.tasks.task import BenchmarkTask
from dynalora.lab.workbench import Workbench

from . import tiny


def words() -> Any:
    """A tokenizer that frames a question and its passage as BERT's does."""
    made = tiny.tokenizer(chat=False, merges=[("Ġ", "a"), ("e", "r"), ("s", "t")])
    made.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", made.cls_token_id), ("[SEP]", made.sep_token_id)],
    )  # fmt: skip
    made.model_max_length = 64
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


WORDS = words()


def encoder(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(7)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForQuestionAnswering(config).to(dtype).eval()


class Shy(torch.nn.Module):
    """An encoder that is as likely to say nothing as to say something."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def forward(self, **inputs: Any) -> Any:
        said = self.inner(**inputs)
        for part in (said.start_logits, said.end_logits):
            part[:, 0] += 3.5
        return said


TEXT = st.text(alphabet="aerst .é", min_size=1, max_size=160).filter(lambda text: bool(text.strip()))


@st.composite
def asked(draw: Any) -> Example:
    passage = draw(TEXT)
    first = draw(st.integers(0, len(passage) - 1))
    behind = draw(st.integers(first + 1, len(passage)))
    span = (first, behind) if draw(st.booleans()) else None
    text = "" if span is None else passage[first:behind]
    return Example(draw(TEXT), [text] if text else [], text, second=passage, span=span)


@settings(max_examples=60, deadline=None)
@given(items=st.lists(asked(), min_size=1, max_size=4), max_length=st.integers(12, 80))
def test_windows_cover_the_passage_and_mark_the_answer(items: list[Example], max_length: int) -> None:
    windows = list(read_windows(WORDS, items, max_length))
    assert [window.item for window in windows] == sorted(window.item for window in windows)
    lengths = [len(WORDS(item.prompt, add_special_tokens=False)["input_ids"]) for item in items]
    for window in windows:
        assert window.cut == (lengths[window.item] > min(64, (max_length - 3) // 2))
    for index, item in enumerate(items):
        own = [window for window in windows if window.item == index]
        covered: set[int] = set()
        for window in own:
            ids = window.inputs["input_ids"]
            assert len(ids) == len(window.places) <= max_length
            assert ids[window.silence] == WORDS.cls_token_id
            assert all(len(values) == len(ids) for values in window.inputs.values())
            inside = [place for place in window.places if place is not None]
            here = {at for first, behind in inside for at in range(first, behind)}
            covered |= here
            # The answer is marked where it lies whole in a window, and nowhere else.
            whole = item.span is not None and {item.span[0], item.span[1] - 1} <= here
            assert (window.marks != (window.silence, window.silence)) == whole
            if whole:
                assert item.span is not None
                first, last = (window.places[mark] for mark in window.marks)
                assert first is not None
                assert last is not None
                # A token may reach beyond the answer, as of the two bytes of an é; the next one within does not.
                assert first[0] <= item.span[0] < first[1]
                assert last[0] <= item.span[1] - 1 < last[1]
        assert covered == set(range(len(item.second)))


def slowly(model: Any, items: list[Example], max_length: int) -> tuple[list[str], list[float]]:
    """Every window alone and every pair of places in turn."""
    answers, losses = [], []
    windows = list(read_windows(WORDS, items, max_length))
    for index, item in enumerate(items):
        found: list[tuple[float, str]] = []
        quiet: list[float] = []
        nats: list[float] = []
        for window in (own for own in windows if own.item == index):
            with torch.no_grad():
                said = model(**{name: torch.tensor([values]) for name, values in window.inputs.items()})
            start, end = said.start_logits[0].double(), said.end_logits[0].double()
            nats += [float(-part.log_softmax(0)[mark]) for part, mark in zip((start, end), window.marks, strict=True)]
            quiet.append(float(start[window.silence] + end[window.silence]))
            for i, first in enumerate(window.places):
                for j, last in enumerate(window.places):
                    if first and last and i <= j < i + LONGEST_ANSWER:
                        found.append((float(start[i] + end[j]), item.second[first[0] : last[1]].strip()))
        worth, text = max(found)
        answers.append(text if worth > min(quiet) else "")
        losses.append(sum(nats) / len(nats))
    return answers, losses


def questions(count: int = 12) -> list[Example]:
    draw = random.Random(4)
    made = []
    for number in range(count):
        passage = " ".join(draw.choice(["ster", "aer", "rest", "e.", "tsé"]) for _ in range(draw.randint(3, 40)))
        span = (5, 9) if number % 3 else None
        text = passage[slice(*span)] if span else ""
        made.append(Example(f"are {number}?", [text] if text else [], text, second=passage, span=span))
    return made


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_what_is_said_is_the_best_of_all_windows(batch_size: int) -> None:
    model, items = Shy(), questions()
    answers, losses = slowly(model, items, 40)
    model.train()
    marked = mark_answers(model, WORDS, items, max_length=40, batch_size=batch_size)
    assert model.training
    assert marked.answers == answers
    assert marked.losses == pytest.approx(losses, rel=1e-5)
    assert 0 < sum(answer == "" for answer in answers) < len(answers)
    assert len(list(read_windows(WORDS, items, 40))) > 2 * len(items)


def test_the_loss_is_the_models_own_in_training() -> None:
    items = [Example("e?", ["st"], "st", second="a rest", span=(4, 6)), Example("a?", [], "", second="ster aer")]
    model = encoder()
    rows = [window.training_row() for window in read_windows(WORDS, items, 64)]
    marked = mark_answers(model, WORDS, items, max_length=64)
    for row, loss in zip(rows, marked.losses, strict=True):
        batch = transformers.DataCollatorWithPadding(WORDS)([dict(row)])
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions"}
        assert float(model(**batch).loss.detach()) == pytest.approx(loss, rel=1e-5)
    both = transformers.DataCollatorWithPadding(WORDS)([dict(row) for row in rows])
    assert both["start_positions"].shape == (2,)


def test_what_cannot_be_marked_is_told() -> None:
    items = questions(2)
    with pytest.raises(ConfigError, match="A window of 4 tokens has no room for a question and a passage"):
        list(read_windows(WORDS, items, 4))
    slow = transformers.ByT5Tokenizer()
    with pytest.raises(ConfigError, match="does not tell where its tokens lie"):
        list(read_windows(slow, items, 40))
    without = words()
    without.pad_token = None
    with pytest.raises(ConfigError, match="has no padding token, which batches need"):
        mark_answers(encoder(), without, items, max_length=40)
    long = [Example("a" * 200, [], "", second="rest")]
    assert mark_answers(encoder(), WORDS, long, max_length=64).cut == 1


def test_places_are_counted_from_the_left_whatever_side_a_tokenizer_pads() -> None:
    left = words()
    left.padding_side = "left"
    items = questions(4)
    expected = mark_answers(encoder(), WORDS, items, max_length=40)
    assert mark_answers(encoder(), left, items, max_length=40) == expected
    task = BenchmarkTask("own", "", benchmark("squad_v2_spans"), tuple(items), tuple(items))
    rows = task.training(left, max_length=40).rows
    batch = task.collator(left)([dict(row) for row in rows])
    assert len({len(row["input_ids"]) for row in rows}) > 1
    assert all(batch["attention_mask"][:, 0] == 1)
    assert left.padding_side == "left"


# --- the benchmark ----------------------------------------------------------------------------------------------------


def rows(split: str, count: int) -> list[dict[str, Any]]:
    made = []
    for number in range(count):
        passage = f"In {split} {number} Ann has {number} cats. Bob has a rat."
        first = passage.index(f"{number} cats")
        told = number % 3 != 0
        made.append(
            {
                "context": passage,
                "question": "What has Ann?" if told else "What has Tom?",
                "answers": {
                    "text": [f"{number} cats", "cats"] if told else [],
                    "answer_start": [first, first + len(f"{number} ")] if told else [],
                },
            }
        )
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spans")
    (folder / "qa").mkdir()
    for split, count in (("train", 40), ("dev", 9)):
        tiny.write_jsonl(folder / "qa" / f"squad_v2.{split}.jsonl", rows(split, count))
    (folder / "text").mkdir()
    (folder / "text" / "wikitext2.test.txt").write_text("Some words of a text.\n" * 20)
    torch.manual_seed(3)
    masked = transformers.BertForMaskedLM(encoder().config)
    masked.save_pretrained(str(folder / "encoder"))
    WORDS.save_pretrained(str(folder / "encoder"))
    return folder


@pytest.fixture(scope="module")
def loaded(data: Path) -> Any:
    """The tokenizer as it comes back from the folder, with the names of the inputs that every model has."""
    return transformers.AutoTokenizer.from_pretrained(str(data / "encoder"))


def test_rows_say_where_the_answer_is(data: Path, tmp_path: Path) -> None:
    prepared = prepare("squad_v2_spans", data=data)
    assert prepared.task.kind.heads == (MARKER,)
    silent, told, *_ = prepared.items
    assert (silent.span, silent.reference, silent.response) == (None, [], "")
    assert told.span is not None
    assert told.second[slice(*told.span)] == told.response == "1 cats"
    assert told.reference == ["1 cats", "cats"]
    (tmp_path / "qa").mkdir()
    wrong = rows("dev", 2)[1]
    for answers, message in (
        ({"text": ["cats"], "answer_start": [1]}, "the answer 'cats', which its passage does not have at character 1"),
        ({"text": ["dogs"]}, "the answer 'dogs', which its passage does not have; mend the row"),
    ):
        tiny.write_jsonl(tmp_path / "qa" / "squad_v2.dev.jsonl", [{**wrong, "answers": answers}])
        with pytest.raises(DataError, match=message):
            prepare("squad_v2_spans", data=tmp_path)


def test_encoders_are_compared_on_marking(data: Path, loaded: Any, tmp_path: Path) -> None:
    spec = CompareSpec(
        tasks=["squad_v2_spans"], data=str(data), model=str(data / "encoder"), output=str(tmp_path / "runs"),
        methods=["lora", "pedyra", "disel", "full"], r=2, learning_rates=[1e-2], seeds=1, steps=6, batch_size=4,
        held_out=9, validation=6, retention_tasks=["wikitext2_masked"], retention_items=2,
        target_modules="all-linear", max_length=64,
    )  # fmt: skip
    done = run_compare(spec, apart=False)
    assert done.failed == ()
    task = load_experiment_task("squad_v2_spans", data=data, held_out=9)
    first: set[float] = set()
    for own in done.grid.contestants:
        found = done.grid.result(done.grid.cell(spec.tasks[0], own, 1e-2, 42))
        assert found is not None
        names = {"f1", "exact", "HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact"}
        assert set(found["test"]["metrics"]) == names
        assert len(found["test"]["losses"]) == 9
        assert found["test"]["accuracy"] is None
        losses = [loss for _, loss in found["training"]["losses"]]
        assert min(losses[1:]) < losses[0]
        assert found["training"]["trainable_parameters"] == own.parameters
        assert found["kept"]["wikitext2_masked"]["value"] > 1
        first.add(round(losses[0], 4))
    assert len(first) == 1, "all methods of a seed start from the same model and head"
    base = done.grid.result(done.grid.base(spec.tasks[0]))
    assert base is not None
    torch.manual_seed(0)
    plain = load_model(str(data / "encoder"), heads=(MARKER,))
    assert base["test"]["losses"] == pytest.approx(task.measure(plain, loaded).losses, rel=1e-4)


@pytest.mark.parametrize("task", ["squad_v2_spans", "cola"])
def test_encoders_may_be_quantised(data: Path, tmp_path: Path, task: str) -> None:
    """Their new head stays as it is, as does the pooler, which a masked language model's checkpoint does not have."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(str(tmp_path / "wide"))
    WORDS.save_pretrained(str(tmp_path / "wide"))
    (tmp_path / "glue").mkdir()
    (tmp_path / "qa").symlink_to(data / "qa")
    for split, count in (("train", 20), ("dev", 6)):
        tiny.write_jsonl(
            tmp_path / "glue" / f"cola.{split}.jsonl",
            [{"text": f"{split} {n} cats", "label": n % 2} for n in range(count)],
        )
    variants = {
        "four": {"method": "lora", "quantization": "4bit"}, "eight": {"method": "lora", "quantization": "8bit"},
        "dislora": {"method": "dislora", "quantization": "4bit"},
    }  # fmt: skip
    spec = CompareSpec(
        tasks=[task], data=str(tmp_path), model=str(tmp_path / "wide"), output=str(tmp_path / "runs"), methods=["lora"],
        variants=variants, r=4, learning_rates=[1e-2], seeds=1, steps=3, batch_size=4, held_out=6, validation=6,
        max_length=64,
    )  # fmt: skip
    done = run_compare(spec, apart=False)
    assert done.failed == ()
    first = []
    for own in done.grid.contestants:
        found = done.grid.result(done.grid.cell(task, own, 1e-2, 42))
        assert found is not None
        assert found["training"]["trainable_parameters"] == own.parameters
        first.append(found["training"]["losses"][0][1])
    # They start from the same head; four or eight bits move the loss by little, and by something.
    assert first == pytest.approx([first[0]] * 4, rel=0.05)
    assert len(set(first[:3])) == 3


def test_what_takes_another_model_is_refused(data: Path, tmp_path: Path) -> None:
    given = {"data": str(data), "model": str(data / "encoder"), "output": str(tmp_path / "runs")}
    with pytest.raises(
        ConfigError, match="p-tuning learns virtual tokens, which are not measured with models that mark"
    ):
        run_compare(CompareSpec(tasks=["squad_v2_spans"], methods=["lora", "p-tuning"], **given), apart=False)
    for source in ("squad_v2_spans -> squad_v2", "squad_v2 -> squad_v2_spans"):
        with pytest.raises(ConfigError, match="squad_v2_spans is the marking of answers"):
            load_experiment_task(source, data=data)
    with pytest.raises(ConfigError, match="'squad_v2_spans' is the marking of answers, and language models"):
        Workbench(LabSettings(data=str(data), model=str(data / "encoder")), ["squad_v2_spans"])
    with pytest.raises(ConfigError, match="needs a model with a question-answering head"):
        measure(transformers.BertForMaskedLM(encoder().config), WORDS, prepare("squad_v2_spans", data=data))
    with pytest.raises(ConfigError, match="needs a causal language model"):
        measure(encoder(), WORDS, prepare("squad_v2", data=data))
    with pytest.raises(ConfigError, match="has no trained question-answering head"):
        evaluate(EvaluateSpec(source=str(data / "encoder"), task=["squad_v2_spans"], data=str(data)))


@pytest.mark.parametrize("adapted", [False, True], ids=["model", "adapter"])
def test_saved_models_and_adapters_are_evaluated(data: Path, loaded: Any, tmp_path: Path, adapted: bool) -> None:
    model: Any = encoder(torch.float32)
    model.save_pretrained(str(tmp_path / "model"))
    WORDS.save_pretrained(str(tmp_path / "model"))
    if adapted:
        model.config.name_or_path = model.name_or_path = str(tmp_path / "model")
        model = peft.get_peft_model(
            model, dynalora.DiselConfig(r=2, target_modules=["query", "value"], task_type="QUESTION_ANS")
        )
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(tmp_path / "adapter"))
    source = tmp_path / ("adapter" if adapted else "model")
    (found,) = evaluate(EvaluateSpec(source=str(source), task=["squad_v2_spans"], data=str(data)))
    expected = measure(model, loaded, prepare("squad_v2_spans", data=data))
    assert found.answers == expected.answers
    assert {name: score.value for name, score in found.scores.items()} == {
        name: score.value for name, score in expected.scores.items()
    }
    assert found.main == "f1"
    assert set(found.percent) >= {"f1", "exact"}
