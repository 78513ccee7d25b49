"""The settings of DiRA."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

from typing_extensions import Self

from dynalora.adapter.compaction import THRESHOLD
from dynalora.adapter.config import is_number, is_whole
from dynalora.adapter.gates import GatedConfig
from dynalora.driver.schedule import SCHEDULES, Schedule

Penalty = Literal["product", "variational"]
PenaltyMode = Literal["gradient", "proximal"]


@dataclass
class DiraConfig(GatedConfig):
    """Configuration of DiRA. The shared settings are those of `dynalora.adapter.config.AdapterConfig`, and with
    `gates=True` those of `dynalora.adapter.gates.GatedConfig`; the penalty is on the factors, gates left out.

    `alpha` defaults to `r`, so that ΔW = up·down as the paper writes it.

    Args:
        target_rank: A budget that the run ends with: the average rank over the adapted matrices, from 1 up and below
            `r`; or, below 1, the share of the adapter's parameters. The weight of the penalty then follows the budget
            ([`budget`][dynalora.methods.dira.budget]). None leaves the weight to `penalty_weight` and
            `penalty_schedule`.
        penalty: `"product"` (eq. 5) or `"variational"` (App. B.2).
        penalty_mode: `"gradient"` adds the penalty's gradient to the task's, as in the paper; `"proximal"` shrinks
            components after the optimizer's step by rate × weight, to exactly zero
            ([`proximal`][dynalora.methods.dira.proximal]). None takes `"proximal"` with `target_rank` and
            `"gradient"` without.
        penalty_weight: λ at the first step. 0 makes DiRA a plain LoRA. With `target_rank`, the weight that the gradient
            form begins with; the proximal form begins with one that it measures.
        penalty_schedule: How λ decays to 0 over the run: `"linear"` (the paper's), `"cosine"` or `"constant"`.
        compact_every: Remove dead components after every so many optimizer steps, so that later steps are faster. None
            removes them at once with `target_rank`, and otherwise leaves them where they are (see `dynalora.compact`).
            With `target_rank` they are removed at the run's last step, too. Without it on one process only.
        compact_threshold: What is removed then: components of at most this share of the adapter's largest singular
            value, in [0, 1). With `target_rank` only what is exactly zero is removed.
    """

    target_rank: float | None = field(
        default=None,
        metadata={
            "help": "End the run with this average rank; below 1 it is the share of the parameters that are left."
        },
    )
    penalty: Penalty = field(
        default="product", metadata={"help": "Write the penalty on rank in this form: product or variational."}
    )
    penalty_mode: PenaltyMode | None = field(
        default=None,
        metadata={
            "help": "Add the penalty to the gradient, as the paper does (gradient), or shrink components after each "
            "step, to exactly zero (proximal)."
        },
    )
    penalty_weight: float = field(
        default=1e-4,
        metadata={"help": "Weigh the penalty with this number at the first step. More leaves fewer components."},
    )
    penalty_schedule: Schedule = field(
        default="linear",
        metadata={"help": "Let the penalty's weight fall to 0 as a line (linear) or a cosine, or keep it (constant)."},
    )

    compact_every: int | None = field(
        default=None,
        metadata={"help": "Remove dead components every so many optimizer steps; None: never during the run."},
    )
    compact_threshold: float = field(
        default=THRESHOLD,
        metadata={"help": "Call components dead that have at most this share of the largest singular value."},
    )

    method: ClassVar[str] = "dira"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.penalty in get_args(Penalty), "penalty", f"one of {', '.join(map(repr, get_args(Penalty)))}")
        modes = get_args(PenaltyMode)
        known = self.penalty_mode is None or self.penalty_mode in modes
        self._require(known, "penalty_mode", f"one of {', '.join(map(repr, modes))}, or left out")
        number = is_number(self.penalty_weight) and self.penalty_weight >= 0
        self._require(number, "penalty_weight", "a number of at least 0")
        self._require(
            self.penalty_schedule in SCHEDULES, "penalty_schedule", f"one of {', '.join(map(repr, SCHEDULES))}"
        )
        every = self.compact_every
        counted = every is None or (is_whole(every) and every > 0)
        self._require(counted, "compact_every", "a positive number of steps, or None")
        self._require(
            is_number(self.compact_threshold) and 0 <= self.compact_threshold < 1, "compact_threshold", "in [0, 1)"
        )
        if self.proximal:
            self._require(self.penalty == "product", "penalty", "'product' where the penalty is proximal")
        self._check_budget()

    def _check_budget(self) -> None:
        target = self.target_rank
        if target is None:
            return
        self._require(
            is_number(target) and target > 0,
            "target_rank",
            "an average rank of at least 1, or a share of the parameters below 1",
        )
        # With a pattern of ranks, the average is known once there is a model.
        self._require(target < self.r or bool(self.rank_pattern), "target_rank", f"below r={self.r}")
        unused = ["penalty_schedule", "compact_threshold", *(["penalty_weight"] if self.proximal else [])]
        for setting in (setting for setting in fields(self) if setting.name in unused):
            given = getattr(self, setting.name) != setting.default
            self._require(not given, setting.name, f"left out with target_rank, which it has no effect on ({target:g})")
        self._require(self.penalty_weight > 0, "penalty_weight", "above 0 with target_rank")

    def combined(self, **settings: Any) -> Self:
        """As `AdapterConfig.combined`, without the budget, which was that of a run."""
        return super().combined(target_rank=None, **settings)

    @property
    def proximal(self) -> bool:
        """Whether the penalty acts after the optimizer's step, and not in the gradient."""
        if self.penalty_mode is None:
            return self.target_rank is not None
        return self.penalty_mode == "proximal"
