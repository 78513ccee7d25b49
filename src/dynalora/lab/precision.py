"""The precision of base weights: dtypes and quantisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from dynalora.errors import ConfigError, first_line

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Precisions of the base weights; `auto` takes bfloat16 where the machine computes in it fast."""


QUANTIZATIONS = {"4bit": "quant", "8bit": "quant", "int8": "torchao"}
"""Ways to hold the base weights → the extra that brings the library."""


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype for one of [`DTYPES`][dynalora.lab.precision.DTYPES] on this machine."""
    if name == "auto":
        return (
            torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def check_quantization(name: str | None) -> None:
    """Make sure that base weights can be held so.

    Raises:
        ConfigError: There is no such way.
    """
    if name is not None and name not in QUANTIZATIONS:
        raise ConfigError(f"quantization is '{name}'; choose one of {', '.join(QUANTIZATIONS)}.")


def new_layers(model: nn.Module) -> list[str]:
    """Linear layers that a checkpoint without this head need not have: the head, and the pooler before it.

    transformers would make quantised layers of them and then leave their new weights as they are, which works nowhere.
    """
    encoder = f"{getattr(model, 'base_model_prefix', '')}."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (not name.startswith(encoder) or "pooler" in name.split("."))
    ]


def quantization_config(name: str, dtype: torch.dtype, *, whole: list[str] | None = None) -> Any:
    """Settings of transformers for a way to hold the base weights.

    Args:
        name: One of [`QUANTIZATIONS`][dynalora.lab.precision.QUANTIZATIONS].
        dtype: That 4-bit weights are multiplied in.
        whole: Names of layers that stay as they are; None: the output layer.

    Raises:
        ConfigError: There is no such way, or its library is not installed.
    """
    check_quantization(name)
    try:
        if name == "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=whole)
        four = name == "4bit"
        return BitsAndBytesConfig(
            load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=whole,
        )  # fmt: skip
    except ImportError as error:
        raise not_installed(name, error) from error


def not_installed(quantization: str, error: ImportError) -> ConfigError:
    """The error to raise where quantization lacks its library."""
    return ConfigError(
        f"quantization '{quantization}' needs a library that is not installed ({first_line(error)}): "
        f"pip install 'dynalora[{QUANTIZATIONS.get(quantization, 'quant')}]'."
    )
