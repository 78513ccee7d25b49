"""The base model inside an adapted one: its weights, a mark that tells it from others, and itself with adapters off."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from dynalora.common.devices import offloaded_weights
from dynalora.errors import UnsupportedError


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """The base model inside: adapters off, and afterwards on again unless they were off before."""
    context: AbstractContextManager[Any] = nullcontext()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(not layer.disable_adapters for layer in layers):
        if not isinstance(model, PeftModel):
            raise UnsupportedError(
                f"The model ({type(model).__name__}) has adapter layers but is no PeftModel, so they cannot be "
                "switched off; pass the model that get_peft_model() or PeftModel.from_pretrained() returned."
            )
        context = model.disable_adapter()
    elif isinstance(model, PeftModel) and not layers:
        context = model.disable_adapter()  # prompt learning has no layers to switch
    # PEFT makes every parameter of the active adapters trainable when it switches them on again.
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with context:
            yield
    finally:
        for parameter, trained in trains:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)


def fingerprint(model: torch.nn.Module) -> str:
    """A short mark of a model's base weights: equal for the same weights, whatever adapters are attached.

    It covers every weight's name, shape and dtype, and up to 1024 evenly spaced entries of each, which any
    fine-tuning changes; of bitsandbytes' 4-bit weights how often each of the 16 values occurs.
    """
    digest = hashlib.sha256()
    for name, value in sorted(base_weights(model), key=lambda pair: pair[0]):
        plain = value.detach()
        state = getattr(value, "quant_state", None)
        if state is not None:
            digest.update(f"{name} {tuple(state.shape)} 4-bit {_occurrences(plain).tolist()}\n".encode())
            continue
        # torchao's weights have no entries to take a view of.
        if type(plain).dequantize is not torch.Tensor.dequantize:
            plain = plain.dequantize()
        flat = plain.reshape(-1)
        step = max(1, flat.numel() // 1024)
        part = flat[::step][:1024].to("cpu")
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _occurrences(packed: torch.Tensor) -> torch.Tensor:
    """How often each 4-bit value occurs: (16,). On CPUs bitsandbytes packs weights in another order when first used."""
    pairs = torch.bincount(packed.reshape(-1).view(torch.uint8), minlength=256).view(16, 16)
    return pairs.sum(0) + pairs.sum(1)


def base_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name, as in the model without adapters, and value of every weight and buffer that is not an adapter's."""
    adapters = _adapter_ids(model)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, value in itertools.chain(inner.named_parameters(), inner.named_buffers()):
        if id(value) in adapters or _is_copy(name):
            continue
        if value.is_meta:
            module, _, leaf = name.rpartition(".")
            value = offloaded_weights(inner.get_submodule(module)).get(leaf, value)
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), value


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is saved of a model's adapters, by its name in the model's state dict: all that is not the base model's."""
    adapters = _adapter_ids(model)
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    return {
        name: value for name, value in state.items() if id(value) in adapters or _is_copy(name) or value.requires_grad
    }


def _adapter_ids(model: torch.nn.Module) -> set[int]:
    adapters: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in (*module.adapter_layer_names, *module.other_param_names):
                part = getattr(module, name, None)
                if isinstance(part, torch.nn.Module):
                    adapters.update(id(value) for value in itertools.chain(part.parameters(), part.buffers()))
    return adapters


def _is_copy(name: str) -> bool:
    """Whether a weight belongs to a copy of a module that is trained in full."""
    return ".modules_to_save." in name or ".token_adapter." in name


def refuse_merged(model: torch.nn.Module) -> None:
    """Raise UnsupportedError if an adapter is merged into the model's weights."""
    for name, module in model.named_modules():
        if getattr(module, "merged", False) is True:
            raise UnsupportedError(
                f"An adapter is merged into '{name}', so the base model cannot be asked; call unmerge_adapter() first."
            )
