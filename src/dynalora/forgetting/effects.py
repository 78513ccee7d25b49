"""What an adapter's update does on text: the second moments of its narrow activations, as the adapted model runs.

A matrix whose components weigh alike need not use them alike: what counts is how far they move the layer's output on
the inputs that come by. With C = E[x xᵀ] of these inputs, E‖s·ΔW·x‖² = ‖s·ΔW·C^½‖_F². Its singular values follow from
M = E[m mᵀ], m = d ⊙ down(x), which is small, and exact also for gates, which differ from token to token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dynalora.adapter.experts import ExpertMatrix
from dynalora.adapter.layer import AdapterLayer
from dynalora.common.devices import device_of
from dynalora.common.names import plain_name
from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError, DynaloraError
from dynalora.evaluation.generation import evaluating
from dynalora.forgetting.landscape import low_rank_update, require_one_adapter
from dynalora.forgetting.passes import counted_tokens, forward_options, placed_inputs, token_batches


@torch.no_grad()
def narrow_moments(
    model: nn.Module,
    texts: Iterable[str] | Iterable[dict[str, Any]],
    tokenizer: Any = None,
    *,
    batch_size: int = 8,
    max_length: int = 512,
    adapter_name: str | None = None,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """Second moments of every adapted matrix's narrow activations on text, for the landscape of an update's effect.

    Args:
        model: Model with an adapter of dynalora, or PEFT's LoRA or AdaLoRA, which is active.
        texts: Texts, with a tokenizer; or batches ready for `model(**batch)`, as for
            [`record_gates`][dynalora.record_gates]: `attention_mask` and `labels` say which tokens count.
        tokenizer: A transformers tokenizer, needed for texts.
        batch_size: Texts per pass.
        max_length: Tokens at which a text is cut.
        adapter_name: Which adapter; None takes the active one.
        progress: Called with the number of texts that were read.

    Returns:
        Module name → M, (k, k) float64, for `rank_landscape(model, effects=…)`. Matrices whose inputs
        cannot be told apart by tokens are left out: those of convolutions, and of experts unless every token counts.

    Raises:
        ConfigError: Texts without a tokenizer, or no text at all.
        DynaloraError: The model has no adapter with low-rank factors.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    unplaced: set[str] = set()
    counted = torch.zeros(0, dtype=torch.bool)

    def watch(name: str, narrow: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = torch.arange(len(counted), device=counted.device)
            row_of = rows.reshape(-1, *[1] * (counted.dim() - 1)).expand(counted.shape)
            placed = placed_inputs(module, inputs[0], counted, row_of, counted.reshape(len(counted), -1).any(1))
            if placed is None and not (_is_expert(module) and bool(counted.all())):
                unplaced.add(name)
                return
            m = narrow(inputs[0] if placed is None else placed[0]).double()
            sums[name] = sums.get(name, torch.zeros((), dtype=m.dtype, device=m.device)) + m.mT @ m
            counts[name] = counts.get(name, 0) + len(m)

        return see

    layers = {
        name: (module, update)
        for name, module in model.named_modules()
        if (update := low_rank_update(module, adapter_name)) is not None
    }
    if not layers:
        raise DynaloraError("the model has no adapter with low-rank factors whose effect could be measured.")
    for _, update in layers.values():
        require_one_adapter(update)
    hooks = [
        module.register_forward_pre_hook(watch(name, _narrow(module, update.adapter, update.down)))
        for name, (module, update) in layers.items()
    ]
    options = forward_options(model, [module for module, _ in layers.values()])
    device, seen = device_of(model), 0
    try:
        with evaluating(model):
            for batch, count, total in token_batches(texts, tokenizer, batch_size, max_length):
                batch = {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
                counted = counted_tokens(batch)
                model(**{k: v for k, v in batch.items() if k != "labels"}, **options)
                seen += count
                progress("Measuring the update's effect", seen, total or None)
    finally:
        for hook in hooks:
            hook.remove()
    if unplaced and not counts:
        raise ConfigError(
            f"{len(unplaced)} layers get inputs that cannot be told apart by tokens, as those of experts and "
            "convolutions, so their effect cannot be measured; for experts give texts without padding and without "
            "masked tokens (batch_size=1, no labels)."
        )
    if not any(counts.values()):
        raise ConfigError("no tokens to measure an effect on: the texts are empty, or all tokens are masked.")
    return {plain_name(name): (total / counts[name]).cpu() for name, total in sums.items() if name not in unplaced}


def _is_expert(module: nn.Module) -> bool:
    """Whether a layer is of one expert, which gets the tokens that are sent to it."""
    return isinstance(module, AdapterLayer) and isinstance(module.get_base_layer(), ExpertMatrix)


def _narrow(module: nn.Module, adapter: str, down: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gives m(x), (tokens, k), for inputs x (tokens, in)."""
    if isinstance(module, AdapterLayer) and module.depends_on_input(adapter):
        return lambda x: module.narrow(x, adapter)
    if isinstance(module, AdapterLayer) and (kind := module.layer_kind) is not None:
        return lambda x: kind.multiply(module.get_base_layer(), x, [down.detach()])
    wide = down.detach().to(torch.promote_types(down.dtype, torch.float32)).mT
    return lambda x: x.to(wide.dtype) @ wide
