"""A compiled model in training: one graph without breaks, and no new one when ranks move or schedules end."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora.adapter.layer import adapter_layers
from tests.toys import MLP

STEPS = 14
MOVING = {"adjust_start": 2, "adjust_interval": 2, "adjust_end": 10, "adjust_size": 1, "max_rank": 6}

# How many graphs there may be: another where a measurement in the forward pass has ended, as of gates that are matched
# (after step 8) and of inputs that are scored (after the last adjustment).
RUNS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "dira": (dynalora.DiraConfig, {"total_steps": STEPS}, 1),
    "disel": (dynalora.DiselConfig, {}, 2),
    "dislora": (dynalora.DisloraConfig, {"total_steps": STEPS}, 1),
    "pedyra": (dynalora.PedyraConfig, {"total_steps": STEPS, **MOVING}, 2),
}


@pytest.mark.parametrize("name", ["disel", *(pytest.param(n, marks=pytest.mark.slow) for n in RUNS if n != "disel")])
def test_a_run_compiles_once(name: str) -> None:
    config, options, most = RUNS[name]
    torch.manual_seed(0)
    model = peft.get_peft_model(MLP(), config(r=4, target_modules=["first", "second"], **options)).train()
    before = [layer.rank("default") for layer in adapter_layers(model).values()]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.base_model.model, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        torch.nn.functional.cross_entropy(compiled(x), torch.arange(8) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [layer.rank("default") for layer in adapter_layers(model).values()]
    assert (before != after) == (name == "pedyra")
    assert counter.frame_count == most
