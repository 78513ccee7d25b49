"""Settings of `dynalora linear-model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from dynalora.lab.choices import MOST_RANK
from dynalora.lab.settings import SEED, Setting, Settings

if TYPE_CHECKING:
    from dynalora.jobs.linear_model.populations import LinearModel


@dataclass(frozen=True, kw_only=True)
class LinearModelSpec(Settings):
    """Populations and training. The defaults take a few minutes on one core.

    Attributes:
        output: Write the run into this folder, which must be new or empty; None: runs/linear-model.
        in_features: Give inputs this many numbers.
        out_features: Give targets this many numbers.
        task_rank: Make the update that is needed, ΔW*, of this rank.
        r: Give LoRA and DISeL this rank.
        separation: Put the mean of each population this far from 0, in standard deviations.
        steps: Train each method for this many optimizer steps, each on new samples.
        batch_size: Draw this many samples per step, from both populations.
        learning_rate: Let the learning rate of AdamW rise to this value. The schedule is a cosine with 2 % warm-up,
            without weight decay.
        gate_bias_init: Start DISeL's gates at this bias, as in [`DiselConfig`][dynalora.DiselConfig].
        samples: Measure the final losses on this many samples.
        seed: Draw the maps, the adapters' start and the samples from this seed.
    """

    output: Annotated[str | None, Setting("-o", recorded=False, home=True)] = None
    in_features: int = 16
    out_features: int = 16
    task_rank: int = 4
    r: Annotated[int, Setting("-r", name="--rank", least=1, most=MOST_RANK)] = 4
    separation: float = 1.5
    steps: Annotated[int, Setting(least=1)] = 4000
    batch_size: Annotated[int, Setting("-b", least=1)] = 256
    learning_rate: Annotated[float, Setting("--lr", above=0)] = 0.02
    gate_bias_init: float = -3.0
    samples: Annotated[int, Setting(least=1000)] = 200_000
    seed: Annotated[int, SEED] = 0

    def _check(self) -> None:
        super()._check()
        self.problem()

    def problem(self) -> LinearModel:
        """The populations and maps that these settings name."""
        from dynalora.jobs.linear_model.populations import random_linear_model

        return random_linear_model(self.in_features, self.out_features, self.task_rank, self.separation, self.seed)
