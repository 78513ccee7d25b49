"""Bring a forgotten task back from a few examples (RLGR, DiRA §5.1–5.2), and switch parts of an adapter off (App. B.3).

An adapter was trained on Task A and then on Task B, which made it forget A. Recovery looks at the rank landscape that
it had after A. Matrices whose effective rank was 0 or 1 there mattered little to A; what B has written into them is
taken out again, and then the whole adapter is trained on a few examples of A:

    rlgr      ΔW_l ← 0 for every l with k_l(τ) ∈ {0, 1} after Task A, then train
    random    ΔW_l ← 0 for as many l, drawn with a seed, then train
    naive     train

All of it works on any adapter of dynalora and on PEFT's LoRA, in a loaded model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dynalora.adapter.layer import AdapterLayer
from dynalora.common.names import plain_name
from dynalora.common.private import without_updates
from dynalora.common.progress import Progress, counted, silent
from dynalora.driver import param_groups, restart_schedule
from dynalora.errors import ConfigError, DataError, DynaloraError, TrainingError, UnsupportedError
from dynalora.forgetting.defaults import STRATEGIES as STRATEGIES
from dynalora.forgetting.landscape import LandscapeRow, layer_index

LOW_RANK = 1
"""The largest effective rank at which a matrix is taken to have mattered little (DiRA §5.1: 0 or 1)."""


# --- which matrices -----------------------------------------------------------------------------------------


def low_rank_modules(landscape: Sequence[LandscapeRow], *, tau: float | None = None) -> list[str]:
    """Names of the matrices whose effective rank is 0 or 1.

    Args:
        landscape: Of the adapter after Task A, from [`rank_landscape`][dynalora.rank_landscape].
        tau: Count singular values of s·ΔW above this; None: the landscape's own effective ranks.

    Returns:
        Module names, in the landscape's order.

    Raises:
        ConfigError: `tau` is negative.
    """
    if tau is not None and not tau >= 0:
        raise ConfigError(f"tau is {tau}; give a number of at least 0.")
    return [
        row.module
        for row in landscape
        if (row.effective_rank if tau is None else sum(value > tau for value in row.singular_values)) <= LOW_RANK
    ]


def modules_to_zero(
    strategy: str, landscape: Sequence[LandscapeRow] | None, *, tau: float | None = None, seed: int = 0
) -> list[str]:
    """The matrices that a recovery begins by zeroing.

    Args:
        strategy: `"rlgr"`: those of effective rank 0 or 1; `"random"`: as many, drawn from all; `"naive"`: none.
        landscape: Of the adapter after Task A; `"naive"` needs none.
        tau: Threshold on singular values, as in
            [`low_rank_modules`][dynalora.forgetting.recovery.low_rank_modules].
        seed: Fixes the draw.

    Returns:
        Module names, in the landscape's order.

    Raises:
        ConfigError: The strategy is unknown, or it needs a landscape and there is none.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy is '{strategy}'; choose one of {', '.join(STRATEGIES)}.")
    if strategy == "naive":
        return []
    if not landscape:
        raise ConfigError(f"The strategy '{strategy}' needs the landscape after Task A; pass its rows.")
    low = low_rank_modules(landscape, tau=tau)
    if strategy == "rlgr":
        return low
    names = [row.module for row in landscape]
    drawn = set(random.Random(seed).sample(names, len(low)))
    return [name for name in names if name in drawn]


@torch.no_grad()
def zero_updates(model: nn.Module, modules: Sequence[str], adapter_name: str | None = None) -> None:
    """Make the updates of some matrices zero for good; they can be trained again.

    Of PEFT's LoRA, DiRA, DISeL and PE-DyRA the up factor (LoRA's B) becomes zero, of AdaLoRA the singular values;
    DisLoRA's factors go back to their start, which is the zero update.

    Args:
        model: Model with an adapter of dynalora or a PEFT LoRA.
        modules: Names of the matrices, as a landscape has them.
        adapter_name: Which adapter; None: the active one.

    Raises:
        DynaloraError: A name belongs to no matrix of the adapter; then nothing is changed.
        UnsupportedError: The adapter is merged, or the update has a part besides its factors (PEFT's DoRA, biases).
    """
    layers = {
        name: (module, adapter) for name, module in _tuner_layers(model) for adapter in _adapters(module, adapter_name)
    }
    missing = [name for name in modules if name not in layers]
    if missing:
        raise DynaloraError(
            f"The adapter has no matrix '{missing[0]}' ({len(missing)} of {len(modules)} are missing); "
            "give a landscape of the same adapter."
        )
    chosen = [layers[name] for name in modules]
    for module, adapter in chosen:
        _refuse_unzeroable(module, adapter)
    for module, adapter in chosen:
        if isinstance(module, AdapterLayer):
            module.zero_update(adapter)
        else:
            lora: Any = module
            # AdaLoRA keeps its directions orthogonal and starts with singular values of zero.
            (lora.lora_E[adapter] if hasattr(lora, "lora_E") else lora.lora_B[adapter].weight).zero_()


def _refuse_unzeroable(module: BaseTunerLayer, adapter: str) -> None:
    if module.merged:
        raise UnsupportedError("The adapter is merged into the base weights; call unmerge_adapter() first.")
    if isinstance(module, AdapterLayer):
        return
    lora: Any = module
    if hasattr(lora, "lora_E"):
        return
    if adapter in getattr(lora, "lora_magnitude_vector", {}) or lora.lora_B[adapter].bias is not None:
        raise UnsupportedError(
            f"The LoRA adapter '{adapter}' changes more than its two factors (use_dora or lora_bias), so zeroing "
            "one of them does not undo its update; train it without."
        )


def _adapters(module: BaseTunerLayer, adapter_name: str | None) -> list[str]:
    """The adapters with low-rank factors that are meant, of one layer."""
    names = module.active_adapters if adapter_name is None else [adapter_name]
    known = module.scaling if isinstance(module, AdapterLayer) else getattr(module, "lora_B", {})
    return [adapter for adapter in names if adapter in known]


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """All adapted layers with their names in the base model."""
    for name, module in _outside_of_adapters(model):
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _outside_of_adapters(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, without what adapted layers are made of."""
    yield plain_name(name), module
    if not isinstance(module, BaseTunerLayer):
        for child_name, child in module.named_children():
            yield from _outside_of_adapters(child, f"{name}.{child_name}" if name else child_name)


# --- recovery -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recovery:
    """What a recovery did.

    Attributes:
        strategy: `rlgr`, `random` or `naive`.
        zeroed: Names of the matrices whose updates were zeroed before training.
        losses: Training loss of each optimizer step, as the model gives it.
    """

    strategy: str
    zeroed: tuple[str, ...]
    losses: tuple[float, ...]


def recover(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    strategy: str = "rlgr",
    landscape: Sequence[LandscapeRow] | None = None,
    tau: float | None = None,
    epochs: int = 2,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    progress: Progress = silent,
) -> Recovery:
    """Recover a forgotten task on a few of its examples (DiRA §5.2).

    Zeroes what the strategy says, then trains everything that is trainable with AdamW at a constant learning rate,
    one optimizer step per batch. The paper takes 8 examples in one batch, twice.

    Args:
        model: The model after Task B, its active adapter trainable. It is changed in place and left in evaluation mode.
        batches: What the model is called with, labels included, so that its output has a `loss`.
        strategy: `"rlgr"`, `"random"` or `"naive"`; see
            [`modules_to_zero`][dynalora.forgetting.recovery.modules_to_zero].
        landscape: Of the adapter after Task A; not needed for `"naive"`.
        tau: Threshold on singular values; None: the landscape's own.
        epochs: Passes over the batches.
        learning_rate: Of AdamW; gates and the like get their usual multiple.
        weight_decay: Of the factors.
        max_grad_norm: Gradients are scaled down to this norm; 0: never.
        seed: Of the random choice of matrices and of dropout.
        progress: Called after every step.

    Returns:
        What was zeroed, and the losses.

    Raises:
        ConfigError: A setting is out of range, the strategy is unknown or lacks its landscape, or nothing is trainable.
        DataError: There is no batch.
        TrainingError: The loss is no longer a number.
        DynaloraError: As [`zero_updates`][dynalora.forgetting.recovery.zero_updates].
    """
    if epochs < 1:
        raise ConfigError(f"epochs is {epochs}; give a whole number of at least 1.")
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate is {learning_rate}; give a number above 0.")
    if not batches:
        raise DataError("There is no batch to recover from; give at least one.")
    zeroed = modules_to_zero(strategy, landscape, tau=tau, seed=seed)
    groups = param_groups(model, learning_rate, weight_decay)
    if not groups:
        raise ConfigError("Nothing in the model is trainable; load the adapter with is_trainable=True.")
    zero_updates(model, zeroed)
    total = epochs * len(batches)
    restart_schedule(model, total)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    device = parameters[0].device
    losses: list[float] = []
    model.train()
    try:
        for batch in counted([*batches] * epochs, f"Recovering ({strategy})", progress):
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            losses.append(float(loss.detach()))
            if not losses[-1] < float("inf"):
                raise TrainingError(
                    f"The loss is {losses[-1]} at step {len(losses)} of recovery: it has diverged; "
                    f"lower learning_rate ({learning_rate:g})."
                )
            loss.backward()
            if max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        model.eval()
    return Recovery(strategy, tuple(zeroed), tuple(losses))


# --- ablation -----------------------------------------------------------------------------------------------


@contextmanager
def ablated(model: nn.Module, layers: str | Sequence[int]) -> Iterator[list[str]]:
    """The model without its adapters' updates in some layers (DiRA App. B.3); afterwards it is as it was, bit for bit.

    No weight is touched: the adapted layers compute what their base layers do. That holds for every PEFT adapter
    that wraps layers. Weights outside of blocks, trained biases and modules trained in full stay in effect.

    Args:
        model: A model with one or more adapters, not merged.
        layers: `"front"`: the first half of the transformer blocks (of an odd number, the smaller half); `"back"`:
            the others; or indices of blocks, from 0.

    Yields:
        Names of the matrices that are switched off.

    Raises:
        ConfigError: `layers` is no known word, names no block or one that the model does not have, or the model
            has no numbered blocks.
        DynaloraError: There is nothing to switch off there.
        UnsupportedError: An adapter is merged into the base weights.

    Example:
        ```python
        with ablated(model, "front"):
            back_only = evaluate(model, tokenizer, rows)
        ```
    """
    chosen = ablated_layers(model, layers)
    matches = [(name, layer) for name, layer in _tuner_layers(model) if layer_index(name) in chosen]
    if not matches:
        listed = ", ".join(map(str, chosen))
        raise DynaloraError(
            f"No adapter changes the layers {listed}; choose layers that have one, or attach an adapter."
        )
    for name, layer in matches:
        if layer.merged:
            raise UnsupportedError(
                f"The adapter is merged into the base weight of '{name}'; call unmerge_adapter() first."
            )
    with without_updates([layer for _, layer in matches]):
        yield [name for name, _ in matches]


def ablated_layers(model: nn.Module, layers: str | Sequence[int]) -> list[int]:
    """The indices of transformer blocks that [`ablated`][dynalora.forgetting.recovery.ablated] takes `layers` for."""
    indices = [layer_index(name) for name, _ in _outside_of_adapters(model)]
    count = max((index for index in indices if index is not None), default=-1) + 1
    if count == 0:
        raise ConfigError("The model has no numbered layers to switch off.")
    if isinstance(layers, str):
        halves = {"front": range(count // 2), "back": range(count // 2, count)}
        if layers not in halves:
            raise ConfigError(f"layers is '{layers}'; give front, back, or a list of layer indices.")
        return list(halves[layers])
    chosen = sorted(set(layers))
    wrong = [index for index in chosen if not 0 <= index < count]
    if wrong or not chosen:
        problem = f"names layer {wrong[0]}" if wrong else "is empty"
        raise ConfigError(f"layers {problem}; give indices from 0 to {count - 1}.")
    return chosen
