"""Attach one adapter to a base model and train it: the part that every experiment shares.

Training is transformers' Trainer with PEFT; this package adds what an experiment wants to know of it: the held-out
loss, the step time, a record of everything logged, and checkpoints that a killed run continues from.
"""

from __future__ import annotations

import inspect
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peft
import torch
from rich.console import Console
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from dynalora.common.names import IGNORED_LABEL
from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.scoring import answer_loss
from dynalora.evaluation.seq2seq import Seq2SeqCollator, is_encoder_decoder
from dynalora.evaluation.tokens import TokenizedSet
from dynalora.forgetting.monitor import RetentionMonitor
from dynalora.lab.baselines import DriveBaseline, optimizer_of, prompt_only
from dynalora.lab.data.collator import Collator
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.training.checkpoints import KeepPrompt, last_checkpoint
from dynalora.lab.training.recorder import UNTIMED_STEPS, Display, Recorder
from dynalora.lab.training.settings import TrainSettings

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# transformers renamed the setting; the old name warns in new versions, the new one is unknown to old ones.
_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


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


def held_out_loss(model: nn.Module, rows: TokenizedSet, *, batch_size: int = 8) -> float:
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
        checkpoint = last_checkpoint(run.checkpoints, needs=KeepPrompt.FILE if prompts else None)
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
        collator = Collator(
            pad,
            pad_to_multiple_of=8 if device_is_cuda else 1,
            # DataParallel would deal out the positions among its devices as if they were rows.
            last_logits=takes_last_logits(adapted) and arguments.n_gpu <= 1,
        )
    show = Display(name, console)
    recorder = Recorder(name, run, show, measure if has_eval else None, how.eval_every, records)
    if monitor is not None and monitor.keep_best and monitor.score is None and has_eval:
        monitor.score = lambda _: measure()
    kind_of_optimizer, optimizer_settings = Trainer.get_optimizer_cls_and_kwargs(arguments, adapted)
    own_optimizer = optimizer_of(
        adapted, kind_of_optimizer, {**optimizer_settings, "weight_decay": how.weight_decay}
    )
    callbacks = [DriveBaseline(), *([KeepPrompt(adapted, checkpoint)] if prompts else []), recorder]
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
