"""A start of LoRA in directions that the base model does not use, as LoRA-Null takes it.

LoRA-Null (Tang et al., 2025) lets the down-projection begin in the null space of the inputs that a layer gets on text
whose knowledge is to be kept, so that the first steps hardly change what the model says there. Here the text is the
base model's own, of other openings than retention is measured on, and nothing is taken from the base weights: the
rows of `A` are the r directions of least energy of C = E[x xᵀ], as long as PEFT's own rows, and `B` is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import nn

from dynalora.forgetting.passes import pass_rows
from dynalora.forgetting.texts import anchor_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class LoraNullConfig(peft.LoraConfig):
    """PEFT's LoRA, for [`start_in_null_space`][dynalora.lab.null_space.start_in_null_space]; saved as a LoRA."""


def start_in_null_space(model: peft.PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a fresh LoRA's down-projections begin where the base model's inputs have least energy.

    Memory: one (in × in) matrix of float32 for each input that adapted layers read, which is much on large models.

    Args:
        model: A causal language model with a LoRA of PEFT on linear layers, untrained.
        tokenizer: The model's.
    """
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and module.lora_A
    }
    moments = input_moments(model, layers, anchor_text(model, tokenizer).rows)
    rows: dict[int, torch.Tensor] = {}  # layers with a common input have one decomposition
    for name, layer in layers.items():
        moment = moments[name]
        if id(moment) not in rows:
            # Ascending eigenvalues: the first columns are the directions that carry least.
            rows[id(moment)] = torch.linalg.eigh(moment)[1].mT
        for down in layer.lora_A.values():
            weight: Any = down.weight
            length = math.sqrt(1 / 3)  # of PEFT's rows, whose entries are uniform within ± 1/√in
            with torch.no_grad():
                weight.copy_(rows[id(moment)][: weight.shape[0]] * length)


def input_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], texts: tuple[tuple[int, ...], ...]
) -> dict[str, torch.Tensor]:
    """E[x xᵀ], (in, in), of each layer's inputs over the tokens of texts, with adapters off.

    Args:
        model: The model.
        layers: Some of its layers, by name.
        texts: Token ids of each text.

    Returns:
        The moment by the layer's name; layers that read the same tensor share one.
    """
    moments: dict[str, torch.Tensor] = {}
    last: list[Any] = [None, ""]  # the input that was read last, and who read it

    def hook(name: str) -> Any:
        def read(_module: nn.Module, given: tuple[Any, ...]) -> None:
            x: torch.Tensor = given[0]
            if last[0] is x and (name not in moments or moments[name] is moments[last[1]]):
                moments[name] = moments[last[1]]
                return
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            if name not in moments:
                moments[name] = flat.new_zeros(flat.shape[1], flat.shape[1])
            moments[name].addmm_(flat.mT, flat)
            last[:] = [x, name]

        return read

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        pass_rows(model, texts)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(len(row) for row in texts)
    for moment in {id(moment): moment for moment in moments.values()}.values():
        moment /= tokens
    return moments
