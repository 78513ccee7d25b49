"""What to measure."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dynalora.errors import ConfigError
from dynalora.lab.configs import method_names

REFERENCE = "lora"


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """What to measure.

    Attributes:
        model: Hub id or folder of a causal language model; `smollm2`: the demo's.
        methods: Methods to compare; the ratios are to `lora` if it is among them, else to the first.
        dtypes: Of the base weights; each is measured apart. Adapter weights are float32 in all of them.
        r: Rank, the same for all.
        target_modules: The same for all.
        batch_size: Sequences per step.
        length: Tokens per sequence.
        rounds: Measured steps per method.
        warmup: Steps per method before measuring.
        seed: Of the tokens, which are random and the same for all methods.
        threads: Of the CPU; None: torch's choice.
        device: `cpu`, `cuda`, or `auto`.
        control: Run the reference twice, as if it were two methods: their ratio shows the noise of the measurement.
        memory: Measure memory too (training steps only).
        generate: Measure greedy generation instead of training steps; `length` is then the prompt's.
        new_tokens: Tokens generated per sequence and round, at least 2: the first comes with the prompt.
    """

    model: str = "smollm2"
    methods: list[str] = field(default_factory=lambda: ["lora", "dira", "disel"])
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    r: int = 16
    target_modules: list[str] | str = "all-linear"
    batch_size: int = 4
    length: int = 128
    rounds: int = 20
    warmup: int = 3
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    control: bool = False
    memory: bool = True
    generate: bool = False
    new_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("r", "batch_size", "rounds", "warmup"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a whole number of at least 1.")
        if self.length < 2:
            raise ConfigError(f"length is {self.length}; give at least 2 tokens.")
        if self.new_tokens < 2:
            raise ConfigError(f"new_tokens is {self.new_tokens}; give at least 2.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; give a whole number of at least 1.")
        if not self.methods:
            raise ConfigError("methods is empty; name at least one.")
        for name in self.methods:
            if name not in method_names():
                raise ConfigError(f"Unknown method '{name}'; choose from {', '.join(method_names())}.")
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError("A method is named twice; --control measures the reference twice.")
        known = ("float32", "bfloat16", "float16")
        for name in self.dtypes:
            if name not in known:
                raise ConfigError(f"dtype is '{name}'; choose from {', '.join(known)}.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device is '{self.device}'; choose one of auto, cpu, cuda.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda', but torch finds no CUDA device; choose cpu.")

    @property
    def torch_device(self) -> torch.device:
        """Where to run."""
        return torch.device(
            "cuda"
            if self.device == "auto" and torch.cuda.is_available()
            else self.device.replace("auto", "cpu")
        )

    @property
    def reference(self) -> str:
        """The method that ratios are to."""
        return REFERENCE if REFERENCE in self.methods else self.methods[0]
