"""Attach one adapter to a base model and train it: the part that every experiment shares.

Training is transformers' Trainer with PEFT; this package adds what an experiment wants to know of it: the held-out
loss, the step time, a record of everything logged, and checkpoints that a killed run continues from.
"""

from __future__ import annotations

import inspect
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel
from rich.console import Console
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dynalora.adapter.config import AdapterConfig
from dynalora.common.attention import attention_over_padding
from dynalora.common.names import IGNORED_LABEL
from dynalora.common.private import take_off_trainers_autocast
from dynalora.errors import ConfigError, DataError, DynaloraError, TrainingError
from dynalora.evaluation.generation import padding_id
from dynalora.evaluation.scoring import answer_loss
from dynalora.evaluation.seq2seq import Seq2SeqCollator, is_encoder_decoder
from dynalora.evaluation.tokens import TokenizedSet, Tokens
from dynalora.forgetting.monitor import RetentionMonitor
from dynalora.lab.baselines import DriveBaseline, finish_start, optimizer_of, prepare_start, prompt_only
from dynalora.lab.configs import method_name
from dynalora.lab.data.collator import Collator
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.training.best import AtSteps, KeepBest
from dynalora.lab.training.checkpoints import KeepPrompt, NothingLeft, StopAtEnd, last_checkpoint
from dynalora.lab.training.recorder import Display, Recorder
from dynalora.lab.training.reporting import tracker_files
from dynalora.lab.training.settings import TrainSettings

# transformers renamed the setting; the old name warns in new versions, the new one is unknown to old ones.
_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)

MEASURED_AFTER = ("retention", "scaled", "samples", "continued")
"""Keys of the records that jobs make of a model when its training has ended."""


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
        stopped: Whether the run ended early because the held-out loss did not fall any more.
        best_step: The step whose weights were put back; None: the best were not kept, or nothing was scored.
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
    best_step: int | None = None
    stopped: bool = False


def held_out_loss(model: nn.Module, rows: TokenizedSet, *, batch_size: int = 8) -> float:
    """Mean loss over all response tokens of a set, in nats per token; every token counts the same.

    Raises:
        DataError: No row has a response token.
    """
    scored = answered(rows)
    if not scored:
        raise DataError("The held-out set has no response token; give other evaluation data.")
    return answer_loss(model, scored, batch_size=batch_size).mean


def answered(rows: TokenizedSet) -> list[Tokens]:
    """The rows of a set that have a response token."""
    return [row for row in rows.rows if any(label != IGNORED_LABEL for label in row["labels"][1:])]


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


def _adapted(model: Any, config: peft.PeftConfig) -> Any:
    """The model with an adapter; what PEFT says of settings of its own methods is said in a sentence."""
    try:
        return peft.get_peft_model(model, config)
    except DynaloraError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError, AssertionError) as error:
        if isinstance(config, AdapterConfig):
            raise
        kind, said = type(config).__name__, " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ConfigError(
            f"PEFT does not take these settings of {kind} ({said}); correct the method's options, or leave them out."
        ) from error


def train_adapter(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PeftConfig | None,
    train_dataset: TokenizedSet,
    eval_dataset: TokenizedSet | None = None,
    *,
    settings: TrainSettings | None = None,
    run: RunFolder | None = None,
    label: str | None = None,
    console: Console | None = None,
    monitor: RetentionMonitor | None = None,
    best: KeepBest | None = None,
    at_steps: AtSteps | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    collator: Any = None,
) -> TrainResult:
    """Attach an adapter to a base model and train it, train one that is attached already, or train the whole model.

    Args:
        model: The base model, without adapters. It is wrapped; `take_off(result.model)` gives it back unchanged.
            Without `config`, a model with an adapter, which is trained on with an optimizer and a schedule of its own;
            or one without, all of whose weights are trained (full fine-tuning) and then are no longer the base's.
        tokenizer: For padding.
        config: The adapter's configuration, PEFT's own included; None: the model has its adapter, or is to have none.
        train_dataset: What [`tokenize`][dynalora.evaluation.tokens.tokenize] returns.
        eval_dataset: Held-out set; None or empty: not measured.
        settings: How to train; None: the defaults.
        run: Where metrics and checkpoints go; if it was opened to resume, the last whole checkpoint is continued.
        label: Name of the run in metrics and progress; None: the method's name (`full` without an adapter).
        console: Where progress is shown; None: nowhere.
        monitor: Follows how much is left of the base model. If it keeps the best state and has no score, the held-out
            loss is what it goes by.
        best: Keeps the best weights and puts them back at the end.
        at_steps: Does something at regular steps; with `best`, it may score the weights there.
        callbacks: Further callbacks of the trainer, which come last.
        collator: Makes batches of rows that are no conversations; without held-out set only. None: pads conversations.

    Returns:
        The trained model with its measurements.

    Raises:
        ConfigError: Full fine-tuning of weights in half precision that cannot be trained, or of quantised ones, or with
            a monitor, for which there is no base model left; bf16 with weights in float16; the best weights are to be
            kept by a held-out loss, and nothing is held out.
        DataError: The training set is empty.
        TrainingError: The loss is no longer a number.
    """
    settings = settings or TrainSettings()
    half = next(model.parameters()).dtype == torch.float16
    if settings.bf16 and half:
        raise ConfigError("bf16 is set, and the weights are in float16; load the model in float32 or bfloat16.")
    if len(train_dataset) == 0:
        raise DataError("The training set is empty; give at least one row.")
    if settings.loss_on_prompts:
        train_dataset = train_dataset.with_prompts()
    set_seed(settings.seed)
    caching = getattr(model.config, "use_cache", None)
    prepare_start(model, config, tokenizer)
    adapted: Any = model if config is None else _adapted(model, config)
    if config is not None:
        finish_start(adapted, tokenizer)
    if not isinstance(adapted, peft.PeftModel):
        _train_all(adapted, monitor)
    adapter = adapted.active_peft_config if isinstance(adapted, peft.PeftModel) else None
    label = label or ("full" if adapter is None else method_name(adapter))
    trainable, parameters = _parameter_counts(adapted)
    measure = None
    if eval_dataset is not None and len(eval_dataset) > 0:
        measure = partial(held_out_loss, adapted, eval_dataset, batch_size=settings.batch_size)
        if monitor is not None and monitor.keep_best and monitor.score is None:
            monitor.score = lambda _, loss=measure: loss()
    if best is not None and best.by_held_out and measure is None:
        raise ConfigError("keep_best goes by the held-out loss, and no data are held out; give evaluation data.")
    checkpoint, records = _continued(run, label, adapted, monitor, console)
    patience = settings.early_stopping
    recorder = Recorder(label, run, Display(label, console), measure, settings.eval_every, records, best, patience)
    with tempfile.TemporaryDirectory(prefix="dynalora-") as scratch:
        arguments = _arguments(settings, run, scratch, half=half)
        with tracker_files(run):
            trainer = _trainer(adapted, tokenizer, train_dataset, arguments, collator)
        if settings.report_to:
            recorder.report = trainer.log_besides
        if prompt_only(adapter):
            trainer.add_callback(KeepPrompt(adapted, checkpoint))
        # After what the method does, so that a step's time contains it.
        trainer.add_callback(recorder)
        for callback in (monitor, at_steps, best, *callbacks):
            if callback is not None:
                trainer.add_callback(callback)
        trainer.add_callback(StopAtEnd(lambda: recorder.stuck or (monitor is not None and monitor.stopping)))
        # The trainer has put the model on its device by now.
        before = recorder.loss_before()
        began = time.perf_counter()
        try:
            with attention_over_padding():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        except TrainingError as error:
            # The adapter's driver stops at gradients that are no numbers, before the loss that they are of is logged.
            loss = float(trainer.last_loss)
            if not error.of_gradients or math.isfinite(loss):
                raise
            raise recorder.diverged(loss, trainer.state.global_step + 1, settings.learning_rate) from error
        except NothingLeft:
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        finally:
            recorder.display.end()
            if settings.bf16:
                take_off_trainers_autocast(adapted)  # so that loss after training is measured as the one before
            if caching is not None:
                adapted.config.use_cache = caching
            if settings.gradient_checkpointing:
                getattr(model, f"{_CHECKPOINTING}_disable")()
    seconds = time.perf_counter() - began
    adapted.eval()
    steps = int(trainer.state.global_step)
    after = recorder.loss_after(steps, monitor)
    step_seconds, quartiles = recorder.step_seconds()
    return TrainResult(
        model=adapted, label=label, held_out_before=before, held_out_after=after, trainable_parameters=trainable,
        parameters=parameters, steps=steps, step_seconds=step_seconds, step_seconds_quartiles=quartiles,
        seconds=seconds, records=records, best_step=best.best.step if best is not None and best.best else None,
        stopped=recorder.stuck and steps < trainer.state.max_steps,
    )  # fmt: skip


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


def _parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all parameters."""
    if isinstance(model, peft.PeftModel):
        trainable, parameters = model.get_nb_trainable_parameters()
        return int(trainable), int(parameters)
    number = sum(parameter.numel() for parameter in model.parameters())
    return number, number


def _continued(
    run: RunFolder | None, label: str, model: nn.Module, monitor: RetentionMonitor | None, console: Console | None
) -> tuple[Path | None, list[dict[str, Any]]]:
    """The checkpoint that a resumed run goes on from, and what it recorded until then."""
    if run is None or not run.resumed:
        return None, []
    prompts = isinstance(model, peft.PeftModel) and prompt_only(model.active_peft_config)
    say = partial(warnings.warn, stacklevel=3) if console is None else partial(console.print, markup=False)
    checkpoint = last_checkpoint(run.checkpoints, needs=KeepPrompt.FILE if prompts else None, say=say)
    step = -1 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    run.forget_metrics_after(step, again=MEASURED_AFTER)
    if monitor is not None and monitor.path is not None and checkpoint is None and run.writable:
        monitor.path.unlink(missing_ok=True)  # the run begins anew
    return checkpoint, [record for record in run.metrics() if record.get("run") == label]


def _arguments(settings: TrainSettings, run: RunFolder | None, scratch: str, *, half: bool) -> TrainingArguments:
    """The trainer's settings; `scratch` is where a run without checkpoints lets it make its folder."""
    saves = run is not None and settings.save_every != 0
    checkpointing: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        checkpointing = {_CHECKPOINTING: True, f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(run.checkpoints) if run is not None and saves else scratch,
        max_steps=settings.steps if settings.steps is not None else -1,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        fp16=half,
        bf16=settings.bf16,
        **checkpointing,
        logging_steps=settings.log_every if settings.log_every is not None else 0.01,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saves else "no",
        save_steps=settings.save_every or 0.1,
        save_total_limit=2,
        eval_strategy="no",
        report_to=settings.report_to or "none",
        run_name=run.path.name if run is not None else None,
        disable_tqdm=True,
        log_level_replica="error",  # one process speaks for all
        remove_unused_columns=False,
        label_names=["labels"],
        # Said outright, since several CPU processes would otherwise each train alone.
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class _LossTrainer(Trainer):
    """A trainer that has the loss of its last micro-batch at hand, a scalar that no device has been waited for."""

    last_loss: torch.Tensor | float = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward pass of a micro-batch."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.last_loss = loss
        return loss

    def log_besides(self, values: dict[str, float]) -> None:
        """Log something in a callback, which must not take the place of the step's own log line."""
        due = self.control.should_log
        self.log(values)
        self.control.should_log = due


def _trainer(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: TokenizedSet, arguments: TrainingArguments, collator: Any
) -> _LossTrainer:
    """A trainer with the method's optimizer and schedule of ranks, silent but for its callbacks."""
    if collator is None and is_encoder_decoder(model):
        collator = Seq2SeqCollator(padding_id(model, tokenizer))
    if collator is None:
        collator = Collator(
            padding_id(model, tokenizer),
            pad_to_multiple_of=8 if torch.cuda.is_available() else 1,
            # DataParallel would deal out the positions among its devices as if they were rows.
            last_logits=takes_last_logits(model) and arguments.n_gpu <= 1,
        )
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer = optimizer_of(model, optimizer_class, {**options, "weight_decay": arguments.weight_decay})
    trainer = _LossTrainer(
        model=model,
        args=arguments,
        optimizers=(optimizer, None),
        train_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[DriveBaseline()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def take_off(model: PeftModel) -> PreTrainedModel:
    """The base model without its adapter and without PEFT's traces of one."""
    prompts = prompt_only(model.active_peft_config)
    base: PreTrainedModel = model.get_base_model() if prompts else model.unload()  # type: ignore[assignment]
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in base.__dict__:
            delattr(base, name)
    return base
