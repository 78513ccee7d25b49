"""Preparing `retain`: the base model writes text, and the adapter's layers read it, before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from dynalora.common.progress import Progress, late_progress, silent
from dynalora.driver import drivers_of
from dynalora.forgetting.curvature import read_curvature
from dynalora.forgetting.texts import MeasuredText, anchor_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_retain(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: MeasuredText | None = None,
    *,
    progress: Progress = silent,
) -> None:
    """Make the adapters of a model ready for training with `retain`: a bare loop's one call.

    Args:
        model: A causal language model whose adapters have `retain`; others are left alone.
        tokenizer: The model's.
        text: What to keep; None: text that the base model writes itself
            ([`anchor_text`][dynalora.forgetting.texts.anchor_text]), once per base model, kept in the user's cache.
        progress: Called with the number of texts that were written and read.

    Raises:
        UnsupportedError: The model is no causal language model, or has an adapter merged into its weights.
    """
    adapters = [driver.adapter for driver, _ in drivers_of(model) if getattr(driver.config, "retain", None)]
    if not adapters:
        return
    anchors = text or anchor_text(model, tokenizer, progress=progress)
    for adapter in adapters:
        read_curvature(model, anchors, adapter, progress=progress)


class RetainCallback(TrainerCallback):
    """Prepares `retain` at the beginning of training; one of transformers' default callbacks."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        if model is None or not hasattr(processing_class, "all_special_ids"):
            return  # the first step says what is missing
        unread = [
            layer
            for driver, layers in drivers_of(model)
            if getattr(driver.config, "retain", None)
            for layer in layers
            if driver.adapter not in layer.curvatures
        ]
        if unread:
            with late_progress() as progress:
                prepare_retain(model, processing_class, progress=progress)
