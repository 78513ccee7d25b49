"""Settings of `dynalora bench`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from dynalora.common.names import did_you_mean
from dynalora.errors import ConfigError
from dynalora.lab.choices import MOST_RANK, method_names
from dynalora.lab.settings import SEED, Setting, Settings

if TYPE_CHECKING:
    import torch

REFERENCE = "lora"


@dataclass(frozen=True, kw_only=True)
class BenchSpec(Settings):
    """What to time.

    Attributes:
        model: Id of a causal language model on the Hugging Face Hub, a folder that holds one, or smollm2, the demo's.
        methods: Methods to compare, with commas. The ratios are to lora if it is among them, else to the first.
        dtypes: Data types of the base weights, with commas. Each is measured apart; adapter weights are float32 in
            all of them.
        r: Rank of all adapters.
        target_modules: Modules to adapt: names with commas, a regular expression, or all-linear.
        batch_size: Number of sequences per step.
        length: Number of tokens per sequence, or per prompt with --generate.
        rounds: Number of measured steps per method.
        warmup: Number of steps per method before measuring.
        seed: Seed of the tokens, which are random and the same for all methods.
        threads: Number of CPU threads; None: torch's choice.
        device: Where to run.
        control: Run the reference twice, as if it were two methods: their ratio shows the noise of the measurement.
        memory: Measure memory of training steps too.
        generate: Time greedy generation instead of training steps.
        new_tokens: Number of tokens generated per sequence and round with --generate, of which the first comes with
            the prompt.
        json: File for everything measured.
    """

    model: Annotated[str, Setting("-m")] = "smollm2"
    methods: Annotated[list[str], Setting(commas=True)] = field(default_factory=lambda: ["lora", "dira", "disel"])
    dtypes: Annotated[list[str], Setting(commas=True)] = field(default_factory=lambda: ["float32", "bfloat16"])
    r: Annotated[int, Setting("-r", name="--rank", least=1, most=MOST_RANK)] = 16
    target_modules: Annotated[list[str] | str, Setting("-t")] = "all-linear"
    batch_size: Annotated[int, Setting("-b", least=1)] = 4
    length: Annotated[int, Setting("-l", least=2)] = 128
    rounds: Annotated[int, Setting(least=1)] = 20
    warmup: Annotated[int, Setting(least=1)] = 3
    seed: Annotated[int, SEED] = 0
    threads: Annotated[int | None, Setting(least=1)] = None
    device: Annotated[str, Setting(choices=("auto", "cpu", "cuda"))] = "auto"
    control: bool = False
    memory: bool = True
    generate: bool = False
    new_tokens: Annotated[int, Setting(least=2)] = 32
    json: Annotated[str | None, Setting(metavar="FILE.json", recorded=False, writes="file")] = None

    def _check(self) -> None:
        super()._check()
        if not self.methods:
            raise ConfigError("methods is empty; name at least one.")
        for name in self.methods:
            if name not in method_names():
                raise ConfigError(f"Unknown method '{name}'; {did_you_mean(name, method_names())}.")
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError("A method is named twice; --control measures the reference twice.")
        dtypes = ("float32", "bfloat16", "float16")
        for name in self.dtypes:
            if name not in dtypes:
                raise ConfigError(f"dtype is '{name}'; choose from {', '.join(dtypes)}.")
        if self.device == "cuda" and self.torch_device.type != "cuda":
            raise ConfigError("device is 'cuda', but torch finds no CUDA device; choose cpu.")

    @property
    def torch_device(self) -> torch.device:
        """Where to run."""
        import torch

        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")

    @property
    def reference(self) -> str:
        """The method that ratios are to."""
        return REFERENCE if REFERENCE in self.methods else self.methods[0]
