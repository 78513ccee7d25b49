"""Harness tasks on a loaded adapter, against the harness's real interface and a task file made on the spot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from dynalora import DiselConfig
from dynalora.errors import ConfigError, UnsupportedError
from dynalora.evaluation.harness import FORGETTING_SUITE, HarnessResult, _result, harness_mean, run_harness
from dynalora.jobs.evaluate.run import evaluate
from dynalora.jobs.evaluate.settings import EvaluateSpec
from tests.unit import tiny

TASK = """
task: made_here
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{file}"}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc}}
"""
QUESTIONS = [
    {"question": f"Is {number} it?", "choices": [" yes", " no!", f" {number}"], "answer": number % 3}
    for number in range(12)
]


@pytest.fixture(scope="module")
def adapted() -> tuple[Any, Any]:
    words = tiny.tokenizer()
    torch.manual_seed(1)
    config = DiselConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False, gate_bias_init=1.0)
    return peft.get_peft_model(tiny.model(len(words)), config).train(), words


@torch.no_grad()
def by_hand(model: Any, words: Any) -> float:
    right = 0
    model.eval()
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            context, answer = words(question["question"])["input_ids"], words(choice)["input_ids"]
            log_p = model(input_ids=torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(log_p[len(context) + i - 1, token]) for i, token in enumerate(answer)))
        right += int(max(range(3), key=lambda i: scores[i]) == question["answer"])
    return right / len(QUESTIONS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tiny.write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made_here.yaml").write_text(TASK.format(file=file))
    return tmp_path / "tasks"


def test_accuracy_is_that_of_the_adapted_model(adapted: tuple[Any, Any], folder: Path) -> None:
    model, words = adapted
    (found,) = run_harness(model, words, ["made_here"], num_fewshot=0, include_path=folder, batch_size=4)
    assert model.training
    assert (found.task, found.metric, found.samples) == ("made_here", "acc", 12)
    assert found.value == pytest.approx(by_hand(model, words))
    assert found.numbers == {"acc": (found.value, found.error)}
    assert found.error is not None
    (some,) = run_harness(model, words, ["made_here"], num_fewshot=0, include_path=folder, limit=5)
    assert some.samples == 5


GSM8K_FORM = """
task: sums_here
dataset_path: json
dataset_kwargs: {{data_files: {{train: "{train}", test: "{test}"}}}}
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: [",", "(?s).*#### "]
generation_kwargs: {{until: ["Question:"], do_sample: false}}
num_fewshot: 5
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}, {{function: take_first}}]
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}
      - {{function: take_first}}
"""


def sums(first: int, count: int) -> list[dict[str, str]]:
    return [{"question": f"{n} and {n}?", "answer": f"twice {n}\n#### {2 * n}"} for n in range(first, first + count)]


def test_gsm8k_is_asked_with_examples(
    adapted: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    train = tiny.write_jsonl(tmp_path / "train.jsonl", sums(100, 8))
    test = tiny.write_jsonl(tmp_path / "test.jsonl", sums(10, 6))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums_here.yaml").write_text(GSM8K_FORM.format(train=train, test=test))
    model, words = adapted
    asked: list[str] = []

    def generate(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Right in GSM8K's own form for even numbers, right without it for those that 3 divides, else wrong."""
        answers = []
        for row in input_ids:
            asked.append(words.decode(row, skip_special_tokens=True))
            number = int(asked[-1].rpartition("Question:")[2].split()[0])
            said = f" #### {2 * number}" if number % 2 == 0 else f" {2 * number}" if number % 3 == 0 else " #### 1"
            answers.append(torch.cat([row, torch.tensor(words(said + " Question:")["input_ids"])]))
        longest = max(map(len, answers))
        end = words.eos_token_id
        return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=end) for row in answers])

    monkeypatch.setattr(model, "generate", generate)
    (result,) = run_harness(
        model, words, ["sums_here"], num_fewshot=None, include_path=tmp_path / "tasks", max_length=2048, batch_size=1
    )  # fmt: skip
    assert result.numbers["exact_match (strict-match)"][0] == pytest.approx(3 / 6)
    assert result.numbers["exact_match (flexible-extract)"][0] == pytest.approx(4 / 6)
    assert (result.metric, result.value) == ("exact_match", pytest.approx(3 / 6))
    assert {prompt.count("Question:") for prompt in asked} == {6}  # the task's own five examples before each
    assert all("#### 2" in prompt for prompt in asked)
    asked.clear()
    run_harness(model, words, ["sums_here"], num_fewshot=2, include_path=tmp_path / "tasks", max_length=2048)
    assert {prompt.count("Question:") for prompt in asked} == {3}


def test_what_the_harness_does_not_have_is_named(adapted: tuple[Any, Any], folder: Path) -> None:
    with pytest.raises(ConfigError, match="no task 'made_there'"):
        run_harness(*adapted, ["made_there"], include_path=folder)
    with pytest.raises(ConfigError, match="'made_here' has no metric 'bleu'; it has acc"):
        run_harness(*adapted, ["made_here"], metrics={"made_here": "bleu"}, num_fewshot=0, include_path=folder)
    for given, message in (({"limit": 0}, "limit is 0"), ({"num_fewshot": -1}, "num_fewshot is -1")):
        with pytest.raises(ConfigError, match=message):
            run_harness(*adapted, ["made_here"], include_path=folder, **given)
    with pytest.raises(ConfigError, match="No task is named"):
        run_harness(*adapted, [], include_path=folder)
    with pytest.raises(ConfigError, match="no task 'made_\\*'"):
        run_harness(*adapted, ["made_*"], include_path=folder)


def test_the_suite_is_known_to_the_harness() -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    assert len(FORGETTING_SUITE) == 14
    manager = tasks.TaskManager()
    assert [name for name in FORGETTING_SUITE if name not in manager.all_tasks] == []


def test_without_the_harness_the_extra_is_named(adapted: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'dynalora\[eval\]'"):
        run_harness(*adapted, ["made_here"])


def test_filters_and_missing_errors_are_kept() -> None:
    found = {
        "results": {
            "t": {
                "alias": "t", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1,
                "exact_match,flexible-extract": 0.5, "exact_match_stderr,flexible-extract": "N/A", "ppl,none": 3.0,
            },
            "empty": {"alias": "empty"},
        },
        "n-samples": {"t": {"effective": 7}},
    }  # fmt: skip
    assert _result("t", found, None) == HarnessResult(
        "t", "exact_match", 0.25, 0.1, 7,
        {"exact_match (strict-match)": (0.25, 0.1), "exact_match (flexible-extract)": (0.5, None), "ppl": (3.0, None)},
    )  # fmt: skip
    assert _result("t", found, "ppl").value == 3.0
    with pytest.raises(ConfigError, match="no number for 'empty'"):
        _result("empty", found, None)


def test_the_mean_is_unweighted() -> None:
    results = [HarnessResult("a", "acc", 0.5, None, 10), HarnessResult("b", "acc", 0.7, None, 1000)]
    assert harness_mean(results) == pytest.approx(0.6)
    with pytest.raises(ConfigError, match="no results"):
        harness_mean([])
    assert json.loads(json.dumps(results[0].__dict__))["value"] == 0.5


def test_an_unknown_task_is_refused_before_others_are_read(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    spec = EvaluateSpec(source="x", task=["arc_easy", "lm_eval:hellaswagg"], data=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no task 'hellaswagg'; did you mean 'hellaswag'"):
        evaluate(spec)
