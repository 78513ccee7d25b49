"""What a training step of three projections of one input costs, counted: a regression is seen without a clock.

Three layers (48 → 40, 24 and 24) get one input of 50 tokens, with adapters of rank 4. The base layers alone take 3
products forward and 3 backward (the input's gradient), and 2 passes to add those gradients up. An adapter must add, per
layer, an up product forward, and the gradients of `up` and of the narrow activations backward; and per input, however
many layers share it, one product with all that meets it forward, and the gradients of the input and of those matrices
backward. That is 3 + 3 + 1 = 7 products forward, and 3 + 6 + 2 = 11 backward. PEFT's LoRA takes 9 and 15.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dynalora
from dynalora.adapter.config import AdapterConfig
from dynalora.driver import Driver
from tests.counting import Operations, Work, work

TOKENS, INPUT, RANK = 50, 62, 4
OUTPUTS = {"q_proj": 38, "k_proj": 26, "v_proj": 26}
OUT = sum(OUTPUTS.values())
WIDE = frozenset(TOKENS * size for size in (INPUT, *OUTPUTS.values()))
X = TOKENS * INPUT * 4
"""Bytes of the input in float32."""

BASE = TOKENS * INPUT * OUT
"""Multiplications of the base products, forward, and likewise backward."""


def adapter(rows: int, columns: int, trained_rows: int | None = None, trained_columns: int | None = None) -> Any:
    """Multiplications of three adapters, forward and backward.

    Args:
        rows: What meets the input, per layer.
        columns: What meets the result, per layer.
        trained_rows: Of the rows, those that train; None for all.
        trained_columns: Likewise.
    """
    there = TOKENS * (3 * rows * INPUT + columns * OUT)
    back = TOKENS * (3 * (rows + (trained_rows or rows)) * INPUT + (columns + (trained_columns or columns)) * OUT)
    return BASE + there, BASE + back


class Projections(nn.Module):
    """Three layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        for name, out in OUTPUTS.items():
            setattr(self, name, nn.Linear(INPUT, out, bias=False))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [getattr(self, name)(x) for name in OUTPUTS]


def counted(config: type | None, dtype: torch.dtype = torch.float32, steps: int = 8, **options: Any) -> Work:
    torch.manual_seed(0)
    model: Any = Projections().to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config is not None:
        if issubclass(config, AdapterConfig):
            options = {"total_steps": 1000, **options}
        model = peft.get_peft_model(model, config(r=RANK, target_modules=list(OUTPUTS), **options)).train()
    x = torch.randn(1, TOKENS, INPUT, dtype=dtype).requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained:  # the driver watches what happens until the first step, and gates are measured at each of the first 8
        optimizer = torch.optim.SGD(trained, lr=0.0)
        for _ in range(steps):
            sum(result.sum() for result in model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    x.grad = None
    return work(model, lambda: model(x), WIDE)


N = TOKENS * RANK * 4
"""Bytes of one layer's narrow activations, (tokens, rank)."""


def test_the_base_layers_alone() -> None:
    assert counted(None) == Work((3, 3), (BASE, BASE), (0, 2), (3, 5), 0)


def test_peft_lora_for_comparison() -> None:
    """Per layer it scales the wide update, adds it, and goes the same way back; and more gradients are added up."""
    assert counted(peft.LoraConfig) == Work((9, 15), adapter(RANK, RANK), (6, 8), (15, 23), X + 3 * N)
    half = counted(peft.LoraConfig, torch.bfloat16)
    assert half == Work((9, 15), adapter(RANK, RANK), (12, 17), (21, 32), 3 * X + 3 * N)


PLAIN, GATED, FROZEN = adapter(RANK, RANK), adapter(2 * RANK, RANK), adapter(2 * RANK, 2 * RANK, RANK, RANK)
DIRECTED = adapter(2 * RANK + 8, 2 * RANK + 8, RANK, RANK)
DIAGONALS = 3 * 4 * (2 * RANK + 8)

METHODS = {
    # The least: each layer's three gradients, and the copy that turns `up`'s; two joins and six products of the input.
    "dira": (dynalora.DiraConfig, {}, Work((7, 11), PLAIN, (0, 0), (8, 16), X + 3 * N)),
    # What the diagonal has to do with: the product with it, and both its gradients; what is multiplied is kept.
    "pedyra": (dynalora.PedyraConfig, {}, Work((7, 11), PLAIN, (0, 0), (11, 25), X + 6 * N)),
    # The gates' rows meet the input together with `down`; sum, sigmoid and product per layer, and their gradients.
    "disel": (dynalora.DiselConfig, {}, Work((7, 11), GATED, (0, 0), (17, 31), X + 12 * N)),
    "dira with gates": (dynalora.DiraConfig, {"gates": True}, Work((7, 11), GATED, (0, 0), (17, 31), X + 12 * N)),
    # Frozen components take part in the products, but get no gradient.
    "milora": (dynalora.MiloraConfig, {}, Work((7, 11), FROZEN, (0, 0), (23, 23), X + 6 * N + 3 * 4 * 2 * RANK)),
    "dislora": (
        dynalora.DisloraConfig,
        {"ortho_weight": 1e-5},
        Work((7, 11), DIRECTED, (0, 0), (23, 29), X + 3 * 2 * 4 * N + DIAGONALS),
    ),
    # Each layer drops other parts of the input, so each reads, keeps and differentiates one of its own.
    "dira with dropout": (dynalora.DiraConfig, {"dropout": 0.1}, Work((9, 15), PLAIN, (9, 8), (18, 26), 6 * X + 3 * N)),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_float32(name: str) -> None:
    config, options, expected = METHODS[name]
    assert counted(config, **options) == expected


def test_measuring_gates_reads_nothing_wide() -> None:
    """Per layer two sums of squares of narrow activations; in few of all steps."""
    config, options, usual = METHODS["disel"]
    measured = counted(config, steps=1, **options)
    assert measured == replace(usual, calls=(measured.calls[0], usual.calls[1]))
    assert usual.calls[0] < measured.calls[0] <= usual.calls[0] + 3 * 7


def test_the_rows_of_other_methods_are_one_product_too() -> None:
    for config in (dynalora.DyloraConfig, dynalora.LoraDashConfig, dynalora.RasaConfig, dynalora.SorsaConfig):
        found = counted(config)
        assert (found.products, found.passes) == ((7, 11), (0, 0)), config


def test_a_step_in_half_precision() -> None:
    """The input is kept in its own data type, and cast for the adapters once each way: one pass forward and one back.

    Per layer more are cast: narrow activations and `up` to the result's data type, each way, and the gradient of the
    narrow ones and of `up` back.
    """
    found = counted(dynalora.DiraConfig, torch.bfloat16)
    assert found == Work((7, 11), PLAIN, (1, 1), (15, 28), X // 2 + 3 * N)


def test_generation_computes_less_than_peft_lora() -> None:
    """Operations of the three layers for two tokens without gradients, views left out; LoRA's: 5 per layer."""
    counts, x = {}, torch.randn(1, 2, INPUT)
    for name, config in {"lora": peft.LoraConfig, "dira": dynalora.DiraConfig, "disel": dynalora.DiselConfig}.items():
        model: Any = Projections()
        options = {} if name == "lora" else {"total_steps": 9}
        model = peft.get_peft_model(model, config(r=RANK, target_modules=list(OUTPUTS), **options)).eval()
        with torch.no_grad(), Operations(WIDE) as operations:
            model(x)
        counts[name] = len(operations.names)
    assert counts == {"lora": 15, "dira": 9, "disel": 18}


class Reads(TorchDispatchMode):
    """Counts numbers that Python reads from tensors, and tensors that it makes of numbers: on a device both wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "lift_fresh", "nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["dira", "disel", "dislora", "pedyra"])
def test_a_usual_step_reads_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the look at gradients, which on a device is read a step later; see the tests on one."""
    monkeypatch.setattr(Driver, "_look", lambda *args: None)
    config: Any = getattr(dynalora, f"{name.title()}Config")
    options: dict[str, Any] = {"disel": {}, "dislora": {"warmup_steps": 90}}.get(name, {})
    model: Any = peft.get_peft_model(
        Projections(), config(r=RANK, target_modules=list(OUTPUTS), total_steps=900, **options)
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)  # reads none itself
    reads = Reads()
    for step in range(11):  # gates are measured at the first eight steps, and at the tenth
        sum(result.square().mean() for result in model(torch.randn(1, 2, INPUT))).backward()
        with reads if step == 10 else nullcontext():
            optimizer.step()
        optimizer.zero_grad()
    assert reads.count == 0
