"""DISeL: gates decide, for every token, which directions act.

    y = W0·x + s · up( g(x) ⊙ down(x) ),      g(x) = σ(W_g·x + b_g) ∈ (0, 1)^r

W_g is (r, in) and b_g is (r), so an adapted layer has r(in + out) + r·in + r parameters. Gates see the layer's input
as it is, without the update's dropout. b_g starts well below zero: the gates start almost closed, and open where
training finds the update useful. Gates take a larger learning rate than the factors and never weight decay, which the
driver sees to under any optimizer.

The paper's values: b_g = −3 for 7B models, −7 for MNLI, SST-2 and QNLI with RoBERTa, less negative for small data sets;
gate learning rate 5 × the factors'; alpha = 2r.

One choice is not in the paper. Closed gates also close the way of the steps: with Adam, whose steps do not grow with
the gradient, the function moves by σ(b_g) of what it would in a LoRA. `match_step` makes up for that, and goes back as
the gates open ([`adapter.matching`][dynalora.adapter.matching]).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dynalora.adapter.gates import GatedConfig, GatedLayer
from dynalora.adapter.method import Method
from dynalora.adapter.register import register
from dynalora.driver import Moment


@dataclass
class DiselConfig(GatedConfig):
    """Configuration of DISeL: the gates' settings (`dynalora.adapter.gates.GatedConfig`) and the shared ones.

    `alpha` defaults to `2r`, as in the paper's runs.

    Args:
        gates: Always True: without gates DISeL is a plain LoRA.
    """

    gates: bool = field(default=True, metadata={"help": "Have gates, which DISeL always does."})

    method: ClassVar[str] = "disel"
    default_alpha_per_rank: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.gates is True, "gates", "True (without gates it would be a plain LoRA)")


class DiselLayer(GatedLayer):
    """The shared form with d = g(x)."""

    method_name = "disel"


@register
class Disel(Method):
    """DISeL has nothing but its gates ([`MatchedRates`][dynalora.adapter.matching.MatchedRates] are their rates)."""

    name = "disel"
    title = "DISeL"
    config_class = DiselConfig
    layer_class = DiselLayer
    sharding = ("FSDP2", "FSDP1", "ZeRO")  # nothing is added to its gradients

    def report(self, moment: Moment) -> dict[str, Any]:
        """How far the gates' biases have moved: the mean of σ(b_g), the openness for an input of zero."""
        biases = [layer.parameter("gate_bias", moment.adapter).float() for layer in moment.layers]
        return {"mean_gate_at_zero_input": float(torch.cat(biases).sigmoid().mean())}
