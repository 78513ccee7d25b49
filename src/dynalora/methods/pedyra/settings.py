"""The settings of PE-DyRA, and the plan of adjustments that they make of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from typing_extensions import Self

from dynalora.adapter.config import is_number, is_whole
from dynalora.adapter.gates import GatedConfig
from dynalora.adapter.matching import LORA_STEP, MatchedSteps
from dynalora.driver.schedule import Occasions, in_steps, memory_of

UP_RATE = 8.0
"""The multiple of `up`'s learning rate at s = 1 without gates: steps as long as LoRA's where |e| is about a seventh."""

Mode = Literal["both", "prune", "expand", "static", "mask"]
Importance = Literal["score", "random"]


@dataclass
class PedyraConfig(GatedConfig):
    """Configuration of PE-DyRA. The shared settings are those of `dynalora.adapter.config.AdapterConfig`.

    With `gates=True` there are those of `dynalora.adapter.gates.GatedConfig` too: d = e ⊙ g(x), and a new
    triple brings its gate along.

    `alpha` defaults to `r`. The scaling s = alpha / r stays what it is while ranks move.

    Args:
        adjust_start: First adjustment, as a number of optimizer steps, or as a fraction of the run if below 1.
        adjust_interval: Steps between adjustments, likewise.
        adjust_end: Last step at which an adjustment may take place, likewise.
        adjust_size: k, the number of triples that move at each adjustment.
        score_mix: Share of the gradients in the score; 1 leaves out the inputs, 0 the gradients.
        beta1: β1, decay of the sensitivities' and the inputs' moving averages.
        beta2: β2, decay of the uncertainties' moving averages.
        ortho_weight: γ, weight of the orthogonality penalty.
        ortho_reduction: How its terms add up: `"sum"`, squared norms as eq. 2 prints them; or `"mean_norm"`, the mean
            of norms that are not squared, as in AdaLoRA's code, whose weights papers quote.
        mode: `"both"`; `"prune"` removes without expanding; `"expand"` adds without pruning. `"static"` is LoRA, to
            compare with: LoRA's start, e held at 1, no penalty; scores are recorded where ranks would be adjusted.
            `"mask"` shows how steady scores are (Figures 1b and 8): at the n-th adjustment e is set to zero in the n·k
            triples of lowest score, which stay and may come back; ranks on record leave them out.
        importance: `"score"`, or `"random"` numbers in its place.
        gradient_weighting: Weigh the parts of S_grad by their gradients' norms; False takes their plain sum.
        normalize_scores: Divide S_grad and S_inp by their means before mixing them.
        max_rank: The largest rank that a matrix can reach; None sets no limit. Where shapes must not change
            (distributed training, or whenever this is given) memory for it is reserved.
        diagnostics: Log what the paper's figures show over the steps: effective rank and utilisation, the orthogonality
            term, and the norms of the gradients of `down`, `e` and `up`. Costs a spectrum per matrix at every logged
            step.
        seed: Seed of the new directions, and of random importance.
        match_step: Multiply the learning rates of `e` and `up`, matrix by matrix, so that a step moves the model's
            function about as far as LoRA's (alpha = 2r) would with the optimizer's learning rate, and bound the
            penalty's gradient by a share of the task's, so that an optimizer such as Adam steps for the task. False
            takes the optimizer's rate for all and the penalty as it is, as in the paper, which needs many more steps.
        use_dora: Train the norms of the adapted weight's rows apart from their directions (DoRA, Liu et al., 2024).
            The penalty of `retain` leaves the norms out; `retain_mode="replay"` and `max_forgetting` see them.
        init_weights: All but False start as the base model: `"orthogonal"` with random orthonormal directions and
            e = 0, as new triples do; True with factors drawn from N(0, 0.02²) and e = 0, as in the paper, which the
            penalty has to bring to length 1 first; `"pissa"` with the weight's own largest singular triplets (Meng et
            al., 2024). False starts with a random update, for tests.
    """

    adjust_start: float = field(
        default=0.1,
        metadata={
            "help": "Adjust ranks for the first time after this many steps; below 1 it is a fraction of the run."
        },
    )
    adjust_interval: float = field(
        default=0.05, metadata={"help": "Adjust ranks again every so many steps; below 1 it is a fraction of the run."}
    )
    adjust_end: float = field(
        default=0.6,
        metadata={"help": "Adjust ranks for the last time after this many steps; below 1 it is a fraction of the run."},
    )
    adjust_size: int = field(
        default=12, metadata={"help": "Move this many components from one matrix to another at each adjustment."}
    )
    score_mix: float = field(
        default=0.5,
        metadata={"help": "Give the gradients this share of a component's score; its inputs have the rest."},
    )
    beta1: float = field(
        default=0.85,
        metadata={
            "help": "Average sensitivities over steps with this decay: the nearer to 1, the longer they are remembered."
        },
    )
    beta2: float = field(
        default=0.85, metadata={"help": "Average the sensitivities' uncertainty over steps with this decay."}
    )
    ortho_weight: float = field(
        default=0.1, metadata={"help": "Weigh the penalty that keeps directions orthogonal with this number."}
    )
    ortho_reduction: Literal["sum", "mean_norm"] = field(
        default="sum",
        metadata={
            "help": "Write the penalty as a sum of squared norms, as printed (sum), or as AdaLoRA's code does "
            "(mean_norm)."
        },
    )
    mode: Mode = field(
        default="both",
        metadata={
            "help": "Choose what an adjustment does: both, prune, expand, mask, or static, which only measures scores."
        },
    )
    importance: Importance = field(
        default="score",
        metadata={"help": "Choose components to prune and matrices to expand by their score, or at random."},
    )
    gradient_weighting: bool = field(
        default=True, metadata={"help": "Weigh the parts of a component's score by the norms of their gradients."}
    )
    normalize_scores: bool = field(
        default=True, metadata={"help": "Divide both scores by their means before they are mixed."}
    )
    max_rank: int | None = field(
        default=None, metadata={"help": "Let no matrix get a higher rank than this; None: no limit."}
    )
    diagnostics: bool = field(
        default=False,
        metadata={"help": "Log effective rank, utilisation, orthogonality and gradient norms, which takes time."},
    )
    seed: int = field(default=0, metadata={"help": "Draw new directions from this seed."})
    match_step: bool = field(
        default=True,
        metadata={"help": "Scale the learning rate of e so that a step changes the model as much as LoRA's would."},
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Train the norms of the weight's rows apart from their directions."}
    )

    init_weights: bool | Literal["orthogonal", "pissa"] = field(  # type: ignore[assignment]
        default="orthogonal",
        metadata={
            "help": "Start from orthogonal factors, from the paper's small ones (True), or from singular triplets "
            "(pissa); False is for tests."
        },
    )

    method: ClassVar[str] = "pedyra"
    before: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        start = self.init_weights
        starts = (True, False, "orthogonal", "pissa")
        self._require(start in starts, "init_weights", "'orthogonal', True, 'pissa' or False")
        # Gates would not let the start cancel, and DoRA needs the norms of one fixed weight.
        self._require(
            not (self.gates and start == "pissa"), "init_weights", "'orthogonal', True or False with gates=True"
        )
        self._require(not (self.gates and self.use_dora), "use_dora", "False with gates=True")
        for name in ("adjust_start", "adjust_interval", "adjust_end"):
            value = getattr(self, name)
            valid = is_number(value) and (0 < value < 1 or (value >= 1 and value == int(value)))
            self._require(valid, name, "a whole number of steps, or a fraction of the run between 0 and 1")
        self._require(is_whole(self.adjust_size) and self.adjust_size > 0, "adjust_size", "a positive integer")
        for name, top in (("score_mix", "1]"), ("beta1", "1)"), ("beta2", "1)")):
            value = getattr(self, name)
            valid = is_number(value) and 0 <= value <= 1 and (value < 1 or top == "1]")
            self._require(valid, name, f"in [0, {top}")
        valid = is_number(self.ortho_weight) and self.ortho_weight >= 0
        self._require(valid, "ortho_weight", "a number of at least 0")
        reductions = ("sum", "mean_norm")
        for name, choices in (
            ("mode", get_args(Mode)),
            ("importance", get_args(Importance)),
            ("ortho_reduction", reductions),
        ):
            self._require(getattr(self, name) in choices, name, f"one of {', '.join(map(repr, choices))}")
        largest = self.max_rank
        valid = largest is None or (is_whole(largest) and largest >= self.r)
        self._require(valid, "max_rank", f"an integer of at least r={self.r}, or None")
        self._require(isinstance(self.seed, int), "seed", "an integer")
        self._require(isinstance(self.diagnostics, bool), "diagnostics", "True or False")
        self._require(
            not (self.mode == "static" and start == "pissa"),
            "init_weights",
            "left out with mode='static', LoRA's own start",
        )
        if (self.adjust_start < 1) == (self.adjust_end < 1):
            self._require(
                self.adjust_end >= self.adjust_start, "adjust_end", f"at least adjust_start={self.adjust_start}"
            )

    def matched_steps(self, scaling: float) -> MatchedSteps | None:
        """How `up` follows e and gates; see `GatedConfig.matched_steps`. Directions have length 1, LoRA's 1 / √3.

        Without gates they are never slower than they would be at |e| of a seventh, however large e becomes.
        """
        if not self.match_step or self.mode == "static":
            return None
        usual = 2.0 ** round(math.log2(UP_RATE / scaling))
        return MatchedSteps(LORA_STEP / scaling, unmeasured=usual, least=0.0 if self.gates else usual)

    def combined(self, **settings: Any) -> Self:
        """As `AdapterConfig.combined`, without the largest rank, which was that of a run."""
        return super().combined(max_rank=None, **settings)

    @property
    def uses_gradients(self) -> bool:
        """Whether scores need the gradients' averages."""
        return self.importance == "score" and self.score_mix > 0

    @property
    def uses_inputs(self) -> bool:
        """Whether scores need the inputs' averages."""
        return self.importance == "score" and self.score_mix < 1


class AdjustmentPlan(Occasions):
    """When ranks are adjusted, in optimizer steps counted from 1."""

    @classmethod
    def of(cls, config: PedyraConfig, total_steps: int | None) -> AdjustmentPlan:
        """The plan of a run.

        Raises:
            ValueError: A fraction is given, and the number of steps is unknown.
        """
        return cls(
            start=max(1, in_steps(config.adjust_start, total_steps)),
            interval=max(1, in_steps(config.adjust_interval, total_steps)),
            end=in_steps(config.adjust_end, total_steps, math.floor),
            horizon=memory_of(max(config.beta1, config.beta2)),
        )
