"""Tasks out of files and generators, and their scores against direct computation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.heads import CAUSAL_LM, CLASSIFIER
from dynalora.evaluation.kinds import code, generate
from dynalora.evaluation.kinds.base import Kind, Measuring
from dynalora.evaluation.kinds.choice import CHOICE
from dynalora.evaluation.kinds.classify import CLASSIFY
from dynalora.evaluation.kinds.generate import GENERATE
from dynalora.evaluation.kinds.text import conversation_rows
from dynalora.evaluation.numbers import solution_from
from dynalora.evaluation.results import TaskScore
from dynalora.evaluation.sandbox import Program
from dynalora.lab.scores import mean_accuracy
from dynalora.lab.tasks.loading import load_experiment_task
from dynalora.lab.tasks.mixed import split_source
from dynalora.lab.tasks.task import AnswerTask, BenchmarkTask, MixedTask

from . import tiny


def test_solutions_lose_their_notes_and_keep_their_number() -> None:
    item = solution_from({"question": " How many? ", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"})
    assert (item.question, item.answer) == ("How many?", "48/2 = 24 clips.\n#### 24")
    with pytest.raises(DataError, match="line 3 has an answer without a number"):
        solution_from({"question": "q", "answer": "none"}, "line 3")
    with pytest.raises(DataError, match="field 'question'"):
        solution_from({"answer": "#### 1"})


def kind_of(task: Any) -> Kind | None:
    return task.kind if isinstance(task, BenchmarkTask) else None


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
    assert kind_of(sums) is GENERATE
    assert (sums.name, len(sums.held_out)) == ("sums", 5)
    assert [item.question for item in sums.items] == [f"{n} + 1?" for n in range(4)], "held out and trained on"
    parity = load_experiment_task(str(files / "parity"), held_out=2, train_limit=3)
    assert kind_of(parity) is CHOICE
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
            [vars(item.choice) if kind_of(task) is CHOICE else (item.prompt, item.reference) for item in task.held_out]
            for task in (named, placed)
            if isinstance(task, BenchmarkTask)
        )  # fmt: skip
        assert len(one) == 3
        assert one == other
    with pytest.raises(DataError, match="has no split 'train'"):
        load_experiment_task("openbookqa", data=tmp_path)
    with pytest.raises(ConfigError, match="wikitext2 has no questions with answers"):
        load_experiment_task("wikitext2", data=tmp_path)
    with pytest.raises(ConfigError, match="mbpp executes code that the model writes; allow it with run_code"):
        load_experiment_task("mbpp", data=tmp_path)
    with pytest.raises(ConfigError, match="'arithmetic' is a group of tasks; name one of them"):
        load_experiment_task("arithmetic", data=tmp_path)


def test_a_benchmark_is_scored_by_its_own_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": f"{n} and 1?", "answer": float(n + 1)} for n in range(4)]
    (tmp_path / "math").mkdir()
    for split, own in (("train", rows[:2]), ("test", rows[2:])):
        tiny.write_jsonl(tmp_path / f"math/AddSub.{split}.jsonl", own)
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    task = load_experiment_task("addsub", data=tmp_path)
    assert kind_of(task) is GENERATE
    assert [item.answer for item in task.items] == ["1.0", "2.0"]  # where there is no solution, the answer is learned
    monkeypatch.setattr(generate, "generate", lambda *_, **__: ["It is 3, so 3.0005", "4 or 5"])
    score = task.measure(model, words, Measuring(generated_tokens=8))
    assert score.correct == (True, False)
    held = conversation_rows([GENERATE.item(example) for example in task.held_out], words, "").rows
    total, count, _ = losses_of(model, words, held)
    assert score.loss.value == pytest.approx(total / count, rel=1e-5)


def test_rows_of_another_kind_are_refused(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        tiny.write_jsonl(tmp_path / f"odd.{split}.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(DataError, match="fields 'text', 'label'; give prompts and responses"):
        load_experiment_task(str(tmp_path / "odd"))


def test_prompts_with_responses_are_a_task_and_no_question_is_on_both_sides(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}.", "output": f"<{n}>"} for n in range(10)]
    (tmp_path / "own").mkdir()
    tiny.write_jsonl(tmp_path / "own" / "train.jsonl", rows[:7])
    tiny.write_jsonl(tmp_path / "own" / "test.jsonl", [{**rows[6], "instruction": "say  6."}, *rows[7:]])
    task = load_experiment_task(str(tmp_path / "own"), held_out=3)
    assert isinstance(task, AnswerTask)
    assert [item.question for item in task.items] == [f"Say {n}." for n in range(6)]
    assert [(item.question, item.answer) for item in task.held_out][1:] == [("Say 7.", "<7>"), ("Say 8.", "<8>")]
    words = tiny.tokenizer()
    score = task.measure(tiny.model(len(words)), words)
    assert score.loss.value > 0
    assert len(score.losses) == 3


def test_a_single_file_holds_a_fifth_of_its_own_rows_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}.", "response": f"<{n}>"} for n in range(20)]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    task, again, other = (load_experiment_task(str(tmp_path / "rows.jsonl"), seed=seed) for seed in (0, 0, 1))
    assert isinstance(task, AnswerTask)
    assert task.name == "rows"
    assert (len(task.items), len(task.held_out)) == (16, 4)
    assert {item.answer for item in (*task.items, *task.held_out)} == {f"<{n}>" for n in range(20)}
    assert task == again
    assert task != other
    tiny.write_jsonl(tmp_path / "one.jsonl", rows[:1])
    with pytest.raises(DataError, match="Every training question of one is also held out"):
        load_experiment_task(str(tmp_path / "one.jsonl"))


def test_prompts_with_responses_can_be_measured_after_training_on_others(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"Say {n}.", "response": f"<{n}>"} for n in range(5)])
    tiny.write_jsonl(tmp_path / "b.jsonl", [{"prompt": f"Say {n}.", "response": f"<{n}>"} for n in range(3, 6)])
    task = load_experiment_task(f"own = {tmp_path / 'a.jsonl'} -> {tmp_path / 'b.jsonl'}")
    assert isinstance(task, MixedTask)
    assert [item.answer for item in task.items] == ["<0>", "<1>", "<2>"]
    assert [item.answer for item in task.measured[0].held_out] == ["<3>", "<4>", "<5>"]  # type: ignore[attr-defined]


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
    assert kind_of(task) is GENERATE
    asked: list[Any] = []

    def said(model: Any, tokenizer: Any, prompts: Any, **_: Any) -> list[str]:
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return ["It is #### 5", "#### 7", "6"][: len(prompts)]

    monkeypatch.setattr(generate, "generate", said)
    score = task.measure(model, words, Measuring(generated=3, generated_tokens=8, batch_size=2, system="Count."))
    assert score.correct == (True, False, False)  # 4 + 1, 5 + 1, 6 + 1
    assert (
        asked[0] == "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\n4 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    rows = conversation_rows([GENERATE.item(example) for example in task.held_out], words, "Count.").rows
    total, count, _ = losses_of(model, words, rows)
    assert score.loss.value == pytest.approx(total / count, rel=1e-5)
    assert score.questions == 5
    assert score.metrics == {"flexible": pytest.approx(1 / 3)}
    silent = task.measure(model, words, Measuring(generated=0))
    assert silent.accuracy is None
    assert silent.record()["accuracy"] is None
    again = TaskScore.from_record(json.loads(json.dumps(score.record())))
    assert again.record() == score.record()


def test_answers_are_scored_by_agreement_and_loss(files: Path) -> None:
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    items = load_experiment_task(str(files / "sums")).items
    task = AnswerTask("sums", "", tuple(items), tuple(items))
    total, count, right = losses_of(model, words, conversation_rows(items, words, "").rows)
    score = task.measure(model, words)
    assert score.loss.value == pytest.approx(total / count, rel=1e-5)
    assert score.correct == tuple(right)


def test_options_are_scored_behind_the_system_message(files: Path) -> None:
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    task = load_experiment_task(str(files / "parity"))
    assert kind_of(task) is CHOICE
    score = task.measure(model, words, Measuring(system="Choose."))
    wanted, total, count = [], 0.0, 0
    for choice in [example.choice for example in task.held_out]:
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
    assert kind_of(task) is CLASSIFY
    assert (task.heads, task.labels, len(task.items)) == ((CLASSIFIER,), labels, 6)
    score = task.measure(model, words, Measuring(batch_size=4))
    outputs, losses = [], []
    for row in rows[6:]:
        pair = (row["text"],) if name == "sst2" else (row["sentence1"], row["sentence2"])
        with torch.no_grad():
            logits = model(**words(*pair, return_tensors="pt")).logits[0].double()
        truth = row["label"]
        outputs.append(int(logits.argmax()) if labels == 2 else float(logits[0]))
        losses.append(float(-logits.log_softmax(-1)[truth]) if labels == 2 else float((logits[0] - truth) ** 2))
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
    assert kind_of(left) is CHOICE
    assert kind_of(aside) is CHOICE
    assert kind_of(task) is CHOICE
    assert again == (left, aside)
    assert sorted(c.choice.question for c in (*left.train, *aside.held_out)) == sorted(
        c.choice.question for c in task.train
    )
    assert len(aside.held_out) == 2
    assert left.held_out == task.held_out
    with pytest.raises(ConfigError, match="0 questions to choose settings on"):
        task.validation(0)


# --- trained on one thing, measured on others ---------------------------------------------------------------------


def option_rows(first: int, count: int, word: str = "answer") -> list[dict[str, str]]:
    """Multiple choice as LLM-Adapters writes it, responses included."""
    return [
        {
            "instruction": f"Please choose: {word} {n}?\n\n{word.title()}1: even {word.title()}2: odd\n\n"
            f"Answer format: {word}1/{word}2",
            "output": f"the correct answer is {word}{n % 2 + 1}",
            "answer": f"{word}{n % 2 + 1}",
        }
        for n in range(first, first + count)
    ]


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """Rows of ARC-Easy and OpenBookQA to train and measure, of PIQA and SVAMP to measure, and an instruction file."""
    folder = tmp_path / "benchmarks"
    for name, rows in (
        ("commonsense/ARC-Easy.train", option_rows(0, 6)),
        ("commonsense/ARC-Easy.dev", option_rows(4, 3)),  # two of them are training questions, too
        ("commonsense/openbookqa.train", option_rows(100, 5)),
        ("commonsense/openbookqa.dev", option_rows(200, 4)),
        ("commonsense/piqa.dev", option_rows(0, 2, "solution")),
        ("math/gsm8k.train", problems(0, 4)),
        ("math/SVAMP.dev", [{"instruction": f"{n} + 1?", "answer": float(n + 1)} for n in range(2, 4)]),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.write_jsonl(folder / f"{name}.jsonl", rows)
    taught = [{"query": f"{n}  + 1?", "response": f"It is {n + 1}."} for n in range(1, 6)]
    tiny.write_jsonl(folder / "taught.jsonl", taught)
    return folder


def asked_of(task: Any) -> list[str]:
    return sorted(item.question for item in task.items)


def test_a_group_is_trained_on_and_single_tasks_are_measured(benchmarks: Path) -> None:
    source = "both = commonsense -> arc_easy+piqa"
    task = load_experiment_task(source, data=benchmarks, held_out=3)
    assert isinstance(task, MixedTask)
    assert (task.name, task.heads) == ("both", (CAUSAL_LM,))
    assert [own.name for own in task.measured] == ["arc_easy", "piqa"]
    assert [len(own.held_out) for own in task.measured] == [3, 2]  # type: ignore[attr-defined]
    # 4 and 5 of ARC-Easy are measured; PIQA has nothing to train on.
    wanted = [f"answer {n}?" for n in (0, 1, 2, 3, 100, 101, 102, 103, 104)]
    assert asked_of(task) == sorted(wanted)
    assert {item.answer for item in task.items} == {"even", "odd"}
    assert "2 whose question is measured are left out" in task.about
    # A limit takes of all benchmarks, and the same ones every time.
    limited = [load_experiment_task(source, data=benchmarks, train_limit=4, seed=3) for _ in range(2)]
    assert limited[0].items == limited[1].items
    kinds = {int(item.question.split()[1][:-1]) >= 100 for item in limited[0].items}
    assert kinds == {True, False}
    unnamed = load_experiment_task("commonsense->arc_easy + piqa", data=benchmarks)
    assert unnamed.name == "commonsense -> arc_easy + piqa"


def test_the_union_is_learned_in_words_or_by_its_options(benchmarks: Path) -> None:
    plain = load_experiment_task("commonsense_union -> piqa", data=benchmarks)
    assert sorted({item.answer for item in plain.items}) == ["even", "odd"]
    task = load_experiment_task("commonsense_union -> piqa + arc_e", data=benchmarks, by_generation=True)
    assert isinstance(task, MixedTask)
    assert all(kind_of(own) is GENERATE for own in task.measured)
    assert len(task.items) == 9
    assert {item.answer for item in task.items} == {"the correct answer is answer1", "the correct answer is answer2"}
    assert all("Answer format: answer1/answer2" in item.question for item in task.items)
    own = load_experiment_task("arc_easy", data=benchmarks, by_generation=True)
    assert kind_of(own) is GENERATE
    assert own.items[0].answer == "the correct answer is answer1"


def test_what_has_no_training_rows_is_known_by_its_error_and_not_by_its_words(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = ("commonsense -> piqa", "commonsense_union -> piqa", "arithmetic -> piqa")
    lengths = [len(load_experiment_task(source, data=benchmarks).items) for source in sources]
    monkeypatch.setattr(DataError, "__str__", lambda error: "said in other words")
    assert [len(load_experiment_task(source, data=benchmarks).items) for source in sources] == lengths


def test_a_damaged_union_is_told_and_not_replaced(benchmarks: Path) -> None:
    (benchmarks / "commonsense" / "commonsense_170k.train.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"commonsense_170k.*not valid JSON"):
        load_experiment_task("commonsense_union -> piqa", data=benchmarks)


def test_instruction_data_is_trained_on_and_mixed_with_benchmarks(benchmarks: Path) -> None:
    taught = load_experiment_task(f"{benchmarks / 'taught.jsonl'} -> svamp", data=benchmarks)
    # "2 + 1?" and "3 + 1?" are measured, however they are spaced.
    assert asked_of(taught) == ["1  + 1?", "4  + 1?", "5  + 1?"]
    assert taught.items[0].conversation("Count.") == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "1  + 1?"},
        {"role": "assistant", "content": "It is 2."},
    ]
    mixed = load_experiment_task(f"m = gsm8k + {benchmarks / 'taught.jsonl'} -> svamp", data=benchmarks)
    assert asked_of(mixed) == sorted(["0 + 1?", "1 + 1?", "1  + 1?", "4  + 1?", "5  + 1?"])
    # Files as benchmarks have them are read as such.
    placed = load_experiment_task(f"{benchmarks / 'math' / 'gsm8k'} -> {benchmarks / 'commonsense' / 'piqa'}")
    assert placed.items[0].answer == "It is\n#### 1"
    assert isinstance(placed, MixedTask)
    assert kind_of(placed.measured[0]) is CHOICE


def test_conversations_keep_their_turns(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]  # fmt: skip
    tiny.write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}])
    pytest.importorskip("reasoning_gym")
    task = load_experiment_task(f"{tmp_path / 'chat.jsonl'} -> chain_sum:min_terms=2,max_terms=2", held_out=2)
    assert isinstance(task, MixedTask)
    (item,) = task.items
    assert (item.question, item.answer) == ("2 + 2?", "4")
    assert item.conversation("Other.") == turns
    assert [own.name for own in task.measured] == ["chain_sum:min_terms=2,max_terms=2"]
    assert len(task.measured[0].held_out) == 2  # type: ignore[attr-defined]


def test_generated_tasks_are_learned_and_measured_elsewhere(benchmarks: Path) -> None:
    pytest.importorskip("reasoning_gym")
    task = load_experiment_task("chain_sum -> svamp", data=benchmarks, train_limit=5, seed=1)
    alone = load_experiment_task("chain_sum", train_limit=5, held_out=200, seed=1)
    assert task.items == alone.items


def test_measured_tasks_are_averaged_and_their_questions_put_together(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    task = load_experiment_task("gsm8k -> arc_easy + svamp", data=benchmarks)
    assert isinstance(task, MixedTask)
    monkeypatch.setattr(generate, "generate", lambda *_, **__: ["It is 3", "7"])
    score = task.measure(model, words, Measuring(system="Say.", generated_tokens=8))
    parts = [own.measure(model, words, Measuring(system="Say.", generated_tokens=8)) for own in task.measured]
    accuracies = [sum(own.correct) / len(own.correct) for own in parts]
    assert accuracies[1] == 0.5
    assert score.accuracy is not None
    assert score.accuracy.value == pytest.approx(sum(accuracies) / 2)
    # Two independent intervals: their halves add up as squares.
    below = [own.accuracy.value - own.accuracy.low for own in parts if own.accuracy is not None]
    assert score.accuracy.value - score.accuracy.low == pytest.approx((below[0] ** 2 + below[1] ** 2) ** 0.5 / 2)
    assert score.metrics == {"arc_easy": pytest.approx(accuracies[0]), "svamp": pytest.approx(accuracies[1])}
    assert score.correct == parts[0].correct + parts[1].correct
    assert score.losses == parts[0].losses + parts[1].losses
    assert score.counts == parts[0].counts + parts[1].counts
    assert score.loss.value == pytest.approx(sum(score.losses) / sum(score.counts))
    again = TaskScore.from_record(json.loads(json.dumps(score.record())))
    assert again.accuracy == score.accuracy
    assert mean_accuracy([score.record()]) == score.accuracy
    silent = task.measure(model, words, Measuring(generated=0))
    assert silent.accuracy is None, "the mean of one task is not the mean of both"
    assert "arc_easy" in silent.metrics


def test_questions_are_set_aside_of_what_is_trained_on(benchmarks: Path) -> None:
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    task = load_experiment_task("commonsense -> piqa", data=benchmarks)
    left, aside = task.validation(4, seed=2)
    assert isinstance(aside, AnswerTask)
    assert len(aside.held_out) == 4
    together = [item.question for item in (*left.items, *aside.held_out)]
    assert sorted(together) == asked_of(task)
    assert len(left.items) == 7
    total, count, _ = losses_of(model, words, conversation_rows(aside.held_out, words, "").rows)
    assert aside.measure(model, words).loss.value == pytest.approx(total / count, rel=1e-5)
    assert left.measured == task.measured  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="11 questions to choose settings on cannot be set aside of the 11"):
        task.validation(11)


def test_code_is_scored_by_running_it_if_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").mkdir()
    row = {
        "prompt": "def twice(x):\n", "entry_point": "twice", "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    }  # fmt: skip
    tiny.write_jsonl(tmp_path / "code" / "humaneval.test.jsonl", [row, {**row, "prompt": "def twice(y):\n"}])
    tiny.write_jsonl(tmp_path / "taught.jsonl", [{"prompt": "Write.", "response": "pass"}])
    source = f"{tmp_path / 'taught.jsonl'} -> humaneval"
    with pytest.raises(ConfigError, match="allow it with run_code"):
        load_experiment_task(source, data=tmp_path)
    monkeypatch.setattr(code, "check_sandbox", lambda **_: None)
    task = load_experiment_task(source, data=tmp_path, run_code=True)
    ran: list[str] = []

    def program(written: Program, *_: Any, **__: Any) -> Any:
        ran.append(written.solution)
        return type("Outcome", (), {"passed": "return x + x" in written.solution})

    monkeypatch.setattr(code, "run_program", program)
    monkeypatch.setattr(generate, "generate", lambda *_, **__: ["    return x + x\n", "    return y\n"])
    words = tiny.tokenizer()
    score = task.measure(tiny.model(len(words)), words, Measuring(generated_tokens=5))
    assert score.correct == (True, False)
    assert score.accuracy is not None
    assert score.accuracy.value == score.metrics["humaneval"] == 0.5
    assert ran[0].startswith("def twice(x):\n    return x + x\n")


def test_other_metrics_stand_where_no_answer_is_simply_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "summarization").mkdir()
    for split in ("train", "test"):
        rows = [{"document": f"{split} a cat sat.", "summary": "A cat sat."}]
        tiny.write_jsonl(tmp_path / "summarization" / f"xsum.{split}.jsonl", rows)
    pytest.importorskip("rouge_score")
    task = load_experiment_task("xsum", data=tmp_path)
    monkeypatch.setattr(generate, "generate", lambda *_, **__: ["A cat sat."])
    words = tiny.tokenizer()
    score = task.measure(tiny.model(len(words)), words, Measuring(generated_tokens=5))
    assert score.accuracy is None
    assert score.metrics["rouge1"] == pytest.approx(1.0)
    assert score.loss.value > 0


def test_a_plus_that_ends_a_name_joins_nothing() -> None:
    for source in ("taught.jsonl -> HumanEval+ + mbpp+", "taught.jsonl->HumanEval++mbpp+"):
        assert split_source(source)[1:] == (["taught.jsonl"], ["HumanEval+", "mbpp+"])
    assert split_source("a+b -> c+ d")[1:] == (["a", "b"], ["c", "d"])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("gsm8k ->", ConfigError, "does not say what is measured; write it as TRAIN -> MEASURED"),
        ("gsm8k -> svamp +", ConfigError, "does not say what is measured"),
        ("-> svamp", ConfigError, "does not say what is trained on"),
        ("name = -> svamp", ConfigError, "does not say what is trained on"),
        ("gsm8k -> svamp -> piqa", ConfigError, "has 2 arrows"),
        ("gsm8k -> svamp + SVAMP", ConfigError, "measures svamp twice"),
        ("gsm8k -> nothing_like_it", ConfigError, "There is no task 'nothing_like_it'"),
        ("nothing_like_it -> svamp", ConfigError, "There is no task 'nothing_like_it'"),
        ("no/such.jsonl -> svamp", DataError, "no file or folder 'no/such.jsonl'"),
        ("gsm8k -> no/such", DataError, "has no file 'no/such.dev or test.jsonl'"),
        ("gsm8k -> wikitext2", ConfigError, "wikitext2 has no questions with answers"),
        ("gsm8k -> cola", ConfigError, "cola is classification"),
        ("cola -> svamp", ConfigError, "cola is classification, which a model that is measured on other tasks"),
        ("wikitext2 -> svamp", ConfigError, "wikitext2 has no questions"),
        ("commonsense", ConfigError, "'commonsense' is a group of tasks"),
        ("commonsense_union", ConfigError, "'commonsense_union' is a group of tasks"),
        ("gsm8k -> code", ConfigError, "allow it with run_code"),
        ("piqa -> svamp", DataError, "'commonsense/piqa' has no split 'train'"),
    ],
)
def test_what_is_no_such_task_is_told(benchmarks: Path, source: str, error: type, message: str) -> None:
    pytest.importorskip("reasoning_gym")
    (benchmarks / "glue").mkdir()
    tiny.write_jsonl(benchmarks / "glue" / "cola.dev.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(error, match=re.escape(message)):
        load_experiment_task(source, data=benchmarks)


def test_nothing_is_left_where_all_is_measured(benchmarks: Path) -> None:
    tiny.write_jsonl(benchmarks / "same.jsonl", [{"prompt": "2 + 1?", "response": "3"}])
    with pytest.raises(DataError, match="is also measured; train on something else"):
        load_experiment_task(f"{benchmarks / 'same.jsonl'} -> svamp", data=benchmarks)


# --- windows --------------------------------------------------------------------------------------------------------


def short_sighted(words: Any, window: int) -> Any:
    """A model that fails on longer texts: it has no more positions."""
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=window, resid_pdrop=0.0, embd_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config).eval()


LONG = " and a number that is much longer than all the others that are asked here"


@pytest.mark.parametrize("kind", ["multiple choice", "word problems", "mixed"])
def test_questions_longer_than_the_window_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    make = choices if kind == "multiple choice" else problems
    rows: Any = make(10, 5)
    field = "instruction" if kind == "multiple choice" else "question"
    for place in (1, 3):
        rows[place][field] = rows[place][field].replace("Number", "Number" + LONG).replace(" + 1?", f" + 1?{LONG}")
    tiny.write_jsonl(tmp_path / "all.train.jsonl", make(0, 4))
    tiny.write_jsonl(tmp_path / "all.dev.jsonl", rows)
    tiny.write_jsonl(tmp_path / "few.train.jsonl", make(0, 4))
    tiny.write_jsonl(tmp_path / "few.dev.jsonl", [rows[place] for place in (0, 2, 4)])
    source = f"{tmp_path / 'all'} -> {{}}" if kind == "mixed" else "{}"
    words = tiny.tokenizer()
    model = short_sighted(words, 110)
    how = Measuring(generated=5, generated_tokens=4, batch_size=2)
    few = load_experiment_task(source.format(tmp_path / "few")).measure(model, words, how)
    assert few.too_long == 0
    caplog.clear()
    found = load_experiment_task(source.format(tmp_path / "all")).measure(model, words, how)
    assert found.too_long == 2
    assert "2 of 5 prompts of all are longer than the 110 tokens that the model's window has room for" in caplog.text
    assert found.losses == pytest.approx(few.losses, rel=1e-5)
    assert found.questions == 3
    assert TaskScore.from_record(json.loads(json.dumps(found.record()))) == found
    with pytest.raises(DataError, match="All 5 prompts of all are longer than the model's window"):
        load_experiment_task(source.format(tmp_path / "all")).measure(short_sighted(words, 20), words, how)


def test_texts_to_learn_are_cut_to_the_window(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from dynalora.jobs.finetune.prepare import prepare
    from dynalora.jobs.finetune.settings import FinetuneSpec

    words = tiny.tokenizer()
    words.save_pretrained(tmp_path / "model")
    short_sighted(words, 80).save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Say {n}.", "response": "It is said. " * (n + 1)} for n in range(12)]
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    ready = prepare(
        FinetuneSpec(model=str(tmp_path / "model"), data=str(data), output=str(tmp_path / "run"), max_length=200)
    )
    assert "are longer than 80 tokens (max_length or the model's window) and lose their end" in caplog.text
    lengths = [len(row["input_ids"]) for row in [*ready.training.rows, *ready.held_out.rows]]
    assert max(lengths) == 80
