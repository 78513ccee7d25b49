"""What settings can be chosen from, apart from the code that acts on it, so that flags and `--help` load nothing."""

from __future__ import annotations

import importlib.util
import pkgutil
from pathlib import Path

from dynalora.errors import ConfigError
from dynalora.evaluation.prompts import TEMPLATES

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Precisions of the base weights; `auto` takes bfloat16 where the machine computes in it fast."""

QUANTIZATIONS = {"4bit": "quant", "8bit": "quant", "int8": "torchao"}
"""Ways to hold the base weights → the extra that brings the library."""

PROMPTS = ("chat", *TEMPLATES)
"""Formats of prompts: the model's own and those of papers."""

KEEP_BEST = ("validation-loss", "validation-accuracy", "held-out-accuracy")
"""What the best weights of a run can be chosen by: questions set aside, or those that the run is judged on."""

MOST_RANK = 65536
"""The largest rank that can be asked for: more than any layer is wide."""

PEFT_METHODS = ("lora", "rslora", "lora+", "lora-null", "dora", "pissa", "adalora", "randlora", "miss", "p-tuning")
"""PEFT's methods that have a name here; their configurations are in [`baselines`][dynalora.lab.baselines]."""


def own_methods() -> list[str]:
    """The names of dynalora's methods, sorted. Each is the name of a module in `dynalora.methods`; none is imported."""
    spec = importlib.util.find_spec("dynalora.methods")
    assert spec is not None
    return sorted(module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))


def method_names() -> list[str]:
    """Methods whose adapters can be trained: dynalora's, and PEFT's to compare with."""
    return [*own_methods(), *PEFT_METHODS]


def compared_names() -> list[str]:
    """Methods that can be compared: those of `method_names`, and full fine-tuning."""
    return [*method_names(), "full"]


def is_config_file(method: str) -> bool:
    """Whether a method's name is the name of a configuration file."""
    return Path(method).suffix.lower() in (".json", ".yaml", ".yml")


def label_of(method: str) -> str:
    """What a method is called in tables and file names: its name, or that of its file."""
    return Path(method).stem if is_config_file(method) else method.lower()


def check_quantization(name: str | None) -> None:
    """Make sure that base weights can be held so.

    Raises:
        ConfigError: There is no such way.
    """
    if name is not None and name not in QUANTIZATIONS:
        raise ConfigError(f"quantization is '{name}'; choose one of {', '.join(QUANTIZATIONS)}.")
