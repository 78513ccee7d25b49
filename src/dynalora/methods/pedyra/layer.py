"""The layer of PE-DyRA: the shared form with a trained diagonal, and the inputs' squares that its scores need."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dynalora.adapter.gates import GATE_ROLES
from dynalora.adapter.layer import kaiming
from dynalora.adapter.matching import ROLE as MATCHED
from dynalora.adapter.passes import PassSum
from dynalora.adapter.storage import FACTORS, Role
from dynalora.common.private import version
from dynalora.common.processes import process_count
from dynalora.methods.pedyra.dora import DoraLayer
from dynalora.methods.pedyra.settings import AdjustmentPlan, PedyraConfig
from dynalora.spectral.decomposition import Triplets

ROLES = ("down", "e", "up")


class PedyraLayer(DoraLayer):
    """The shared form with d = e, times gates where they are wanted."""

    method_name = "pedyra"
    roles = (
        *FACTORS,
        Role("e", rank_dim=0),
        Role("magnitude"),  # (out): the rows' norms, with use_dora only
        *GATE_ROLES,
        MATCHED,
        # Ī and Ū of each parameter, in its shape without room, and m of the inputs, (in).
        *(
            Role(f"{kind}_{name}", trains=False, rank_dim=dim, saved="present")
            for kind in ("sensitivity", "uncertainty")
            for name, dim in (("down", 0), ("up", 1), ("e", 0))
        ),
        Role("inputs", trains=False, saved="present"),
        # The triplets that training began with, with init_weights="pissa": the update is what has become of them since.
        Role("frozen_down", trains=False, saved="present"),
        Role("frozen_up", trains=False, saved="present"),
        Role("record", trains=False, saved="present"),  # kept by the first layer
        Role("gradient_norms", trains=False, saved="present"),  # of down, e and up, (3), with diagnostics; likewise
    )

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        super().__init__(base_layer, quantization)
        # Plain attributes: as buffers, data parallelism would overwrite them with the first process's.
        self.gathering: dict[str, bool] = {}
        # The inputs' squares, with the number of tokens, (in + 1).
        self.gathered: dict[str, PassSum] = {}

    def start(self, config: PedyraConfig, r: int) -> dict[str, torch.Tensor]:
        """Orthonormal directions, or factors drawn from N(0, 0.02²), and e = 0; or LoRA's start with e = 1."""
        more = self.start_gates(config, r)
        if config.use_dora:
            more["magnitude"] = self._base_squares().sqrt()
        if not config.init_weights:
            return {"down": self.drawn(r), "up": kaiming(self.out_features, r), "e": torch.ones(r), **more}
        if config.mode == "static":
            return {**super().start(config, r), "e": torch.ones(r), **more}
        if config.init_weights == "orthogonal":
            down, up = _directions(r, self.in_features), _directions(r, self.out_features).t().contiguous()
            return {"down": down, "up": up, "e": torch.zeros(r), **more}
        return {
            "down": 0.02 * torch.randn(r, self.in_features),
            "up": 0.02 * torch.randn(self.out_features, r),
            "e": torch.zeros(r),
            **more,
        }

    def reserve(self, config: PedyraConfig, r: int) -> int:
        """Room for what the rank can become, where shapes must stay as they are."""
        if config.inference_mode or (config.max_rank is None and not process_count() > 1):
            return 0
        return max(r, self.limit(config, r))

    def limit(self, config: PedyraConfig, r: int) -> int:
        """The largest rank that can come of rank `r`."""
        orthogonal = min(self.in_features, self.out_features)
        if config.max_rank is not None:
            return min(orthogonal, config.max_rank)
        if not process_count() > 1:
            return orthogonal
        try:
            growth = AdjustmentPlan.of(config, config.total_steps).count
        except ValueError:  # fractions of a run of unknown length: rounding can only make adjustments fewer
            times = (config.adjust_start, config.adjust_interval, config.adjust_end)
            if any(time >= 1 for time in times):
                growth = 3 * r
            else:
                growth = int((times[2] - times[0]) / times[1] + 1e-6) + 1
        return min(orthogonal, r + (growth if config.mode in ("both", "expand") else 0))

    def update_layer(self, adapter: str, config: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; see `AdapterLayer.update_layer`."""
        super().update_layer(adapter, config, *args, **kwargs)
        # Until the first step says what its schedule is, every input may matter.
        self.gathering[adapter] = config.uses_inputs
        self.gathered[adapter] = PassSum()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.gathering.pop(adapter_name, None)
        self.gathered.pop(adapter_name, None)

    def present_shape(
        self, role: str, adapter: str, tensor: torch.Tensor, rank: int | None
    ) -> tuple[Sequence[int], bool]:
        """What a buffer must be where a file has it; see `RankedStorage.present_shape`."""
        kind, _, name = role.partition("_")
        if kind in ("sensitivity", "uncertainty"):
            shape = list(self.parameter(name, adapter).shape)
            shape[self.rank_dims[name]] = self.ranks[adapter] if rank is None else rank
            return shape, True
        if role == "inputs":
            return (self.in_features,), True
        if role == "gradient_norms":
            return (3,), True
        if role == "record":
            return (tensor.numel(),), False
        if role in ("frozen_down", "frozen_up"):
            count = tensor.shape[0 if role == "frozen_down" else -1] if tensor.ndim == 2 else 0
            return (count, self.in_features) if role == "frozen_down" else (self.out_features, count), True
        return super().present_shape(role, adapter, tensor, rank)

    @torch.no_grad()
    def start_from(self, adapter: str, largest: Triplets) -> None:
        """W0's largest singular triplets become the triples, and their frozen negative cancels them at the start."""
        u, sigma, vt = largest.up, largest.values / self.scaling[adapter], largest.down
        for role, value in (("down", vt), ("up", u), ("e", sigma)):
            self.used(role, adapter).copy_(value)
        dtype = self.parameter("e", adapter).dtype
        self.set_running("frozen_down", adapter, vt.to(dtype).contiguous())
        self.set_running("frozen_up", adapter, (-u * sigma).to(dtype).contiguous())

    @torch.no_grad()
    def zero_update(self, adapter: str) -> None:
        """Make the update zero: `up` is, and what else changes the function goes back to where it changes nothing."""
        super().zero_update(adapter)
        # They cancel PiSSA's start, of which nothing is left.
        self.set_running("frozen_down", adapter, None)
        self.set_running("frozen_up", adapter, None)

    @torch.no_grad()
    def take_factors(self, adapter: str, up: torch.Tensor, down: torch.Tensor) -> None:
        """Take factors with e = 1."""
        super().take_factors(adapter, up, down)
        self.parameter("e", adapter).data = torch.ones_like(self.parameter("up", adapter)[0])

    def fixed_diagonal(self, adapter: str) -> torch.Tensor:
        """e, (r); with the frozen triplets of PiSSA's start (e, 1), since theirs is in their up factor."""
        e, frozen = self.used("e", adapter), self.running("frozen_up", adapter)
        return e if frozen is None else torch.cat([e, e.new_ones(frozen.shape[1])])

    def note_input(self, x: torch.Tensor, made: torch.Tensor, adapter: str) -> None:
        """In training the inputs' squares are added up on the way; x (…, in)."""
        if self.gathering[adapter] and self.gathers(x, adapter):
            self._gather(x, made, adapter)

    def few(self, x: torch.Tensor, adapter: str) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """As other layers; None where squares are added up."""
        return None if self.training and self.gathering[adapter] else super().few(x, adapter)

    @torch.no_grad()
    def _gather(self, x: torch.Tensor, made: torch.Tensor, adapter: str) -> None:
        squares = _squares(x) if self.layer_kind is None else self.layer_kind.squares(self.get_base_layer(), x)
        self.gathered[adapter].add(squares, made)

    def end_passes(self, adapter: str) -> None:
        """Count the inputs so far as those of gradients that are there; see `AdapterLayer.end_passes`."""
        super().end_passes(adapter)
        self.gathered[adapter].end()

    def forget_passes(self, adapter: str) -> None:
        """Forget the inputs of gradients that no step was made of; see `AdapterLayer.forget_passes`."""
        super().forget_passes(adapter)
        self.gathered[adapter].forget()

    def take_gathered(self, adapter: str) -> torch.Tensor | None:
        """The inputs' sums of squares since the last step, with the number of tokens, (in + 1), and no more of them."""
        return self.gathered[adapter].take()


def _directions(count: int, features: int) -> torch.Tensor:
    """Random unit rows (count, features), orthogonal to each other as long as there are no more than features."""
    rows = torch.randn(count, features)
    unit: torch.Tensor = rows / rows.norm(dim=1, keepdim=True)
    basis: torch.Tensor = torch.linalg.qr(rows.t()).Q.t()
    return unit if count > features else basis.contiguous()


# The last input and its sums: q, k and v projections, and those of a gated MLP, have theirs in common.
_last: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None


def _squares(x: torch.Tensor) -> torch.Tensor:
    """Sums over all tokens of the squares of x (…, in), and the number of tokens: (in + 1)."""
    global _last
    if torch.compiler.is_compiling():
        return _sum_squares(x)
    last = _last  # another thread may put its own there
    if last is not None and last[0]() is x and last[1] == version(x):
        return last[2]
    result = _sum_squares(x)
    _last = weakref.ref(x), version(x), result
    return result


def _sum_squares(x: torch.Tensor) -> torch.Tensor:
    flat = x.detach().reshape(-1, x.shape[-1])
    dtype = torch.promote_types(x.dtype, torch.float32)
    if flat.device.type == "cpu":
        # A product with ones is the fastest sum over rows on a CPU.
        with torch.autocast("cpu", enabled=False):
            squares = (flat.new_ones(1, flat.shape[0], dtype=dtype) @ flat.to(dtype).square())[0]
    else:
        squares = torch.linalg.vector_norm(flat, dim=0, dtype=dtype).square()
    return torch.cat([squares, squares.new_full((1,), flat.shape[0])])
