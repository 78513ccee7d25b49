"""The rows of the matrix: a new method joins every test in this folder by adding its row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import dynalora
from dynalora.adapter.layer import adapter_layers
from tests.toys import TOYS, Toy


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give random values to what diagonals are made of and to frozen components, so that none of them is 1 or 0."""
    generator = torch.Generator().manual_seed(7)
    for layer in adapter_layers(model).values():
        for adapter in layer.scaling:
            for role, tensor in layer.saved_tensors(adapter).items():
                if not tensor.is_floating_point():
                    continue
                between = tensor.ndim == 1 or len(layer.rank_axes.get(role, ())) > 1  # diagonals, cores
                if role in layer.buffer_roles or between:
                    noise = torch.randn(tensor.shape, generator=generator)
                    for dim in layer.rank_axes.get(role, ()):  # room that is not in use stays zero
                        tensor, noise = (part.narrow(dim, 0, layer.rank(adapter)) for part in (tensor, noise))
                    tensor.add_((0.3 if between else 0.1) * noise.to(tensor))


@dataclass(frozen=True)
class Row:
    """One method with one set of its own options. The name is free."""

    name: str
    config: type
    static: bool
    """The update is one fixed matrix, so it has a delta weight, merges and exports."""
    options: Mapping[str, Any] = field(default_factory=dict)
    exact_start: bool = True
    """The start is the base model bit for bit, not only to rounding."""
    alone: bool = False
    """The adapter scales the whole weight by norms, which are constants to its gradient. So it cannot be active, or
    merged, together with others, and rounding of the norms depends on where tensors lie in memory."""

    @property
    def needs_weights(self) -> bool:
        """Whether the values of the base weight are read at the start."""
        of_the_weight = dynalora.DisloraConfig, dynalora.LoraDashConfig, dynalora.MiloraConfig, dynalora.SorsaConfig
        return self.config in of_the_weight or self.alone or self.options.get("init_weights") == "pissa"

    @property
    def plain_factors(self) -> bool:
        """Whether the update is the product of the layer's own factors where the diagonal is all ones."""
        more = (dynalora.LoraDashConfig, dynalora.MiloraConfig, dynalora.SorsaConfig, dynalora.RasaConfig)
        return self.config not in more and not self.alone and self.options.get("init_weights") != "pissa"

    @property
    def prefix(self) -> str:
        """What names of parameters begin with."""
        return f"{self.config.method}_"

    def configure(self, toy: Toy, **overrides: Any) -> Any:
        common = {
            "r": 4,
            "alpha": 8,
            "target_modules": list(toy.targets),
            "task_type": toy.task_type,
            "total_steps": 20,
        }
        if overrides.get("init_weights") is False and "init_weights" in self.options:
            del overrides["init_weights"]  # `adapt` changes the function all the same
        return self.config(**{**common, **self.options, **overrides})

    def assert_start(self, logits: Tensor, base: Tensor) -> None:
        """Check the logits of a fresh adapter against the base model's."""
        if self.exact_start:
            assert torch.equal(logits, base)
        elif base.dtype != torch.float32:
            assert (logits - base).abs().max() < 0.05 * base.abs().max()
        else:
            torch.testing.assert_close(logits, base, atol=2e-5, rtol=2e-5)

    def assert_same(self, logits: Tensor, expected: Tensor) -> None:
        """Check that an adapter loaded elsewhere computes the same, bit for bit where that can be."""
        if self.alone:
            torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(logits, expected)

    def adapt(self, toy: Toy, base: nn.Module | None = None, **overrides: Any) -> Any:
        """``base`` (a fresh toy by default) with one adapter in evaluation mode.

        With ``init_weights=False`` the diagonal is random too, so that whatever forgets it computes another update.
        """
        model = peft.get_peft_model(toy.build() if base is None else base, self.configure(toy, **overrides))
        if overrides.get("init_weights") is False:
            randomise(model)
        return model.eval()


# Ranks grow at every step from the second on.
GROWTH = {"grow_start": 2, "grow_interval": 1, "target_rank": 6}

ROWS = (
    Row("dira", dynalora.DiraConfig, static=True),
    Row("dira-variational", dynalora.DiraConfig, static=True, options={"penalty": "variational"}),
    Row("dira-rslora", dynalora.DiraConfig, static=True, options={"use_rslora": True}),
    # After three steps half of the parameters are left.
    Row("dira-target", dynalora.DiraConfig, static=True, options={"target_rank": 0.5, "total_steps": 5}),
    Row("disel", dynalora.DiselConfig, static=False),
    Row("disel-normalize", dynalora.DiselConfig, static=False, options={"gate_normalize": True}),
    Row("disel-bottleneck", dynalora.DiselConfig, static=False, options={"gate_bottleneck": 2}),
    Row("disel-zeros", dynalora.DiselConfig, static=False, options={"gate_weight_init": "zeros"}),
    Row("dislora", dynalora.DisloraConfig, static=True, exact_start=False, options={"warmup_steps": 1}),
    Row(
        "dislora-star",
        dynalora.DisloraConfig,
        static=True,
        exact_start=False,
        options={"ortho_weight": 5e-5, "tsd_score": "update", "warmup_steps": 2, "use_rslora": True},
    ),
    Row(
        "dislora-without-directions",
        dynalora.DisloraConfig,
        static=True,
        exact_start=False,
        options={"tsd_count": 0, "loss_smoothing": 0.5},
    ),
    # From step 2 on ranks move at every step, so what the tests train has other ranks than it began with.
    Row("pedyra", dynalora.PedyraConfig, static=True, options={"adjust_size": 2}),
    Row("pedyra-reserved", dynalora.PedyraConfig, static=True, options={"adjust_size": 2, "max_rank": 9}),
    Row("dylora", dynalora.DyloraConfig, static=True),
    Row("dylora-frozen", dynalora.DyloraConfig, static=True, options={"variant": "frozen", "min_rank": 2}),
    Row("increlora", dynalora.IncreloraConfig, static=True, exact_start=False, options=GROWTH),
    Row(
        "increlora-reserved",
        dynalora.IncreloraConfig,
        static=True,
        options={**GROWTH, "advance_learning": False, "max_rank": 9, "grow_rank": 2},
    ),
    Row("triadaptlora", dynalora.TriAdaptLoraConfig, static=True, options=GROWTH),
    Row(
        "triadaptlora-reserved",
        dynalora.TriAdaptLoraConfig,
        static=True,
        options={**GROWTH, "growth": "exponential", "max_rank": 9, "grow_rank": 2, "use_rslora": True},
    ),
    Row("milora", dynalora.MiloraConfig, static=True, exact_start=False),
    Row("rasa", dynalora.RasaConfig, static=True),
    Row("rasa-shared", dynalora.RasaConfig, static=True, options={"shared_rank": 3, "use_rslora": True}),
    Row("sorsa", dynalora.SorsaConfig, static=True, exact_start=False),
    Row("loradash", dynalora.LoraDashConfig, static=True, options={"warmup_steps": 1}),
    # Combinations, whose names begin with what is combined with the method.
    Row("gates-dira", dynalora.DiraConfig, static=False, options={"gates": True}),
    Row("gates-pedyra", dynalora.PedyraConfig, static=False, options={"adjust_size": 2, "gates": True}),
    Row(
        "dora-pedyra",
        dynalora.PedyraConfig,
        static=True,
        exact_start=False,
        alone=True,
        options={"adjust_size": 2, "use_dora": True},
    ),
    Row(
        "pissa-pedyra",
        dynalora.PedyraConfig,
        static=True,
        exact_start=False,
        options={"adjust_size": 2, "init_weights": "pissa"},
    ),
)

STATIC = tuple(row for row in ROWS if row.static)
DYNAMIC = tuple(row for row in ROWS if not row.static)
FIRST_OF_EACH_METHOD = tuple(
    row for index, row in enumerate(ROWS) if row.config not in {earlier.config for earlier in ROWS[:index]}
)
TRANSFORMERS = tuple(toy for toy in TOYS.values() if toy.task_type is not None)

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
every_method = pytest.mark.parametrize("row", FIRST_OF_EACH_METHOD, ids=lambda row: row.name)
every_static_row = pytest.mark.parametrize("row", STATIC, ids=lambda row: row.name)
every_dynamic_row = pytest.mark.parametrize("row", DYNAMIC, ids=lambda row: row.name)
every_toy = pytest.mark.parametrize("toy", TOYS.values(), ids=lambda toy: toy.name)
every_transformer = pytest.mark.parametrize("toy", TRANSFORMERS, ids=lambda toy: toy.name)
