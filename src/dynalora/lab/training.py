"""Attach one adapter to a base model and train it: the part that every experiment shares.

Training is transformers' Trainer with PEFT; this module adds what an experiment wants to know of it: the held-out
loss, the step time, a record of everything logged, and checkpoints that a killed run continues from.
"""

from __future__ import annotations

import inspect
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from dynalora.common.files import file_beside
from dynalora.common.names import IGNORED_LABEL
from dynalora.errors import CheckpointError, ConfigError, DataError, TrainingError
from dynalora.evaluation.scoring import answer_loss
from dynalora.evaluation.seq2seq import Seq2SeqCollator, is_encoder_decoder
from dynalora.forgetting.monitor import RetentionMonitor
from dynalora.lab import data
from dynalora.lab.baselines import DriveBaseline, optimizer_of, prompt_only
from dynalora.lab.run_folder import RunFolder

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
UNTIMED_STEPS = 3
"""Steps at the start that are left out of the step time: they pay for allocation and warm-up once."""

# transformers renamed the setting; the old name warns in new versions, the new one is unknown to old ones.
_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. The optimizer is AdamW (0.9, 0.999, 1e-8).

    Attributes:
        steps: Optimizer steps; None: as many as `epochs` needs.
        epochs: Passes over the training data, where `steps` is None.
        learning_rate: The peak.
        schedule: Shape of the learning rate after warm-up: `cosine`, `linear` (both to 0) or
            `constant_with_warmup`.
        warmup: Part of the steps over which the learning rate rises from 0, in [0, 1).
        weight_decay: Never applied to biases, norms and gates.
        batch_size: Sequences per device and forward pass.
        gradient_accumulation: Forward passes per optimizer step.
        max_grad_norm: Gradients are scaled down to this norm; 0: never.
        seed: Fixes the adapter's start, the order of the data and dropout.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        log_every: Optimizer steps between log lines; None: a hundredth of the run.
        eval_every: Optimizer steps between measurements of the held-out loss; None: a fifth of the run; 0: only
            before and after.
        save_every: Optimizer steps between checkpoints, from which a killed run is resumed; None: a tenth of
            the run; 0: never.
    """

    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    seed: int = 42
    gradient_checkpointing: bool = False
    log_every: int | None = None
    eval_every: int | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a whole number of at least 1.")
        for name in ("eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}; give a number of steps, or 0 for never.")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; give a number above 0.")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; give a number of at least 0.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(
                f"warmup is {self.warmup}; give a part of the steps, from 0 up to, but without, 1."
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule is '{self.schedule}'; choose one of {', '.join(SCHEDULES)}.")


@dataclass(frozen=True)
class TrainResult:
    """What one training run gave.

    Attributes:
        model: The adapted model, in evaluation mode; after full fine-tuning, which has no adapter, the model itself.
        label: Name of the run in plots and tables.
        held_out_before: Loss on the held-out set before training, nats per response token; None without one.
        held_out_after: The same after training.
        trainable_parameters: Number of trained parameters.
        parameters: Number of all parameters, the adapter's included.
        steps: Optimizer steps in the whole run.
        step_seconds: Median time of an optimizer step, all its forward and backward passes included, without the
            first few; None if there were no others.
        step_seconds_quartiles: Lower and upper quartile of the same.
        seconds: Time of the training, measurements included, in this process.
        records: What was logged, one mapping per step or measurement.
    """

    model: PeftModel
    label: str
    held_out_before: float | None
    held_out_after: float | None
    trainable_parameters: int
    parameters: int
    steps: int
    step_seconds: float | None
    step_seconds_quartiles: tuple[float, float] | None
    seconds: float
    records: list[dict[str, Any]]


def held_out_loss(model: nn.Module, rows: data.TokenizedSet, *, batch_size: int = 8) -> float:
    """Mean loss over all response tokens of a set, in nats per token; every token counts the same.

    Args:
        model: A causal language model, with or without adapter.
        rows: The tokenised set; rows without a response token do not count.
        batch_size: Sequences per forward pass.

    Raises:
        DataError: No row has a response token.
    """
    answered = [row for row in rows.rows if any(label != IGNORED_LABEL for label in row["labels"][1:])]
    if not answered:
        raise DataError("The held-out set has no response token; give other evaluation data.")
    return answer_loss(model, answered, batch_size=batch_size).mean


def takes_last_logits(model: nn.Module) -> bool:
    """Whether a model trains on the batches of `Collator(…, last_logits=True)`.

    It must be a transformers model for causal language modelling with that library's loss, and learn no prompt: PEFT
    drops the positions of the tokens behind one.
    """
    base: Any = model
    if isinstance(model, peft.PeftModel):
        if model.active_peft_config.is_prompt_learning:
            return False
        base = model.get_base_model()
    if getattr(base, "loss_type", None) != "ForCausalLM":
        return False
    accepted = inspect.signature(base.forward).parameters
    further = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return further and {"logits_to_keep", "position_ids"} <= set(accepted)


class _Recorder(TrainerCallback):
    """Times steps, measures the held-out loss, and passes both to the run folder and the progress display."""

    def __init__(
        self,
        label: str,
        run: RunFolder | None,
        show: _Show,
        measure: Callable[[], float] | None,
        eval_every: int | None,
        records: list[dict[str, Any]],
    ) -> None:
        self.label, self.run, self.show, self.measure = label, run, show, measure
        self.eval_every = eval_every
        self.records = records
        self.durations: list[float] = []
        self.held_out: float | None = None
        self._began = 0.0

    def record(self, values: Mapping[str, Any]) -> None:
        self.records.append({"run": self.label, **values})
        if self.run is not None:
            self.run.log(self.records[-1])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.eval_every is None:
            self.eval_every = max(1, math.ceil(state.max_steps / 5))
        self.show.begin(state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _wait_for_device()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _wait_for_device()
        self.durations.append(time.perf_counter() - self._began)
        due = bool(self.eval_every) and state.global_step % self.eval_every == 0
        if self.measure is not None and (due or state.global_step == state.max_steps):
            self.held_out = self.measure()
            self.record({"step": state.global_step, "held_out_loss": self.held_out})
        self.show.step(state.global_step, held_out=self.held_out)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        # The trainer's closing line has totals only.
        if logs and "loss" in logs:
            if not math.isfinite(float(logs["loss"])):
                raise TrainingError(
                    f"The loss of {self.label} is {logs['loss']} at step {state.global_step}: training has diverged; "
                    f"lower learning_rate ({args.learning_rate:g}), or train in float32 or bfloat16 if this is float16."
                )
            seconds = {"step_seconds": self.durations[-1]} if self.durations else {}
            self.record({"step": state.global_step, **logs, **seconds})
            self.show.step(state.global_step, loss=logs["loss"])


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Show:
    """Progress: a live bar in a terminal, about ten plain lines in a file or pipe, nothing without a console."""

    def __init__(self, label: str, console: Console | None) -> None:
        self.label, self.console = label, console
        self.loss: float | None = None
        self.held_out: float | None = None
        self._progress: Progress | None = None
        self._task: Any = None
        self._total = 0
        self._printed = -1

    def begin(self, total: int, done: int) -> None:
        self._total = total
        if self.console is None:
            return
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                console=self.console,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task(self.label, total=total, completed=done, told="")

    def step(self, step: int, *, loss: float | None = None, held_out: float | None = None) -> None:
        self.loss = self.loss if loss is None else loss
        self.held_out = self.held_out if held_out is None else held_out
        told = "  ".join(
            f"{name} {value:.4f}"
            for name, value in (("loss", self.loss), ("held out", self.held_out))
            if value is not None
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=step, told=told)
        elif self.console is not None and loss is not None and self._due(step):
            self._printed = step
            self.console.print(
                f"{self.label}: step {step}/{self._total}  {told}", highlight=False, markup=False
            )

    def _due(self, step: int) -> bool:
        return self._printed < 0 or step - self._printed >= max(1, self._total // 10) or step == self._total

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def last_checkpoint(folder: Path, *, needs: str | None = None) -> Path | None:
    """The newest checkpoint in a folder that was written to its end; None if there is none.

    A run may be killed while it writes a checkpoint, so the newest folder is not always a whole one.

    Args:
        folder: What holds the checkpoints.
        needs: A further file that a whole one has.
    """
    if not folder.is_dir():
        return None
    numbered = [
        (int(found[1]), entry)
        for entry in folder.iterdir()
        if (found := re.fullmatch(r"checkpoint-(\d+)", entry.name)) and entry.is_dir()
    ]
    for _, entry in sorted(numbered, reverse=True):
        # The trainer writes its state last but for the arguments.
        if (entry / "trainer_state.json").exists() and _is_whole(entry) and (entry / (needs or "")).exists():
            return entry
    return None


def _is_whole(checkpoint: Path) -> bool:
    from dynalora.adapter.config import check_adapter_folder

    try:
        check_adapter_folder(str(checkpoint))
        for part in checkpoint.glob("model*.safetensors"):
            with safe_open(part, framework="pt"):
                pass
    except (CheckpointError, SafetensorError):
        return False
    # A full model's weights may lie in several files; their index is written last.
    weights = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
    return any((checkpoint / name).exists() for name in weights) and (checkpoint / "optimizer.pt").exists()


class _KeepPrompt(TrainerCallback):
    """Checkpoints of prompt learning that a run can go on from.

    PEFT saves the virtual tokens that come out of the prompt's encoder, which is all that inference needs; what trains
    are the encoder and its inputs.
    """

    FILE = "prompt_encoder.safetensors"

    def __init__(self, model: PeftModel, checkpoint: Path | None) -> None:
        self._model, self._checkpoint = model, checkpoint

    def _trained(self) -> dict[str, torch.Tensor]:
        named = self._model.named_parameters()
        return {name: parameter.data for name, parameter in named if parameter.requires_grad}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        target = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE
        with file_beside(target) as beside:
            save_file({name: tensor.contiguous() for name, tensor in self._trained().items()}, beside)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._checkpoint is not None:  # the trainer has loaded its part by now
            saved = load_file(self._checkpoint / self.FILE)
            for name, tensor in self._trained().items():
                tensor.copy_(saved[name])


def train_adapter(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PeftConfig | None,
    train_dataset: data.TokenizedSet,
    eval_dataset: data.TokenizedSet | None = None,
    *,
    settings: TrainSettings | None = None,
    run: RunFolder | None = None,
    label: str | None = None,
    console: Console | None = None,
    monitor: RetentionMonitor | None = None,
    collator: Any = None,
) -> TrainResult:
    """Attach an adapter to a base model and train it, train one that is attached already, or train the whole model.

    Args:
        model: The base model, without adapters. It is wrapped; `take_off(result.model)` gives it back unchanged.
            Without `config`, a model with an adapter, which is trained on with an optimizer and a schedule of its own;
            or one without, all of whose weights are trained (full fine-tuning) and then are no longer the base's.
        tokenizer: For padding.
        config: The adapter's configuration, PEFT's own included; None: the model has its adapter, or is to have none.
        train_dataset: What [`tokenize`][dynalora.lab.data.tokenize] returns.
        eval_dataset: Held-out set; None or empty: not measured.
        settings: How to train; None: the defaults.
        run: Where metrics and checkpoints go; if it was opened to resume, the last whole checkpoint is continued.
        label: Name of the run in metrics and progress; None: the method's name (`full` without an adapter).
        console: Where progress is shown; None: nowhere.
        monitor: Follows how much is left of the base model. If it keeps the best state and has no score, the held-out
            loss is what it goes by.
        collator: Makes batches of rows that are no conversations; without held-out set only. None: pads conversations.

    Returns:
        The trained model with its measurements.

    Raises:
        ConfigError: Full fine-tuning of weights in half precision that cannot be trained, or of quantised ones, or with
            a monitor, for which there is no base model left.
        DataError: The training set is empty.
        TrainingError: The loss is no longer a number.
    """
    how = settings or TrainSettings()
    if len(train_dataset) == 0:
        raise DataError("The training set is empty; give at least one row.")
    set_seed(how.seed)
    caching = getattr(model.config, "use_cache", None)
    adapted: Any = model if config is None else peft.get_peft_model(model, config)
    prompts = False
    if isinstance(adapted, peft.PeftModel):
        kind = adapted.active_peft_config.peft_type
        prompts = prompt_only(adapted.active_peft_config)
        name = label or str(getattr(kind, "value", kind)).lower()
        trainable, parameters = adapted.get_nb_trainable_parameters()
    else:
        _train_all(adapted, monitor)
        name = label or "full"
        trainable = parameters = sum(parameter.numel() for parameter in adapted.parameters())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    device_is_cuda = torch.cuda.is_available()
    has_eval = eval_dataset is not None and len(eval_dataset) > 0

    def measure() -> float:
        assert eval_dataset is not None
        return held_out_loss(adapted, eval_dataset, batch_size=how.batch_size)

    checkpoint = None
    if run is not None and run.resumed:
        checkpoint = last_checkpoint(run.checkpoints, needs=_KeepPrompt.FILE if prompts else None)
    records: list[dict[str, Any]] = []
    if run is not None and run.resumed:
        done = int(checkpoint.name.rsplit("-", 1)[-1]) if checkpoint is not None else -1
        run.forget_metrics_after(done)
        records = [record for record in run.metrics() if record.get("run") == name]
        if monitor is not None and monitor.path is not None and checkpoint is None and run.writable:
            monitor.path.unlink(missing_ok=True)  # the run begins anew
    saves = run is not None and how.save_every != 0
    # The trainer makes its output folder even if it saves nothing.
    scratch = tempfile.TemporaryDirectory(prefix="dynalora-")
    output = str(run.checkpoints) if run is not None and how.save_every != 0 else scratch.name
    checkpointing: dict[str, Any] = {}
    if how.gradient_checkpointing:
        checkpointing = {_CHECKPOINTING: True, f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=how.steps if how.steps is not None else -1,
        num_train_epochs=how.epochs,
        per_device_train_batch_size=how.batch_size,
        gradient_accumulation_steps=how.gradient_accumulation,
        learning_rate=how.learning_rate,
        lr_scheduler_type=how.schedule,
        warmup_steps=how.warmup,
        weight_decay=how.weight_decay,
        max_grad_norm=how.max_grad_norm,
        seed=how.seed,
        fp16=next(model.parameters()).dtype == torch.float16,
        **checkpointing,
        logging_steps=how.log_every if how.log_every is not None else 0.01,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saves else "no",
        save_steps=how.save_every if how.save_every else 0.1,
        save_total_limit=2,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level_replica="error",  # one process speaks for all
        remove_unused_columns=False,
        label_names=["labels"],
        # Said outright, since several CPU processes would otherwise each train alone.
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=device_is_cuda,
    )
    if collator is None and is_encoder_decoder(adapted):
        collator = Seq2SeqCollator(pad)
    if collator is None:
        collator = data.Collator(
            pad,
            pad_to_multiple_of=8 if device_is_cuda else 1,
            # DataParallel would deal out the positions among its devices as if they were rows.
            last_logits=takes_last_logits(adapted) and arguments.n_gpu <= 1,
        )
    show = _Show(name, console)
    recorder = _Recorder(name, run, show, measure if has_eval else None, how.eval_every, records)
    if monitor is not None and monitor.keep_best and monitor.score is None and has_eval:
        monitor.score = lambda _: measure()
    kind_of_optimizer, optimizer_settings = Trainer.get_optimizer_cls_and_kwargs(arguments, adapted)
    own_optimizer = optimizer_of(
        adapted, kind_of_optimizer, {**optimizer_settings, "weight_decay": how.weight_decay}
    )
    callbacks = [DriveBaseline(), *([_KeepPrompt(adapted, checkpoint)] if prompts else []), recorder]
    trainer = Trainer(
        model=adapted,
        args=arguments,
        optimizers=(own_optimizer, None),
        train_dataset=train_dataset,
        data_collator=collator,
        processing_class=tokenizer,
        # Called before the recorder, so that a step's time contains what the method does in it.
        callbacks=[*callbacks, *([monitor] if monitor is not None else [])],
    )
    trainer.remove_callback(PrinterCallback)
    # The trainer has put the model on its device by now.
    before = next((r["held_out_loss"] for r in records if r.get("step") == 0 and "held_out_loss" in r), None)
    if has_eval and before is None:
        before = measure()
        recorder.record({"step": 0, "held_out_loss": before})
    began = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        show.end()
        scratch.cleanup()
        if caching is not None:
            adapted.config.use_cache = caching
        if how.gradient_checkpointing:
            getattr(model, f"{_CHECKPOINTING}_disable")()
    seconds = time.perf_counter() - began
    adapted.eval()
    timed = recorder.durations[UNTIMED_STEPS:]
    quartiles = tuple(statistics.quantiles(timed, n=4)[::2]) if len(timed) > 1 else None
    after = recorder.held_out
    if has_eval and after is None:  # nothing left to train after a resume
        after = next((r["held_out_loss"] for r in reversed(records) if "held_out_loss" in r), None)
    if has_eval and monitor is not None:
        done = int(trainer.state.global_step)
        if monitor.best is not None and monitor.best.step != done:
            after = measure()  # of the weights that were put back
        elif monitor.stopping:
            after = measure()
            recorder.record({"step": done, "held_out_loss": after})
    return TrainResult(
        model=adapted,
        label=name,
        held_out_before=before,
        held_out_after=after,
        trainable_parameters=int(trainable),
        parameters=int(parameters),
        steps=int(trainer.state.global_step),
        step_seconds=statistics.median(timed) if timed else None,
        step_seconds_quartiles=quartiles,  # type: ignore[arg-type]
        seconds=seconds,
        records=records,
    )


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, run: RunFolder, *, name: str = "adapter"
) -> Path:
    """Save an adapter with its tokenizer into a run folder, all or nothing; returns the folder."""
    with run.replacing(name) as folder:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    return run.path / name


def _train_all(model: nn.Module, monitor: RetentionMonitor | None) -> None:
    """Make every weight of a model train."""
    if monitor is not None:
        raise ConfigError(
            "Full fine-tuning leaves no base model to compare with while it trains; leave the monitor out, and measure "
            "with predictions that were made before."
        )
    if getattr(model, "is_quantized", False):
        raise ConfigError("Quantised weights cannot be trained; load the model in float32 or bfloat16.")
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ConfigError("Weights in float16 cannot be trained; load the model in float32 or bfloat16.")
    model.requires_grad_(True)


def take_off(model: PeftModel) -> PreTrainedModel:
    """The base model without its adapter and without PEFT's traces of one."""
    prompts = prompt_only(model.active_peft_config)
    base: PreTrainedModel = model.get_base_model() if prompts else model.unload()  # type: ignore[assignment]
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in base.__dict__:
            delattr(base, name)
    return base
