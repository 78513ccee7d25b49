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
        model: Measure with this causal language model: its id on the Hugging Face Hub, a folder that holds one, or
            smollm2, the demo's.
        methods: Time these methods. The ratios are to lora if it is among them, else to the first.
        dtypes: Load the base weights with these data types. Each is measured apart; adapter weights are float32 in all
            of them.
        r: Give all adapters this rank.
        target_modules: Adapt these modules: names with commas, a regular expression, or all-linear.
        batch_size: Process this many sequences per step.
        length: Give every sequence this many tokens, or every prompt with `--generate`.
        rounds: Measure this many steps per method.
        warmup: Run this many steps per method before measuring.
        run_steps: Make schedules for a run of this many steps, whose first ones are measured; None: for a run of the
            measured steps alone, at most of which methods that move ranks do so.
        seed: Draw the tokens, which are random and the same for all methods, from this seed.
        threads: Compute with this many CPU threads; None: torch's choice.
        device: Run on this device.
        control: Run the reference twice, as if it were two methods: their ratio shows the noise of the measurement.
        memory: Measure the memory of training steps, too.
        generate: Time greedy generation instead of training steps.
        new_tokens: Generate this many tokens per sequence and round with `--generate`, of which the first comes with
            the prompt.
        json: Write everything that was measured into this file, which must not exist.
    """

    model: Annotated[str, Setting("-m", home=True)] = "smollm2"
    methods: Annotated[list[str], Setting(commas=True)] = field(
        default_factory=lambda: ["lora", "dira", "disel", "pedyra", "dislora"]
    )
    dtypes: Annotated[list[str], Setting(commas=True, choices=("float32", "bfloat16", "float16"))] = field(
        default_factory=lambda: ["float32", "bfloat16"]
    )
    r: Annotated[int, Setting("-r", name="--rank", least=1, most=MOST_RANK)] = 16
    target_modules: Annotated[list[str] | str, Setting("-t")] = "all-linear"
    batch_size: Annotated[int, Setting("-b", least=1)] = 4
    length: Annotated[int, Setting("-l", least=2)] = 128
    rounds: Annotated[int, Setting(least=1)] = 20
    warmup: Annotated[int, Setting(least=1)] = 3
    run_steps: Annotated[int | None, Setting(least=1)] = None
    seed: Annotated[int, SEED] = 0
    threads: Annotated[int | None, Setting(least=1)] = None
    device: Annotated[str, Setting(choices=("auto", "cpu", "cuda"))] = "auto"
    control: bool = False
    memory: bool = True
    generate: bool = False
    new_tokens: Annotated[int, Setting(least=2, only_with="generate")] = 32
    json: Annotated[str | None, Setting(metavar="FILE.json", recorded=False, writes="file")] = None

    def _check(self) -> None:
        super()._check()
        if not self.methods:
            raise ConfigError("methods is empty; name at least one.")
        for name in self.methods:
            if name not in method_names():
                raise ConfigError(f"Unknown method '{name}'; {did_you_mean(name, method_names())}.")
        if self.run_steps is not None and self.run_steps < self.measured_steps:
            raise ConfigError(
                f"run_steps is {self.run_steps}; {self.measured_steps} steps are made to measure them, so give at "
                "least that, or fewer rounds."
            )
        if not self.dtypes:
            raise ConfigError("dtypes is empty; name at least one.")
        if self.device == "cuda" and self.torch_device.type != "cuda":
            raise ConfigError("device is 'cuda', but torch finds no CUDA device; choose cpu.")

    @property
    def torch_device(self) -> torch.device:
        """Where to run."""
        import torch

        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")

    @property
    def measured_steps(self) -> int:
        """Training steps of each method: those of the warm-up, those that are timed, and two for the memory."""
        return self.warmup + self.rounds + 2

    @property
    def reference(self) -> str:
        """The method that ratios are to."""
        return REFERENCE if REFERENCE in self.methods else self.methods[0]
