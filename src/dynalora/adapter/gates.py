"""Gates per token, as a part that any method's layer can have (DISeL's; see `dynalora.methods.disel`).

    g(x) = σ(W_g·x + b_g) ∈ (0, 1)^r,      d(x) = g(x) ⊙ d

with d the method's fixed diagonal. W_g meets the input in the same product as `down`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from dynalora.adapter.config import AdapterConfig, is_whole
from dynalora.adapter.layer import AdapterLayer, Gates, kaiming
from dynalora.adapter.matching import FASTEST, MOST, MatchedSteps
from dynalora.adapter.matching import ROLE as MATCHED
from dynalora.adapter.storage import Role
from dynalora.adapter.update import Update
from dynalora.common.private import transforming
from dynalora.common.processes import whole
from dynalora.driver import OptimizerOverride

GateWeightInit = Literal["kaiming", "zeros"]

#: gate_weight (r, in) is W_g; with a bottleneck it is gate_out (r, width) · gate_in (width, in) instead. gate_bias (r).
GATE_ROLES = (
    Role("gate_weight", rank_dim=0),
    Role("gate_in"),
    Role("gate_out", rank_dim=0),
    Role("gate_bias", rank_dim=0),
)


@dataclass
class GatedConfig(AdapterConfig):
    """Settings of methods whose adapters can have gates. The shared ones are those of `AdapterConfig`.

    Args:
        gates: Whether the adapter has gates per token; then its update depends on the input.
        gate_bias_init: Start of b_g; −3 opens the gates to σ(−3) ≈ 0.05.
        gate_weight_init: Start of W_g: `"kaiming"` (uniform, a = √5) or `"zeros"` (all tokens alike at first).
        gate_normalize: Divide W_g·x by √in, for inputs with large norms. b_g is not divided.
        gate_bottleneck: Width of a narrow layer in the gates, W_g = gate_out·gate_in; None for a full W_g.
        gate_lr_multiplier: Learning rate of the gates as a multiple of the optimizer's.
        match_step: Multiply `up`'s learning rate by what makes up for closed gates, from 1 / σ(`gate_bias_init`) on and
            by 32 at most, so that a step moves the model's function about as far as it would without gates
            ([`adapter.matching`][dynalora.adapter.matching]). False takes the optimizer's, as in the papers: then
            choose it for this method. None is True with gates, but False for a configuration that was saved before
            there was this setting.
    """

    gates: bool = field(
        default=False, metadata={"help": "Give every component a gate, which opens and closes from token to token."}
    )
    gate_bias_init: float = field(
        default=-3.0,
        metadata={
            "help": "Start the gates at this bias. The lower it is, the less the adapter acts before it has learned "
            "where to."
        },
    )
    gate_weight_init: GateWeightInit = field(
        default="kaiming", metadata={"help": "Start the gates' weights as linear layers start (kaiming), or at zeros."}
    )
    gate_normalize: bool = field(
        default=False, metadata={"help": "Divide the gates' logits by the square root of the number of inputs."}
    )
    gate_bottleneck: int | None = field(
        default=None,
        metadata={"help": "Put a layer of this width into the gates, which saves parameters; None: there is none."},
    )
    gate_lr_multiplier: float = field(
        default=5.0, metadata={"help": "Multiply the learning rate by this number for the gates."}
    )
    match_step: bool | None = field(
        default=None,
        metadata={
            "help": "Scale the learning rate of up so that a step changes the model as much as LoRA's would; None: "
            "true."
        },
    )

    before: ClassVar[Mapping[str, Any]] = {"match_step": False}

    def __post_init__(self) -> None:
        saved = self.peft_version is not None  # which PEFT writes into every file and nobody gives
        super().__post_init__()
        if self.match_step is None:
            self.match_step = self.gates and not saved
        self._require(isinstance(self.match_step, bool), "match_step", "True or False, or left out")
        self._require(isinstance(self.gates, bool), "gates", "True or False")
        finite = isinstance(self.gate_bias_init, (int, float)) and abs(self.gate_bias_init) < float("inf")
        self._require(finite, "gate_bias_init", "a finite number")
        choices = get_args(GateWeightInit)
        self._require(self.gate_weight_init in choices, "gate_weight_init", f"one of {', '.join(map(repr, choices))}")
        width = self.gate_bottleneck
        valid_width = width is None or (is_whole(width) and 0 < width <= 65536)
        self._require(valid_width, "gate_bottleneck", "a positive integer up to 65536, or None")
        multiplier = isinstance(self.gate_lr_multiplier, (int, float)) and 0 < self.gate_lr_multiplier < float("inf")
        self._require(multiplier, "gate_lr_multiplier", "a positive number")
        if not self.gates:
            for setting in fields(GatedConfig):
                if setting.name.startswith("gate_") and getattr(self, setting.name) != setting.default:
                    self._require(False, setting.name, f"{setting.default!r} (its default) without gates=True")

    @property
    def gated(self) -> bool:
        """Whether the adapter has gates."""
        return self.gates

    @property
    def own_rates(self) -> bool:
        """Whether gates, or steps of `up` that follow the diagonal, have learning rates of their own."""
        return self.gates or self.matched_steps(1.0) is not None

    def gate_overrides(self) -> dict[str, OptimizerOverride]:
        """Gates step with their multiple of the learning rate and without weight decay."""
        if not self.gates:
            return {}
        rule = OptimizerOverride(lr_multiplier=self.gate_lr_multiplier, weight_decay=0.0)
        return dict.fromkeys((role.name for role in GATE_ROLES), rule)

    def matched_steps(self, scaling: float) -> MatchedSteps | None:
        """How `up`'s steps are matched to those of a LoRA, in a layer of a new adapter; None: not at all.

        Args:
            scaling: The layer's factor `s`.
        """
        if not (self.gates and self.match_step):
            return None
        closed = math.exp(min(-self.gate_bias_init, 50.0))  # farther closed than FASTEST allows for, no overflow
        return MatchedSteps(scale=1.0, unmeasured=min(1 + closed, FASTEST))


class GatedLayer(AdapterLayer):
    """The shared form with gates, for the adapters whose configuration has them."""

    roles = (*AdapterLayer.roles, *GATE_ROLES, MATCHED)

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__(base_layer, quantization)
        #: Factor of the logits by adapter that has gates.
        self.gate_scale: dict[str, float] = {}
        #: Gates that are held where they are, (r) by adapter; then the update is static.
        self.held_gates: dict[str, torch.Tensor] = {}
        #: How steps of `up` are matched to LoRA's, by adapter; only those that are.
        self.matched: dict[str, MatchedSteps] = {}

    def start(self, config: Any, r: int) -> dict[str, torch.Tensor]:
        """LoRA's start, and almost closed gates; shapes by role as in `start_gates`."""
        return {**super().start(config, r), **self.start_gates(config, r)}

    def start_gates(self, config: GatedConfig, r: int) -> dict[str, torch.Tensor]:
        """A new adapter's gates: W_g (r, in), or (width, in) and (r, width), and b_g (r); none without gates."""
        if not config.gates:
            return {}
        drawn = config.gate_weight_init == "kaiming"
        tensors = {}
        if config.gate_bottleneck is None:
            tensors["gate_weight"] = self.drawn(r) if drawn else torch.zeros(r, self.in_features)
        else:
            # With zeros only the outer layer is zero, or neither would ever get a gradient.
            width = config.gate_bottleneck
            tensors["gate_in"] = self.drawn(width)
            tensors["gate_out"] = kaiming(r, width) if drawn else torch.zeros(r, width)
        tensors["gate_bias"] = torch.full((r,), float(config.gate_bias_init))
        return tensors

    def new_gate(self, config: GatedConfig, adapter: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The gate of one more component, (1, in or width) and (1), drawn as at the start; none without gates."""
        if not self.gated(adapter):
            return {}
        role = "gate_out" if self.has_parameter("gate_out", adapter) else "gate_weight"
        width = self.parameter(role, adapter).shape[1]
        row = torch.zeros(1, width)
        if config.gate_weight_init == "kaiming":  # uniform with a = √5
            row = (2 * torch.rand(1, width, generator=generator) - 1) / width**0.5
            if role == "gate_weight":
                row /= self.length
        return {role: row, "gate_bias": torch.full((1,), float(config.gate_bias_init))}

    def update_layer(self, adapter: str, config: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see `AdapterLayer.update_layer`."""
        super().update_layer(adapter, config, *args, **kwargs)
        if config.gates:
            self.gate_scale[adapter] = self.in_features**-0.5 if config.gate_normalize else 1.0
        self.matched.pop(adapter, None)
        if (steps := config.matched_steps(self.scaling[adapter])) is not None:
            self.matched[adapter] = steps

    def matched_rules(self, adapter: str) -> dict[str, OptimizerOverride]:
        """The rule for `up`, where its steps are matched."""
        steps = self.matched.get(adapter)
        if steps is None:
            return {}
        steps.read(self.running(MATCHED.name, adapter))
        return {"up": steps.rule}

    def present_shape(
        self, role: str, adapter: str, tensor: torch.Tensor, rank: int | None
    ) -> tuple[Sequence[int], bool]:
        """What a buffer must be where a file has it; see `RankedStorage.present_shape`."""
        if role != MATCHED.name:
            return super().present_shape(role, adapter, tensor, rank)
        if tensor.numel() == 1 and not tensor.is_meta and not -MOST <= tensor.item() <= MOST:
            raise self._refuse(f"has {role!r} {tensor.item()}", f"it must be from {-MOST} to {MOST}")
        return (1,), False

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.gate_scale.pop(adapter_name, None)
        self.held_gates.pop(adapter_name, None)
        self.matched.pop(adapter_name, None)

    def gated(self, adapter: str) -> bool:
        """Whether an adapter has gates."""
        return adapter in self.gate_scale

    def depends_on_input(self, adapter: str) -> bool:
        """Whether an adapter has gates that are not held."""
        return self.gated(adapter) and adapter not in self.held_gates

    def projections(self, adapter: str) -> Sequence[torch.Tensor]:
        """Down and W_g (or the bottleneck's inner layer): one GEMM over the input does both."""
        if not self.depends_on_input(adapter):
            return super().projections(adapter)
        gate = "gate_in" if self.has_parameter("gate_in", adapter) else "gate_weight"
        return *super().projections(adapter), self.used(gate, adapter)

    def few(self, x: torch.Tensor, adapter: str) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """`g(x) ⊙ d ⊙ down(x)`, and `up`, with the gates' bias added in the product; see `AdapterLayer.few`."""
        gated = adapter in self.gate_scale
        if gated and self.training and adapter in self.matched and self.matched[adapter].measuring:
            return None
        if gated and (
            adapter in self.held_gates
            or self.gate_scale[adapter] != 1.0
            or not self.has_parameter("gate_weight", adapter)
        ):
            return super().few(x, adapter)
        if self._frozen("frozen_down", adapter) is not None:
            return super().few(x, adapter)
        down = self.used("down", adapter)
        if x.dtype != down.dtype and self.cast_input_dtype_enabled:
            x = x.to(down.dtype)
        m = nn.functional.linear(x, down)
        if gated:
            logits = nn.functional.linear(x, self.used("gate_weight", adapter), self.used("gate_bias", adapter))
            m.mul_(logits.sigmoid_())
        fixed = self.fixed_diagonal(adapter)
        return [(m if fixed is None else m.mul_(fixed), self.used("up", adapter))]

    def pass_on(self, h: torch.Tensor, d: torch.Tensor | None, adapter: str) -> torch.Tensor:
        """`d ⊙ h`, (…, r + k); in training what the diagonal lets through is measured, where steps follow it."""
        m = super().pass_on(h, d, adapter)
        steps = self.matched.get(adapter)
        measured = steps is not None and steps.measuring and self.depends_on_input(adapter)
        if measured and d is not None and self.gathers(m, adapter):
            with torch.no_grad():
                # Whole: with gates there are no frozen components, and where room is reserved the rest is zero.
                self.matched[adapter].note(h, m)
        return m

    def plain_update(self, adapter: str) -> Update | None:
        """The update with its gates; None with a bottleneck, and where it is measured what the gates let through."""
        if not self.depends_on_input(adapter):
            return super().plain_update(adapter)
        measuring = adapter in self.matched and self.matched[adapter].measuring
        if measuring or adapter in self.probes or self.has_parameter("gate_out", adapter):
            return None
        if self._frozen("frozen_up", adapter) is not None:
            return None
        return Update(
            self.scaling[adapter],
            self.columns(adapter),
            diagonal=self.fixed_diagonal(adapter),
            gate_bias=self.used("gate_bias", adapter),
            gate_scale=self.gate_scale[adapter],
        )

    def ungated_diagonal(self, adapter: str) -> torch.Tensor | None:
        """The diagonal of the components that train, (r), where it is the same for all inputs; None with gates."""
        d = None if self.gated(adapter) else self.fixed_diagonal(adapter)
        return None if d is None else whole(d.detach())[: self.rank(adapter)]  # frozen ones come last

    def end_passes(self, adapter: str) -> None:
        """Count what the gates let through so far as that of gradients that are there."""
        super().end_passes(adapter)
        if adapter in self.matched:
            self.matched[adapter].sums.end()

    def forget_passes(self, adapter: str) -> None:
        """Forget what the gates let through where no step was made of it."""
        super().forget_passes(adapter)
        if adapter in self.matched:
            self.matched[adapter].sums.forget()

    def gathers(self, x: torch.Tensor, adapter: str) -> bool:
        """Whether a forward pass with this tensor in it is one of training, of which something may be summed up."""
        # In eval() state, too: some train in it, to have no dropout.
        if torch.compiler.is_compiling():
            return self.training or torch.is_grad_enabled()
        return torch.is_grad_enabled() and not (transforming() or not self.parameter("up", adapter).requires_grad)

    def fixed_diagonal(self, adapter: str) -> torch.Tensor | None:
        """The part of the diagonal that gates multiply, (r) for gated adapters; None for all ones."""
        return None

    def diagonal(self, adapter: str, projected: torch.Tensor | Gates) -> torch.Tensor | None:
        """g(x) ⊙ d, (…, r), with gates of 1 where they are open; the fixed diagonal alone without gates."""
        fixed = self.fixed_diagonal(adapter)
        if not self.gated(adapter) or (isinstance(projected, str) and projected == "open"):
            return fixed
        if isinstance(projected, str):
            up = self.parameter("up", adapter)
            gates = self.held_gates[adapter].to(up.device, up.dtype)
        else:
            gates = self._gates(adapter, projected)
        return gates if fixed is None else gates * fixed

    def _gates(self, adapter: str, logits: torch.Tensor) -> torch.Tensor:
        if self.has_parameter("gate_out", adapter):
            logits = nn.functional.linear(logits, self.used("gate_out", adapter).to(logits.dtype))
        if self.gate_scale[adapter] != 1.0:
            logits = logits * self.gate_scale[adapter]
        return torch.sigmoid(logits + self.used("gate_bias", adapter))

    @contextmanager
    def holding(self, adapter: str, gates: torch.Tensor) -> Iterator[None]:
        """Hold an adapter's gates at values, (r), inside, so that its update is fixed; then they are as before."""
        before = self.held_gates.get(adapter)
        self.held_gates[adapter] = gates.detach().clone()
        try:
            yield
        finally:
            if before is None:
                self.held_gates.pop(adapter, None)
            else:
                self.held_gates[adapter] = before

    @torch.no_grad()
    def gates(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """The gates for given inputs, without gradients: x (…, in) → (…, r) in (0, 1)."""
        gate = self.used("gate_in" if self.has_parameter("gate_in", adapter) else "gate_weight", adapter)
        if self.layer_kind is not None:
            x = x if self.layer_kind.integers else x.to(gate.dtype)
            return self._gates(adapter, self.layer_kind.multiply(self.get_base_layer(), x, [gate]))
        return self._gates(adapter, nn.functional.linear(x.to(gate.dtype), gate))
