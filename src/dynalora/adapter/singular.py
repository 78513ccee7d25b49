"""Starts at singular triplets of the base weight: what MiLoRA, SORSA and DisLoRA have in common.

    y = W0·x + s · (up·diag(d)·down − up₀·diag(d₀)·down₀)·x

The start up₀, d₀, down₀ stays beside the trained components, frozen, so that the model begins as the base model
whatever s is, and W0 is never edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch

from dynalora.adapter.base_weight import sizes
from dynalora.adapter.layer import AdapterLayer, Gates
from dynalora.adapter.method import Method
from dynalora.adapter.storage import Role
from dynalora.driver import Moment, OptimizerOverride
from dynalora.errors import ConfigError
from dynalora.spectral.decomposition import Triplets, decompose_each
from dynalora.spectral.triplets import Which

#: Without a rank's dimension, since each trained component stands beside the frozen one that it started from.
TWIN_ROLES = (Role("down"), Role("up"), Role("frozen_down", trains=False), Role("frozen_up", trains=False))


class TwinLayer(AdapterLayer):
    """The shared form with r trained components that start at singular triplets, and r frozen ones that cancel them."""

    roles: ClassVar[tuple[Role, ...]] = TWIN_ROLES

    @classmethod
    def check_base_layer(cls, base_layer: torch.nn.Module, name: str, config: Any, r: int) -> None:
        """Check that a module can be adapted, and has as many singular values as the adapter has components."""
        super().check_base_layer(base_layer, name, config, r)
        inputs, outputs = sizes(base_layer)
        if r > min(inputs, outputs):
            raise ConfigError(
                f"{type(config).__name__}: r={r} is more than the {min(inputs, outputs)} singular values of {name!r}, "
                f"a {outputs} × {inputs} layer; lower r, give such layers a smaller one with rank_pattern, or leave "
                "them out with exclude_modules."
            )

    def start(self, config: Any, r: int) -> dict[str, torch.Tensor]:
        """Zeros that `begin_at` fills in: up (out, r), down (r, in), and the frozen ones of the same shapes."""
        frozen = {"frozen_down": torch.zeros(r, self.in_features), "frozen_up": torch.zeros(self.out_features, r)}
        if not config.init_weights:
            return {**super().start(config, r), **frozen}
        return {"down": torch.zeros(r, self.in_features), "up": torch.zeros(self.out_features, r), **frozen}

    def weights(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The diagonals of the trained components and of the frozen ones, (r) each: ones."""
        ones = self.parameter("up", adapter).new_ones(self.rank(adapter))
        return ones, ones

    def diagonals(self, adapter: str, projected: torch.Tensor | Gates, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """D and −d₀, (r) each."""
        trained, start = self.weights(adapter)
        return trained, -start

    def diagonal(self, adapter: str, projected: torch.Tensor | Gates) -> torch.Tensor:
        """(d, −d₀), (2r), and what else `diagonals` has for frozen components."""
        return torch.cat(self.diagonals(adapter, projected, self.rank(adapter)))

    def begin(self, adapter: str, triplets: Triplets) -> dict[str, torch.Tensor]:
        """What the parameters start at, by role: the singular vectors, r of them."""
        return {"up": triplets.up, "down": triplets.down}

    @torch.no_grad()
    def begin_at(self, adapter: str, triplets: Triplets) -> None:
        """Start the trained components at singular triplets of the base weight, r of them, and keep the start."""
        for role, value in self.begin(adapter, triplets).items():
            parameter = self.parameter(role, adapter)
            # Half precision would lose the orthonormality that they stand for.
            parameter.data = value.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32)).clone()
        for role, row in self.buffer_roles.items():
            tensor = self.running(role, adapter) if row.saved == "always" else None
            if tensor is not None and tensor.is_floating_point():
                self._buffers_of(role)[adapter] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        self.keep_start(adapter)

    def keep_start(self, adapter: str) -> None:
        """Copy the trained components to the frozen ones, which come first among those."""
        r = self.rank(adapter)
        self.buffer("frozen_up", adapter)[:, :r] = self.parameter("up", adapter)
        self.buffer("frozen_down", adapter)[:r] = self.parameter("down", adapter)

    @torch.no_grad()
    def zero_update(self, adapter: str) -> None:
        """Make the update zero, to rounding: the trained components go back to their start."""
        r = self.rank(adapter)
        self.parameter("up", adapter).copy_(self.buffer("frozen_up", adapter)[:, :r])
        self.parameter("down", adapter).copy_(self.buffer("frozen_down", adapter)[:r])


class SingularLayer(TwinLayer):
    """The same with up = U, d = S and down = Vᵀ, all of which train."""

    roles: ClassVar[tuple[Role, ...]] = (*TWIN_ROLES, Role("sigma"), Role("start_sigma", trains=False))

    def start(self, config: Any, r: int) -> dict[str, torch.Tensor]:
        """As `TwinLayer.start`, and sigma (r) with its start; without `init_weights` random orthonormal factors."""
        tensors = {**super().start(config, r), "sigma": torch.zeros(r), "start_sigma": torch.zeros(r)}
        if not config.init_weights:
            tensors["up"] = torch.linalg.qr(torch.randn(self.out_features, r)).Q
            tensors["down"] = torch.linalg.qr(torch.randn(self.in_features, r)).Q.t().contiguous()
            tensors["sigma"] = torch.ones(r)
        return tensors

    def weights(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """S and S₀, (r) each."""
        sigma = self.parameter("sigma", adapter)
        return sigma, self.buffer("start_sigma", adapter).to(sigma.dtype)

    def begin(self, adapter: str, triplets: Triplets) -> dict[str, torch.Tensor]:
        """U, S and Vᵀ."""
        return {**super().begin(adapter, triplets), "sigma": triplets.values}

    @torch.no_grad()
    def take_factors(self, adapter: str, up: torch.Tensor, down: torch.Tensor) -> None:
        """Take factors with singular values of 1, and nothing that cancels them."""
        super().take_factors(adapter, up, down)
        self.parameter("sigma", adapter).data = torch.ones_like(self.parameter("up", adapter)[0])

    def keep_start(self, adapter: str) -> None:
        """Copy the trained components and their singular values."""
        super().keep_start(adapter)
        self.buffer("start_sigma", adapter).copy_(self.parameter("sigma", adapter))

    @torch.no_grad()
    def zero_update(self, adapter: str) -> None:
        """Make the update zero, to rounding: the triplets go back to their start."""
        super().zero_update(adapter)
        self.parameter("sigma", adapter).copy_(self.buffer("start_sigma", adapter))


class TwinMethod(Method):
    """What methods do whose layers are of the classes above."""

    #: Which singular triplets the adapter starts at.
    which: ClassVar[Which]

    def prepare(self, layers: Mapping[str, AdapterLayer], adapter: str, config: Any) -> None:
        """Start every layer at singular triplets of its base weight."""
        if not config.init_weights:
            return
        fresh = [cast(TwinLayer, layer) for layer in layers.values() if not layer.parameter("up", adapter).is_meta]
        for index, triplets in self.triplets(fresh, adapter):
            fresh[index].begin_at(adapter, triplets)

    def triplets(self, layers: Sequence[TwinLayer], adapter: str) -> Iterator[tuple[int, Triplets]]:
        """The triplets that each layer starts at, as many as its rank, with the layer's place among all."""
        return decompose_each(
            [layer.base_matrix for layer in layers],
            [layer.rank(adapter) for layer in layers],
            which=self.which,
            describe="Decomposing the base weights",
        )

    def keeps_components(self, moment: Moment, trains: bool) -> str:
        """Each trained component stands beside the frozen one that it started from."""
        name = self.title or self.name
        return (
            f"{name}'s components start as directions of the base weight, each with a frozen counterpart to cancel "
            "it, so none is without effect; export it with max_rank or tolerance to make it smaller."
        )

    def optimizer_overrides(self, config: Any, layer: AdapterLayer, adapter: str) -> dict[str, OptimizerOverride]:
        """No weight decay, which would pull on the base weight's own directions."""
        return dict.fromkeys(layer.parameter_roles, OptimizerOverride(weight_decay=0.0))
