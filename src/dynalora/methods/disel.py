"""DISeL: gates decide, for every token, which directions act.

    y = W0·x + s · up( g(x) ⊙ down(x) ),      g(x) = σ(W_g·x + b_g) ∈ (0, 1)^r

W_g is (r, in) and b_g is (r), so an adapted layer has r(in + out) + r·in + r parameters. Gates see the layer's input
as it is, without the update's dropout. b_g starts well below zero: the gates start almost closed, and open where
training finds the update useful. Gates take a larger learning rate than the factors and never weight decay, which the
driver sees to under any optimizer.

The paper's values: b_g = −3 for 7B models, −7 for MNLI, SST-2 and QNLI with RoBERTa, less negative for small data sets;
gate learning rate 5 × the factors'; alpha = 2r.

One choice is not in the paper. Closed gates also close the way of the steps: with Adam, whose steps do not grow with
the gradient, the function moves by σ(b_g) of what it would in a LoRA. `match_step` makes up for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dynalora.adapter.gates import GatedConfig, GatedLayer
from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.method import Method
from dynalora.adapter.register import register
from dynalora.driver import Moment, OptimizerOverride

# The largest multiple of the optimizer's learning rate that `match_step` gives to `up`, that of b_g = −3.5. Gates that
# begin further closed open on the way, and a step that was matched while they were closed is then many times too long.
FASTEST = 32.0


@dataclass
class DiselConfig(GatedConfig):
    """Configuration of DISeL: the gates' settings (`dynalora.adapter.gates.GatedConfig`) and the shared ones.

    `alpha` defaults to `2r`, as in the paper's runs.

    Args:
        gates: Always True: without gates DISeL is a plain LoRA.
        match_step: Multiply `up`'s learning rate by 1 / σ(`gate_bias_init`), by 32 at most, so that a step moves the
            model's function about as far as LoRA's (alpha = 2r) would with the optimizer's learning rate. False takes
            the optimizer's, as in the paper: then choose it for this method. None is True, but False for a
            configuration that was saved before there was this setting.
    """

    gates: bool = field(default=True, metadata={"help": "Always true."})
    match_step: bool | None = field(
        default=None,
        metadata={"help": "Scale up's learning rate so that a step moves the function like LoRA's; None: true."},
    )

    method: ClassVar[str] = "disel"
    default_alpha_per_rank: ClassVar[float] = 2.0
    before: ClassVar[Mapping[str, Any]] = {"match_step": False}

    def __post_init__(self) -> None:
        saved = self.peft_version is not None  # which PEFT writes into every file and nobody gives
        super().__post_init__()
        if self.match_step is None:
            self.match_step = self.before["match_step"] if saved else True
        self._require(isinstance(self.match_step, bool), "match_step", "True or False")
        self._require(self.gates is True, "gates", "True (without gates it would be a plain LoRA)")


class DiselLayer(GatedLayer):
    """The shared form with d = g(x)."""

    method_name = "disel"


@register
class Disel(Method):
    """DISeL's part in training: learning rates of the gates and of `up`, and no weight decay on gates."""

    name = "disel"
    title = "DISeL"
    config_class = DiselConfig
    layer_class = DiselLayer
    sharding = ("FSDP2", "FSDP1", "ZeRO")  # nothing is added to its gradients

    def optimizer_overrides(
        self, config: DiselConfig, layer: AdapterLayer, adapter: str
    ) -> dict[str, OptimizerOverride]:
        """Gates step with their multiple of the learning rate and without weight decay; and `up` as LoRA's would.

        An optimizer such as Adam moves every entry of `up` by about the learning rate, and the function by that times
        what the gates let through.
        """
        rules = config.gate_overrides()
        if config.match_step:
            closed = math.exp(min(-config.gate_bias_init, 50.0))  # farther closed than FASTEST allows for, no overflow
            rules["up"] = OptimizerOverride(lr_multiplier=min(1 + closed, FASTEST))
        return rules

    def report(self, moment: Moment) -> dict[str, Any]:
        """How far the gates' biases have moved: the mean of σ(b_g), the openness for an input of zero."""
        biases = [layer.parameter("gate_bias", moment.adapter).float() for layer in moment.layers]
        return {"mean_gate_at_zero_input": float(torch.cat(biases).sigmoid().mean())}
