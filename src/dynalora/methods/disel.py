"""DISeL: gates decide, for every token, which directions act.

    y = W0·x + s · up( g(x) ⊙ down(x) ),      g(x) = σ(W_g·x + b_g) ∈ (0, 1)^r

W_g is (r, in) and b_g is (r), so an adapted layer has r(in + out) + r·in + r parameters. Gates see the layer's input
as it is, without the update's dropout. b_g starts well below zero: the gates start almost closed, and open where
training finds the update useful. Gates take a larger learning rate than the factors and never weight decay, which the
driver sees to under any optimizer.

The papers' values: b_g = −3 for 7B models, −7 for MNLI, SST-2 and QNLI with RoBERTa, less negative for small data sets;
gate learning rate 5 × the factors'; alpha = 2r.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch

from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.gates import GatedLayer, GateSettings, GateWeightInit
from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.method import Method
from dynalora.adapter.register import register
from dynalora.driver.driver import Moment, OptimizerOverride


@dataclass
class DiselConfig(AdapterConfig):
    """Configuration of DISeL. The shared settings are those of :class:`dynalora.adapter.config.AdapterConfig`.

    ``alpha`` defaults to ``2r``, as in the paper's runs.

    Args:
        gate_bias_init: Start of b_g; −3 opens the gates to σ(−3) ≈ 0.05.
        gate_weight_init: Start of W_g: ``"kaiming"`` (uniform, a = √5) or ``"zeros"`` (all tokens alike at first).
        gate_normalize: Divide W_g·x by √in, for inputs with large norms. b_g is not divided.
        gate_bottleneck: Width of a narrow layer in the gates, W_g = gate_out·gate_in; None for a full W_g.
        gate_lr_multiplier: Learning rate of the gates as a multiple of the optimizer's.
    """

    gate_bias_init: float = field(default=-3.0, metadata={"help": "Start of the gates' bias."})
    gate_weight_init: GateWeightInit = field(default="kaiming", metadata={"help": "kaiming or zeros."})
    gate_normalize: bool = field(default=False, metadata={"help": "Divide the gates' logits by sqrt(in)."})
    gate_bottleneck: int | None = field(
        default=None, metadata={"help": "Width of a narrow layer in the gates."}
    )
    gate_lr_multiplier: float = field(default=5.0, metadata={"help": "Gates' learning rate as a multiple."})

    method: ClassVar[str] = "disel"
    default_alpha_per_rank: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        finite = isinstance(self.gate_bias_init, (int, float)) and abs(self.gate_bias_init) < float("inf")
        self._require(finite, "gate_bias_init", "a finite number")
        choices = get_args(GateWeightInit)
        self._require(
            self.gate_weight_init in choices, "gate_weight_init", f"one of {', '.join(map(repr, choices))}"
        )
        width = self.gate_bottleneck
        valid_width = width is None or (isinstance(width, int) and not isinstance(width, bool) and width > 0)
        self._require(valid_width, "gate_bottleneck", "a positive integer, or None")
        multiplier = isinstance(
            self.gate_lr_multiplier, (int, float)
        ) and 0 < self.gate_lr_multiplier < float("inf")
        self._require(multiplier, "gate_lr_multiplier", "a positive number")

    @property
    def gates(self) -> GateSettings:
        """What the layers' gates need to know."""
        return GateSettings(
            bias_init=self.gate_bias_init,
            weight_init=self.gate_weight_init,
            normalize=self.gate_normalize,
            bottleneck=self.gate_bottleneck,
            lr_multiplier=self.gate_lr_multiplier,
        )


class DiselLayer(GatedLayer):
    """The shared form with d = g(x)."""

    method_name = "disel"
    input_dependent = True

    def gate_settings(self, config: DiselConfig) -> GateSettings:
        """The configuration's gates."""
        return config.gates


@register
class Disel(Method):
    """DISeL's part in training: the gates' own learning rate, and no weight decay on them."""

    name = "disel"
    title = "DISeL"
    config_class = DiselConfig
    layer_class = DiselLayer

    def optimizer_overrides(
        self, config: DiselConfig, layer: AdapterLayer, adapter: str
    ) -> dict[str, OptimizerOverride]:
        """Gates step with their multiple of the learning rate and without weight decay."""
        return config.gates.overrides()

    def report(self, moment: Moment) -> dict[str, Any]:
        """How far the gates' biases have moved: the mean of σ(b_g), the openness for an input of zero."""
        biases = [layer.parameter("gate_bias", moment.adapter).float() for layer in moment.layers]
        return {"mean_gate_at_zero_input": float(torch.cat(biases).sigmoid().mean())}
