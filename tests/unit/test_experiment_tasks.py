"""Tasks out of files and generators, and their scores against direct computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.numbers import solution_from
from dynalora.experiments import tasks
from dynalora.experiments.tasks import (
    AnswerTask,
    ChoiceTask,
    ClassTask,
    GenerationTask,
    Measuring,
    TaskScore,
    load_experiment_task,
)

from . import tiny


def test_solutions_lose_their_notes_and_keep_their_number() -> None:
    item = solution_from({"question": " How many? ", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"})
    assert (item.question, item.answer) == ("How many?", "48/2 = 24 clips.\n#### 24")
    with pytest.raises(DataError, match="line 3 has an answer without a number"):
        solution_from({"question": "q", "answer": "none"}, "line 3")
    with pytest.raises(DataError, match="field 'question'"):
        solution_from({"answer": "#### 1"})


def problems(first: int, count: int) -> list[dict[str, str]]:
    return [{"question": f"{n} + 1?", "answer": f"It is\n#### {n + 1}"} for n in range(first, first + count)]


def choices(first: int, count: int) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Please choose: Number {n}?\n\nAnswer1: even Answer2: odd\n\n"
            "Answer format: answer1/answer2",
            "answer": f"answer{n % 2 + 1}",
        }
        for n in range(first, first + count)
    ]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny.write_jsonl(tmp_path / "sums.train.jsonl", problems(0, 6))
    tiny.write_jsonl(tmp_path / "sums.dev.jsonl", problems(4, 5))  # two of them are training questions, too
    (tmp_path / "parity").mkdir()
    (tmp_path / "parity" / "train.json").write_text(json.dumps(choices(0, 6)), encoding="utf-8")
    tiny.write_jsonl(tmp_path / "parity" / "test.jsonl", choices(5, 4))
    return tmp_path


def test_tasks_are_found_by_the_beginning_of_their_files_and_by_folder(files: Path) -> None:
    sums = load_experiment_task(str(files / "sums"))
    assert isinstance(sums, GenerationTask)
    assert (sums.name, len(sums.held_out)) == ("sums", 5)
    assert [item.question for item in sums.items] == [f"{n} + 1?" for n in range(4)], (
        "held out and trained on"
    )
    parity = load_experiment_task(str(files / "parity"), held_out=2, train_limit=3)
    assert isinstance(parity, ChoiceTask)
    assert (len(parity.train), len(parity.held_out)) == (3, 2)
    assert [item.answer for item in parity.items] == ["even", "odd", "even"]


def test_generated_tasks_take_options_behind_a_colon() -> None:
    pytest.importorskip("reasoning_gym")
    task = load_experiment_task("spell_backward:min_word_len=3,max_word_len=3", held_out=3, train_limit=4)
    assert isinstance(task, AnswerTask)
    assert (len(task.items), len(task.held_out)) == (4, 3)
    assert all(len(item.answer) == 3 for item in task.items)
    with pytest.raises(ConfigError, match="There is no task 'spel_backward'"):
        load_experiment_task("spel_backward")


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("nowhere/x", {}, DataError, "has no file 'nowhere/x.train.jsonl'"),
        ("", {}, ConfigError, "has no name"),
        ("sums", {"held_out": 0}, ConfigError, "held_out is 0"),
        ("sums", {"train_limit": 0}, ConfigError, "train_limit is 0"),
    ],
)
def test_what_is_no_task_is_refused(source: str, options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load_experiment_task(source, **options)


def test_a_benchmark_by_name_is_the_task_of_its_files(files: Path, tmp_path: Path) -> None:
    for name, rows in (("commonsense/ARC-Easy", choices), ("math/gsm8k", problems)):
        (tmp_path / name).parent.mkdir()
        tiny.write_jsonl(tmp_path / f"{name}.train.jsonl", rows(0, 6))
        tiny.write_jsonl(tmp_path / f"{name}.dev.jsonl", rows(4, 5))
    for name, stem in (("ARC-Easy", "commonsense/ARC-Easy"), ("gsm8k", "math/gsm8k")):
        named = load_experiment_task(name, data=tmp_path, held_out=3, train_limit=2)
        placed = load_experiment_task(str(tmp_path / stem), held_out=3, train_limit=2)
        assert type(named) is type(placed)
        assert len(named.items) == 2
        assert named.items == placed.items
        one, other = (
            [vars(item) if isinstance(task, ChoiceTask) else (item.prompt, item.reference) for item in task.held_out]
            for task in (named, placed)
            if isinstance(task, (ChoiceTask, GenerationTask))
        )  # fmt: skip
        assert len(one) == 3
        assert one == other
    with pytest.raises(DataError, match="has no split 'train'"):
        load_experiment_task("openbookqa", data=tmp_path)
    with pytest.raises(ConfigError, match="answers to xsum are not simply right or wrong"):
        load_experiment_task("xsum", data=tmp_path)
    with pytest.raises(ConfigError, match="answers to humaneval are not"):
        load_experiment_task("humaneval", data=tmp_path)


def test_a_benchmark_is_scored_by_its_own_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": f"{n} and 1?", "answer": float(n + 1)} for n in range(4)]
    (tmp_path / "math").mkdir()
    for split, own in (("train", rows[:2]), ("test", rows[2:])):
        tiny.write_jsonl(tmp_path / f"math/AddSub.{split}.jsonl", own)
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    task = load_experiment_task("addsub", data=tmp_path)
    assert isinstance(task, GenerationTask)
    assert [item.answer for item in task.items] == [
        "1.0",
        "2.0",
    ]  # where there is no solution, the answer is learned
    monkeypatch.setattr(tasks, "generate", lambda *_, **__: ["It is 3, so 3.0005", "4 or 5"])
    score = task.measure(model, words)
    assert score.correct == (True, False)
    held = tasks._tokens([tasks._item(own) for own in task.held_out], words, "").rows
    total, count, _ = losses_of(model, words, held)
    assert score.loss.value == pytest.approx(total / count, rel=1e-5)


def test_rows_of_another_kind_are_refused(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        tiny.write_jsonl(tmp_path / f"odd.{split}.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(DataError, match="fields 'text', 'label'; give multiple choice"):
        load_experiment_task(str(tmp_path / "odd"))


def test_training_leaves_out_what_is_too_long(files: Path) -> None:
    words = tiny.tokenizer()
    task = load_experiment_task(str(files / "sums"))
    whole = task.training(words, max_length=1000)
    lengths = sorted(len(row["input_ids"]) for row in whole.rows)
    assert (len(whole), whole.dropped) == (4, 0)
    longer = task.training(words, system="A longer message than the template's own.", max_length=1000)
    assert min(len(row["input_ids"]) for row in longer.rows) > lengths[-1]
    with pytest.raises(DataError, match=f"longer than max_length 5; the shortest has {lengths[0]} tokens"):
        task.training(words, max_length=5)


def prompt_of(system: str, question: str) -> str:
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    return f"{turns}<|im_start|>assistant\n"


def losses_of(model: Any, words: Any, rows: Any) -> tuple[float, int, list[bool]]:
    """Sum of the answers' losses, number of their tokens, and whether each is the likeliest, one row at a time."""
    total, count, right = 0.0, 0, []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        own = labels != -100
        picked = logits.double().log_softmax(-1)[own].gather(1, labels[own][:, None])
        total, count = total - float(picked.sum()), count + int(own.sum())
        right.append(bool((logits[own].argmax(-1) == labels[own]).all()))
    return total, count, right


def test_a_word_problem_is_scored_by_its_solution_and_by_its_number(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    task = load_experiment_task(str(files / "sums"))
    assert isinstance(task, GenerationTask)
    asked: list[Any] = []

    def said(model: Any, tokenizer: Any, prompts: Any, **_: Any) -> list[str]:
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return ["It is #### 5", "#### 7", "6"][: len(prompts)]

    monkeypatch.setattr(tasks, "generate", said)
    score = task.measure(model, words, Measuring(generated=3, batch_size=2, system="Count."))
    assert score.correct == (True, False, False)  # 4 + 1, 5 + 1, 6 + 1
    assert (
        asked[0]
        == "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\n4 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    rows = tasks._tokens([tasks._item(own) for own in task.held_out], words, "Count.").rows
    total, count, _ = losses_of(model, words, rows)
    assert score.loss.value == pytest.approx(total / count, rel=1e-5)
    assert score.questions == 5
    silent = task.measure(model, words, Measuring(generated=0))
    assert silent.accuracy is None
    assert silent.record()["accuracy"] is None
    again = TaskScore.from_record(json.loads(json.dumps(score.record())))
    assert again == score


def test_answers_are_scored_by_agreement_and_loss(files: Path) -> None:
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    items = load_experiment_task(str(files / "sums")).items
    task = AnswerTask("sums", "", tuple(items), tuple(items))
    total, count, right = losses_of(model, words, tasks._tokens(items, words, "").rows)
    score = task.measure(model, words)
    assert score.loss.value == pytest.approx(total / count, rel=1e-5)
    assert score.correct == tuple(right)


def test_options_are_scored_behind_the_system_message(files: Path) -> None:
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    task = load_experiment_task(str(files / "parity"))
    assert isinstance(task, ChoiceTask)
    score = task.measure(model, words, Measuring(system="Choose."))
    wanted, total, count = [], 0.0, 0
    for choice in task.held_out:
        head = prompt_of("Choose.", choice.question)
        per_token = []
        for place, option in enumerate(choice.options):
            prompt, answer = (words(text, add_special_tokens=False)["input_ids"] for text in (head, option))
            row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
            loss, tokens, _ = losses_of(model, words, [row])
            per_token.append(loss / tokens)
            if place == choice.right:
                total, count = total + loss, count + tokens
        wanted.append(per_token.index(min(per_token)) == choice.right)
    assert score.correct == tuple(wanted)
    assert score.loss.value == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_classification_is_scored_as_its_definition_has_it(name: str, tmp_path: Path) -> None:
    words = tiny.tokenizer(chat=False)
    words.pad_token = words.eos_token
    torch.manual_seed(5)
    labels = 2 if name == "sst2" else 1
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, num_labels=labels,
        )
    ).eval()  # fmt: skip
    (tmp_path / "glue").mkdir()
    rows: list[dict[str, Any]] = [
        {"text": f"Number {n}" * (1 + n % 3), "label": n % 2}
        if name == "sst2"
        else {"sentence1": f"Number {n}" * (1 + n % 3), "sentence2": "One", "label": n / 4}
        for n in range(12)
    ]
    tiny.write_jsonl(tmp_path / f"glue/{name}.train.jsonl", rows[:6])
    tiny.write_jsonl(tmp_path / f"glue/{name}.dev.jsonl", rows[6:])
    task = load_experiment_task(name, data=tmp_path)
    assert isinstance(task, ClassTask)
    assert (task.head, task.labels, len(task.items)) == ("classes", labels, 6)
    score = task.measure(model, words, Measuring(batch_size=4))
    outputs, losses = [], []
    for row in rows[6:]:
        pair = (row["text"],) if name == "sst2" else (row["sentence1"], row["sentence2"])
        with torch.no_grad():
            logits = model(**words(*pair, return_tensors="pt")).logits[0].double()
        truth = row["label"]
        outputs.append(int(logits.argmax()) if labels == 2 else float(logits[0]))
        losses.append(
            float(-logits.log_softmax(-1)[truth]) if labels == 2 else float((logits[0] - truth) ** 2)
        )
    assert score.losses == pytest.approx(losses, abs=1e-5)
    assert score.counts == (1,) * 6
    assert score.loss.value == pytest.approx(sum(losses) / 6, abs=1e-5)
    if labels == 2:
        assert score.correct == tuple(own == row["label"] for own, row in zip(outputs, rows[6:], strict=True))
        assert score.metrics == {}
    else:
        assert score.correct == ()
        assert score.accuracy is None
        stats = pytest.importorskip("scipy.stats")
        wanted = stats.pearsonr(outputs, [row["label"] for row in rows[6:]]).statistic
        assert score.metrics["pearson"] == pytest.approx(wanted, abs=1e-4)
    assert TaskScore.from_record(json.loads(json.dumps(score.record()))).record() == score.record()
    trained = task.training(words, max_length=10)
    assert trained.truncated == sum(len(row["input_ids"]) == 10 for row in trained.rows) > 0
    batch = task.collator(words)(trained.rows[:3])
    assert batch["labels"].tolist() == [row["label"] for row in rows[:3]]


def test_questions_set_aside_are_the_same_for_a_seed_and_are_not_trained_on(files: Path) -> None:
    task = load_experiment_task(str(files / "parity"))
    left, aside = task.validation(2, seed=1)
    again = task.validation(2, seed=1)
    assert isinstance(left, ChoiceTask)
    assert isinstance(aside, ChoiceTask)
    assert isinstance(task, ChoiceTask)
    assert again == (left, aside)
    assert sorted(c.question for c in (*left.train, *aside.held_out)) == sorted(
        c.question for c in task.train
    )
    assert len(aside.held_out) == 2
    assert left.held_out == task.held_out
    with pytest.raises(ConfigError, match="0 questions to choose settings on"):
        task.validation(0)
