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
from tests.toys import TOYS, Toy


@dataclass(frozen=True)
class Row:
    """One method with one set of its own options."""

    name: str
    config: type
    static: bool
    """The update is one fixed matrix, so it has a delta weight, merges and exports."""
    options: Mapping[str, Any] = field(default_factory=dict)
    exact_start: bool = True
    """The start is the base model bit for bit, not only to rounding."""

    def configure(self, toy: Toy, **overrides: Any) -> Any:
        common = {
            "r": 4,
            "alpha": 8,
            "target_modules": list(toy.targets),
            "task_type": toy.task_type,
            "total_steps": 20,
        }
        return self.config(**{**common, **self.options, **overrides})

    def assert_start(self, logits: Tensor, base: Tensor) -> None:
        """Check the logits of a fresh adapter against the base model's."""
        if self.exact_start:
            assert torch.equal(logits, base)
        else:
            torch.testing.assert_close(logits, base, atol=2e-5, rtol=2e-5)

    def adapt(self, toy: Toy, base: nn.Module | None = None, **overrides: Any) -> Any:
        """``base`` (a fresh toy by default) with one adapter in evaluation mode."""
        model = peft.get_peft_model(toy.build() if base is None else base, self.configure(toy, **overrides))
        return model.eval()


ROWS = (
    Row("dira", dynalora.DiraConfig, static=True),
    Row("dira-variational", dynalora.DiraConfig, static=True, options={"penalty": "variational"}),
    Row("dira-rslora", dynalora.DiraConfig, static=True, options={"use_rslora": True}),
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
