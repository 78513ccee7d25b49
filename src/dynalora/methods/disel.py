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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.layer import AdapterLayer, kaiming
from dynalora.adapter.method import Method
from dynalora.adapter.register import register
from dynalora.driver.driver import Moment, OptimizerOverride

GateWeightInit = Literal["kaiming", "zeros"]


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


class DiselLayer(AdapterLayer):
    """The shared form with d = g(x)."""

    method_name = "disel"
    # gate_weight is W_g; with a bottleneck it is gate_out (r, width) · gate_in (width, in) instead.
    roles = ("down", "up", "gate_weight", "gate_in", "gate_out", "gate_bias")
    input_dependent = True
    rank_dims: ClassVar[dict[str, int]] = {
        **AdapterLayer.rank_dims,
        "gate_weight": 0,
        "gate_out": 0,
        "gate_bias": 0,
    }

    def start(self, config: DiselConfig, r: int) -> dict[str, torch.Tensor]:
        """LoRA's start, and almost closed gates."""
        tensors = super().start(config, r)
        draw = kaiming if config.gate_weight_init == "kaiming" else torch.zeros
        if config.gate_bottleneck is None:
            tensors["gate_weight"] = draw(r, self.in_features)
        else:
            # With zeros only the outer layer is zero, or neither would ever get a gradient.
            tensors["gate_in"] = kaiming(config.gate_bottleneck, self.in_features)
            tensors["gate_out"] = draw(r, config.gate_bottleneck)
        tensors["gate_bias"] = torch.full((r,), float(config.gate_bias_init))
        return tensors

    def projections(self, adapter: str) -> Sequence[torch.Tensor]:
        """Down and W_g (or the bottleneck's inner layer): one GEMM over the input does both."""
        gate = "gate_in" if self.has_parameter("gate_in", adapter) else "gate_weight"
        return self.parameter("down", adapter), self.parameter(gate, adapter)

    def diagonal(self, adapter: str, projected: torch.Tensor | None) -> torch.Tensor | None:
        """g(x) = σ(W_g·x + b_g), (…, r)."""
        assert projected is not None  # input_dependent: nobody asks for a static one
        logits = projected
        if self.has_parameter("gate_out", adapter):
            logits = nn.functional.linear(logits, self.parameter("gate_out", adapter).to(logits.dtype))
        if self.drivers[adapter].config.gate_normalize:  # type: ignore[attr-defined]
            logits = logits * self.in_features**-0.5
        return torch.sigmoid(logits + self.parameter("gate_bias", adapter))

    @torch.no_grad()
    def gates(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """The gates for given inputs, without gradients: x (…, in) → (…, r) in (0, 1)."""
        _, *rest = self.projections(adapter)
        return self.diagonal(adapter, nn.functional.linear(x.to(rest[0].dtype), torch.cat(rest)))  # type: ignore[return-value]


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
        gates = OptimizerOverride(lr_multiplier=config.gate_lr_multiplier, weight_decay=0.0)
        return dict.fromkeys(("gate_weight", "gate_in", "gate_out", "gate_bias"), gates)

    def report(self, moment: Moment) -> dict[str, Any]:
        """How far the gates' biases have moved: the mean of σ(b_g), the openness for an input of zero."""
        biases = [layer.parameter("gate_bias", moment.adapter).float() for layer in moment.layers]
        return {"mean_gate_at_zero_input": float(torch.cat(biases).sigmoid().mean())}
