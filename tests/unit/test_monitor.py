"""The retention monitor: what it measures, that it disturbs nothing, and that it keeps to a budget."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import dynalora
from dynalora import RetentionMonitor, given_text, own_text, plot_retention_curves, read_retention
from dynalora.errors import CheckpointError, ConfigError, DataError
from dynalora.evaluation.tokens import ensure_pad_token
from dynalora.forgetting.base_model import adapter_tensors
from dynalora.forgetting.curves import checkpoint_retention
from dynalora.forgetting.monitor import OWN_TEXT
from dynalora.forgetting.retention import base_predictions, retention
from dynalora.forgetting.texts import MeasuredText
from dynalora.lab.configs import adapter_config
from dynalora.methods import method_names
from tests.processes import run_two
from tests.unit import tiny

METHODS = [*method_names(), "lora"]
STEPS = 9


@pytest.fixture(scope="module")
def words() -> Any:
    made = tiny.tokenizer()
    ensure_pad_token(made)
    return made


@pytest.fixture(scope="module")
def own(words: Any) -> Any:
    return own_text(tiny.model(len(words)), words, texts=5, tokens=7, cache=False)


def adapted(words: Any, method: str = "lora", **more: Any) -> Any:
    """A fresh adapter; dropout, so that a random state which is not put back shows."""
    options = dict(more)
    if method == "pedyra":  # ranks move within the few steps
        options |= {"adjust_start": 2, "adjust_interval": 2, "adjust_end": 6, "adjust_size": 2}
    if method != "lora":
        options |= {"total_steps": STEPS}
    torch.manual_seed(4)
    config = adapter_config(method, r=3, dropout=0.1, options=options)
    return peft.get_peft_model(tiny.model(len(words)), config).train()


def batch(words: Any, number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, len(words) - 2, (4, 12), generator=generator)
    return {"input_ids": ids, "labels": ids}


def optimizer_of(model: Any, rate: float = 2e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)


def train(model: Any, words: Any, monitor: RetentionMonitor | None = None, *, rate: float = 2e-2) -> int:
    """A loop of one's own; the steps it made."""
    optimizer = optimizer_of(model, rate)
    if monitor is not None:
        monitor.begin(model)
    done = 0
    for number in range(STEPS):
        model(**batch(words, number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if monitor is not None and monitor.step(model):
            break
    if monitor is not None:
        monitor.end(model)
    return done


@torch.no_grad()
def by_definition(model: Any, text: Any) -> tuple[float, float]:
    """KL and loss shift from float64 softmaxes, each text alone, without padding."""
    kl = shift = 0.0
    model.eval()
    for row, start in zip(text.rows, text.starts, strict=True):
        ids = torch.tensor([row])
        with model.disable_adapter():
            p = model(input_ids=ids).logits[0].double().log_softmax(-1)
        q = model(input_ids=ids).logits[0].double().log_softmax(-1)
        for place in range(start, len(row)):
            kl += float((p[place - 1].exp() * (p[place - 1] - q[place - 1])).sum())
            shift += float(p[place - 1, row[place]] - q[place - 1, row[place]])
    return kl / text.tokens, shift / text.tokens


# --- what it measures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_curve_is_the_definition_on_every_text(method: str, words: Any, own: Any) -> None:
    named = given_text(["The quick brown fox.", "Jumps."], words)
    monitor = RetentionMonitor({"named": named}, own=own, every=4)
    model = adapted(words, method)
    train(model, words, monitor, rate=5e-2)
    assert [(point.step, point.text) for point in monitor.points] == [
        (step, text) for step in (0, 4, 8, 9) for text in (OWN_TEXT, "named")
    ]
    for point, text in zip(monitor.points[-2:], (own, named), strict=True):
        kl, shift = by_definition(model, text)
        assert kl > 1e-3, "the adapter changes too little for this test to mean anything"
        assert point.retention.kl == pytest.approx(kl, rel=1e-4)
        assert point.retention.loss_shift == pytest.approx(shift, rel=1e-3, abs=1e-5)
        assert point.retention.tokens == text.tokens
    assert all(point.retention.kl == pytest.approx(0, abs=1e-6) for point in monitor.points[:2])
    assert monitor.forgetting == max(point.retention.kl for point in monitor.points[-2:])


def test_given_text_counts_all_tokens_but_the_first(words: Any) -> None:
    text = given_text(["abcdef", "x", "", "ab"], words, max_length=4)
    assert [len(row) for row in text.rows] == [4, 2]
    assert (text.starts, text.tokens) == ((1, 1), 4)
    for given, message in (("abc", "got one string"), (["", "a"], "None of the 2 texts has two tokens")):
        with pytest.raises(ConfigError, match=message):
            given_text(given, words)
    with pytest.raises(ConfigError, match="max_length is 1"):
        given_text(["abc"], words, max_length=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_predictions_change_no_bit_whatever_fits(dtype: torch.dtype, words: Any, own: Any) -> None:
    model = adapted(words)
    train(model, words)
    model.to(dtype)
    own = MeasuredText(own.rows, own.starts)  # not this model's own in half precision
    whole = base_predictions(model, own, batch_size=2, dtype=None)
    assert whole.bytes == own.tokens * len(words) * dtype.itemsize
    for limit in (0, whole.bytes // 2, whole.bytes, None):
        kept = base_predictions(model, own, batch_size=2, dtype=None, max_bytes=limit)
        assert kept.bytes <= (whole.bytes if limit is None else limit)
        missing = sum(part is None for part in kept.log_probs)
        assert (missing == 0) == (limit is None or limit == whole.bytes)
        assert missing < len(own.rows) or limit == 0
        assert retention(model, own, base=kept, batch_size=2) == retention(model, own, batch_size=2)


def test_the_cache_limit_is_shared_by_all_texts_and_changes_no_curve(words: Any, own: Any) -> None:
    named = given_text(["The quick brown fox.", "Jumps."], words)
    curves = []
    for size in (2**30, 0, own.tokens * len(words) * 4):
        monitor = RetentionMonitor({"named": named}, own=own, every=4, batch_size=2, cache_bytes=size)
        model = adapted(words)
        monitor.begin(model)
        assert sum(kept.bytes for kept in monitor._references.values()) <= size
        monitor.end(model)
        train(model, words, monitor)
        curves.append([point.retention for point in monitor.points])
    assert curves[0] == curves[1] == curves[2]


# --- that it disturbs nothing -----------------------------------------------------------------------------


def assert_same_model(one: Any, other: Any) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert sorted(first) == sorted(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_bit_for_bit(method: str, keep_best: bool, words: Any) -> None:
    plain = adapted(words, method)
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    torch.manual_seed(7)
    train(plain, words)
    state = torch.get_rng_state()
    watched = adapted(words, method)
    torch.manual_seed(7)
    budget = {"max_forgetting": 100.0, "keep_best": True} if keep_best else {}
    monitor = RetentionMonitor({"named": ["Some text."]}, tokenizer=words, every=1, **budget)
    train(watched, words, monitor)
    assert len(monitor.points) == 2 * (STEPS + 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_model(plain, watched)
    if method != "pedyra":
        assert any(not torch.equal(plain.state_dict()[name], start[name]) for name in start)


def test_what_trains_and_every_modules_mode_stay(words: Any, own: Any) -> None:
    model = adapted(words)
    frozen = [name for name, p in model.named_parameters() if "layers.0" in name and p.requires_grad]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    model.base_model.model.model.layers[1].eval()
    model.config.use_cache = False
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    model(**batch(words, 0)).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    monitor = RetentionMonitor(own=own, every=1)
    monitor.begin(model)
    monitor.step(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.use_cache is False
    for name, gradient in gradients.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


def trainer_of(model: Any, words: Any, output: Path, callbacks: list[Any], steps: int = STEPS, **more: Any) -> Any:
    rows = [{name: value[0] for name, value in batch(words, number).items()} for number in range(16)]
    arguments = transformers.TrainingArguments(
        str(output), max_steps=steps, per_device_train_batch_size=4, learning_rate=2e-2, report_to="none",
        disable_tqdm=True, use_cpu=True, logging_steps=2, lr_scheduler_type="constant",
        **{"save_strategy": "no", **more},
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:4], processing_class=words, callbacks=callbacks
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_trains_the_same_bit_for_bit(method: str, words: Any, tmp_path: Path) -> None:
    plain, watched = adapted(words, method), adapted(words, method)
    first = trainer_of(plain, words, tmp_path, [])
    first.train()
    monitor = RetentionMonitor(every=2)  # the text is written when training begins
    second = trainer_of(watched, words, tmp_path, [monitor])
    second.train()
    assert [point.step for point in monitor.points] == [0, 2, 4, 6, 8, 9]
    assert_same_model(plain, watched)

    def losses(trainer: Any) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(first) == losses(second)


# --- the budget -------------------------------------------------------------------------------------------


def forgetting_by_step(words: Any, own: Any, method: str = "lora") -> list[float]:
    monitor = RetentionMonitor(own=own, every=1)
    train(adapted(words, method), words, monitor)
    return [point.retention.kl for point in monitor.points]


@pytest.mark.parametrize("method", METHODS)
def test_a_loop_stops_at_the_first_measurement_above_the_budget(method: str, words: Any, own: Any) -> None:
    curve = forgetting_by_step(words, own, method)
    budget = sorted(curve)[len(curve) // 2]
    expected = next(step for step, kl in enumerate(curve) if kl > budget)
    monitor = RetentionMonitor(own=own, every=1, max_forgetting=budget)
    assert train(adapted(words, method), words, monitor) == expected
    assert monitor.exceeded is not None
    assert (monitor.exceeded.step, monitor.exceeded.text) == (expected, OWN_TEXT)
    assert monitor.exceeded.retention.kl == curve[expected]


def test_any_text_can_exceed_the_budget(words: Any, own: Any) -> None:
    named = given_text(["The quick brown fox jumps over the lazy dog."], words)
    both = RetentionMonitor({"named": named}, own=own, every=1)
    train(adapted(words), words, both)
    kls = {text: [p.retention.kl for p in both.points if p.text == text] for text in (OWN_TEXT, "named")}
    more = max(kls, key=lambda text: kls[text][-1])
    less = min(kls, key=lambda text: kls[text][-1])
    budget = (kls[more][-1] + kls[less][-1]) / 2
    monitor = RetentionMonitor({"named": named}, own=own, every=1, max_forgetting=budget)
    train(adapted(words), words, monitor)
    assert monitor.exceeded is not None
    assert monitor.exceeded.text == max(
        kls, key=lambda text: kls[text][monitor.exceeded.step] if monitor.exceeded else 0
    )


def test_a_trainer_stops_there_too(words: Any, own: Any, tmp_path: Path) -> None:
    monitor = RetentionMonitor(own=own, every=2)
    trainer_of(adapted(words), words, tmp_path, [monitor]).train()
    curve = {point.step: point.retention.kl for point in monitor.points}
    stopping = RetentionMonitor(own=own, every=2, max_forgetting=(curve[2] + curve[4]) / 2)
    trainer = trainer_of(adapted(words), words, tmp_path, [stopping])
    trainer.train()
    assert trainer.state.global_step == 4
    assert stopping.exceeded is not None
    assert stopping.exceeded.retention.kl == curve[4]


def test_a_fraction_is_of_a_trainers_run(words: Any, own: Any, tmp_path: Path) -> None:
    monitor = RetentionMonitor(own=own, every=0.4)
    trainer_of(adapted(words), words, tmp_path, [monitor]).train()
    assert [point.step for point in monitor.points] == [0, 4, 8, 9]
    with pytest.raises(ConfigError, match="give a number of steps here"):
        RetentionMonitor(own=own, every=0.4).begin(adapted(words))


@pytest.mark.parametrize("method", METHODS)
def test_the_best_state_under_the_budget_is_put_back(method: str, words: Any, own: Any) -> None:
    curve = forgetting_by_step(words, own, method)
    budget = sorted(curve)[len(curve) // 2]
    last = max(step for step, kl in enumerate(curve) if kl <= budget)
    assert last < STEPS
    monitor = RetentionMonitor(own=own, every=1, max_forgetting=budget, keep_best=True)
    model = adapted(words, method)
    assert train(model, words, monitor) == STEPS
    assert monitor.best is not None
    assert (monitor.best.step, monitor.best.forgetting) == (last, curve[last])
    assert retention(model, own).kl == curve[last]


def test_scores_say_which_state_is_best(words: Any, own: Any) -> None:
    scores = iter([5.0, 3.0, 1.0, 2.0, *[9.0] * STEPS])
    monitor = RetentionMonitor(own=own, every=1, max_forgetting=100.0, keep_best=True, score=lambda model: next(scores))
    train(adapted(words), words, monitor)
    assert monitor.best is not None
    assert (monitor.best.step, monitor.best.score) == (2, 1.0)


def test_without_a_budget_the_best_of_all_states_is_kept(words: Any, own: Any) -> None:
    scores = iter([5.0, float("nan"), 3.0, 3.0, *[9.0] * STEPS])
    monitor = RetentionMonitor(own=own, every=1, keep_best=True, score=lambda model: next(scores))
    model = adapted(words)
    assert train(model, words, monitor) == STEPS
    assert monitor.best is not None
    assert (monitor.best.step, monitor.best.score) == (2, 3.0)
    assert retention(model, own).kl == forgetting_by_step(words, own, "lora")[2]


def test_a_trainers_evaluations_are_the_scores(words: Any, own: Any, tmp_path: Path) -> None:
    model = adapted(words)
    monitor = RetentionMonitor(own=own, every=4, max_forgetting=100.0, keep_best=True)
    trainer = trainer_of(model, words, tmp_path, [monitor], eval_strategy="steps", eval_steps=3)
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert set(evaluated) == {3, 6, 9}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert monitor.best is not None
    assert (monitor.best.step, monitor.best.score) == (best, evaluated[best])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-6)


@pytest.mark.parametrize("method", ["lora", "pedyra"])
def test_a_resumed_run_knows_its_best_state_and_its_curve(method: str, words: Any, own: Any, tmp_path: Path) -> None:
    def monitor(file: str) -> RetentionMonitor:
        return RetentionMonitor(own=own, every=1, max_forgetting=budget, keep_best=True, path=tmp_path / file)

    every = RetentionMonitor(own=own, every=1)
    trainer_of(adapted(words, method), words, tmp_path / "0", [every]).train()
    budget = every.points[2].retention.kl
    whole, whole_monitor = adapted(words, method), monitor("whole.jsonl")
    saves = {"save_strategy": "steps", "save_steps": 6, "save_total_limit": 2}
    trainer_of(whole, words, tmp_path / "1", [whole_monitor], **saves).train()

    class Killed(Exception):
        pass

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 8:
                raise Killed

    with pytest.raises(Killed):
        trainer_of(adapted(words, method), words, tmp_path / "2", [monitor("cut.jsonl"), Kill()], **saves).train()
    resumed, again = adapted(words, method), monitor("cut.jsonl")
    trainer_of(resumed, words, tmp_path / "2", [again], **saves).train(resume_from_checkpoint=True)
    assert whole_monitor.best is not None
    assert again.best is not None
    assert whole_monitor.best.step <= 6, "the best state must lie before the checkpoint"
    assert again.best.step == whole_monitor.best.step
    assert_same_model(whole, resumed)
    assert [p.retention for p in again.points] == [p.retention for p in whole_monitor.points]
    curves = read_retention(tmp_path / "cut.jsonl")["run"]
    assert [(p.step, p.retention) for p in curves] == [(p.step, p.retention) for p in again.points]


def test_a_damaged_kept_state_is_one_clear_sentence(words: Any, own: Any, tmp_path: Path) -> None:
    monitor = RetentionMonitor(own=own, every=2, max_forgetting=100.0, keep_best=True)
    saves = {"save_strategy": "steps", "save_steps": 4}
    trainer_of(adapted(words), words, tmp_path, [monitor], **saves).train()
    (tmp_path / "checkpoint-8" / "retention_best.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"retention_best\.safetensors"):
        trainer_of(adapted(words), words, tmp_path, [monitor], **saves).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-8")
        )


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_give_the_same_curve(method: str, words: Any, own: Any, tmp_path: Path) -> None:
    monitor = RetentionMonitor({"named": ["Some text."]}, own=own, every=3)
    saves = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(adapted(words, method), words, tmp_path, [monitor], **saves).train()
    base = tiny.model(len(words))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    texts = {OWN_TEXT: own, "named": given_text(["Some text."], words)}
    found = checkpoint_retention(base, tmp_path, texts)
    watched = [point for point in monitor.points if point.step > 0]
    assert [(point.step, point.text) for point in found] == [(point.step, point.text) for point in watched]
    assert [p.step for p in found] == [3, 3, 6, 6, 9, 9]
    for point, seen in zip(found, watched, strict=True):
        assert point.retention.kl == pytest.approx(seen.retention.kl, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    with pytest.raises(CheckpointError, match="holds no checkpoint-N"):
        checkpoint_retention(base, tmp_path / "elsewhere", texts)


# --- what it refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"every": 2.5}, r"every is 2\.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"cache_bytes": -1}, "cache_bytes is -1"),
        ({"max_forgetting": 0.0}, r"max_forgetting is 0\.0"),
        ({"max_forgetting": float("nan")}, "max_forgetting is nan"),
        ({"own": False}, "no text to monitor"),
        ({"texts": {OWN_TEXT: ["a"]}}, "name yours otherwise"),
    ],
)
def test_settings_that_cannot_work(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RetentionMonitor(**given)


def test_what_cannot_be_monitored_is_said_before_training(words: Any, own: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="have to be tokenised"):
        RetentionMonitor().begin(adapted(words))
    with pytest.raises(ConfigError, match=r"call begin\(model\) before"):
        RetentionMonitor(own=own).step(adapted(words))
    torch.manual_seed(0)
    biased = peft.get_peft_model(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(words), n_embd=8, n_layer=1, n_head=1)),
        peft.LoraConfig(r=2, bias="all", task_type="CAUSAL_LM"),
    )
    with pytest.raises(ConfigError, match=r"weight '.*bias' is trained too"):
        RetentionMonitor(own=False, texts={"a": ["some text"]}, tokenizer=words).begin(biased)
    trained = adapted(words)
    train(trained, words)
    with pytest.raises(ConfigError, match="before training, above max_forgetting"):
        RetentionMonitor(own=own, max_forgetting=1e-6).begin(trained)


def test_a_file_with_a_run_of_this_name_is_not_written_into(words: Any, own: Any, tmp_path: Path) -> None:
    file = tmp_path / "new" / "curves.jsonl"
    for name in ("a", "b"):
        train(adapted(words), words, RetentionMonitor(own=own, every=5, name=name, path=file))
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="holds a run named 'a' already"):
        RetentionMonitor(own=own, name="a", path=file).begin(adapted(words))
    assert file.read_bytes() == before
    curves = read_retention(file)
    assert {name: [p.step for p in points] for name, points in curves.items()} == {
        "a": [0, 5, 9], "b": [0, 5, 9]
    }  # fmt: skip


def test_files_that_hold_something_else(tmp_path: Path, words: Any, own: Any) -> None:
    file = tmp_path / "curves.jsonl"
    train(adapted(words), words, RetentionMonitor(own=own, every=5, path=file))
    lines = file.read_text().splitlines()
    assert set(json.loads(lines[0])) >= {"run", "step", "text", "kl", "loss_shift"}
    file.write_text("\n".join([*lines, lines[0][:20]]))
    assert len(read_retention(file)["run"]) == 3
    file.write_text("\n".join([lines[0][:20], *lines]))
    with pytest.raises(DataError, match=r"Line 1 of .* is no measurement"):
        read_retention(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_retention(tmp_path / "missing.jsonl")
    # A line cut short by a kill is not continued by the next run's first.
    file.write_text("\n".join([*lines, lines[0][:20]]))
    train(adapted(words), words, RetentionMonitor(own=own, every=5, name="next", path=file))
    assert {name: len(points) for name, points in read_retention(file).items()} == {"run": 3, "next": 3}


def test_the_state_kept_is_all_of_the_adapter_and_nothing_else(words: Any) -> None:
    for method in METHODS:
        model = adapted(words, method)
        base = {name.replace(".base_layer", "") for name in model.state_dict()} & {
            "base_model.model." + name for name in tiny.model(len(words)).state_dict()
        }
        kept = adapter_tensors(model)
        assert len(kept) + len(base) == len(model.state_dict())
        assert not any("base_layer" in name for name in kept)


# --- the plot ---------------------------------------------------------------------------------------------


def test_curves_are_drawn(words: Any, own: Any, tmp_path: Path) -> None:
    file = tmp_path / "curves.jsonl"
    for name, method in (("LoRA", "lora"), ("DISeL", "disel")):
        monitor = RetentionMonitor({"named": ["Some text."]}, own=own, tokenizer=words, every=3, name=name, path=file)
        train(adapted(words, method), words, monitor)
    curves = read_retention(file)
    figure = plot_retention_curves(curves, tmp_path / "curves.png", max_forgetting=0.5, title="Both")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    assert figure.get_suptitle() == "Both"
    assert [axis.get_title() for axis in figure.axes] == [OWN_TEXT, OWN_TEXT, "named", "named"]
    for number, axis in enumerate(figure.axes):
        assert axis.get_xlabel() == "optimizer step"
        assert ("KL" if number % 2 == 0 else "loss shift") in axis.get_ylabel()
        assert "nats per token" in axis.get_ylabel()
    kl, shift = figure.axes[2], figure.axes[3]
    lines = {container.get_label(): container.lines[0] for container in kl.containers}
    points = [point for point in curves["DISeL"] if point.text == "named"]
    assert list(lines["DISeL"].get_xdata()) == [0, 3, 6, 9]
    assert list(lines["DISeL"].get_ydata()) == [point.retention.kl for point in points]
    drawn = {line.get_label(): line for line in shift.lines}
    assert list(drawn["DISeL"].get_ydata()) == [point.retention.loss_shift for point in points]
    assert [line.get_ydata()[0] for line in kl.lines if line.get_label() == "budget"] == [0.5]
    assert kl.get_ylim()[0] == 0
    styles = {(line.get_marker(), line.get_linestyle()) for line in lines.values()}
    assert len(styles) == 2, "runs must differ without colour"
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == {"LoRA", "DISeL", "budget"}
    with pytest.raises(ConfigError, match="no measurements to draw"):
        plot_retention_curves({})


def test_it_is_an_everyday_name() -> None:
    assert dynalora.RetentionMonitor is RetentionMonitor


# --- several processes ------------------------------------------------------------------------------------

BUDGET = 0.02

WORKER = """
import dataclasses, json, os, sys
from pathlib import Path
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from dynalora import RetentionMonitor
from dynalora.forgetting import monitor as watched
from dynalora.forgetting.texts import OwnText
from tests.unit import test_monitor as this
from tests.unit import tiny

rank, folder, budget, port = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
torch.set_num_threads(1)
distributed.init_process_group("gloo", rank=rank, world_size=2)
words = tiny.tokenizer()
text = OwnText(**{**json.loads((folder / "own.json").read_text())})
own = OwnText(tuple(map(tuple, text.rows)), tuple(text.starts), text.fingerprint, text.seed)
if rank == 1:  # a process that sees no forgetting must stop all the same
    real = watched.retention
    watched.retention = lambda *a, **k: dataclasses.replace(real(*a, **k), kl=0.0)
model = this.adapted(words)
called = DistributedDataParallel(model)
optimizer = this.optimizer_of(model)
monitor = RetentionMonitor(own=own, every=1, max_forgetting=budget, path=folder / "curves.jsonl")
monitor.begin(model)
done = 0
for number in range(this.STEPS):
    called(**this.batch(words, 2 * number + rank)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    done += 1
    if monitor.step(model):
        break
monitor.end(model)
told = [done, [point.retention.kl for point in monitor.points]]
(folder / f"told-{rank}.json").write_text(json.dumps(told))
distributed.destroy_process_group()
"""


def test_all_processes_follow_the_first(words: Any, own: Any, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(dataclasses.asdict(own)))
    run_two(WORKER, str(tmp_path), str(BUDGET))
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    steps, curve = told[0]
    assert 1 <= steps < STEPS
    assert curve[-1] > BUDGET
    assert max(curve[:-1]) <= BUDGET
    assert len(read_retention(tmp_path / "curves.jsonl")["run"]) == steps + 1, "one process writes"
