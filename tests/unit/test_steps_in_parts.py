"""What methods compute at a step for many matrices at once, in parts on a CPU: the parts are the whole."""

from __future__ import annotations

from typing import Any, Literal

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynalora.adapter.gradients import add_to_gradients, stackable
from dynalora.adapter.layer import adapter_layers
from dynalora.common import devices
from dynalora.common.devices import in_turn
from dynalora.methods import config_class
from tests.toys import TOYS

LLAMA = TOYS["llama"]


@given(
    count=st.integers(0, 40),
    each=st.integers(1, 1 << 19),
    device=st.sampled_from([torch.device("cpu"), torch.device("meta")]),
)
def test_parts_are_everything_once_in_order(count: int, each: int, device: torch.device) -> None:
    items = list(range(count))
    parts = in_turn(items, count * each, device)
    assert [item for part in parts for item in part] == items
    if device.type != "cpu":
        assert len(parts) == 1
    else:
        assert all(len(part) == 1 or len(part) * each <= devices._IN_CACHE for part in parts)


@given(data=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans()), max_size=12))
def test_only_what_can_be_stacked_is_together(data: list[tuple[int, int, bool]]) -> None:
    items = [(torch.empty(rows, columns), apart) for rows, columns, apart in data]
    groups = stackable(items, lambda item: item[:1], apart=lambda item: item[1])
    assert sorted(map(id, items)) == sorted(id(item) for group in groups for item in group)
    kinds = [{(tuple(tensor.shape), apart) for tensor, apart in group} for group in groups]
    assert all(len(kind) == 1 for kind in kinds)
    assert len(groups) == len(set(data))


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    missing=st.sets(st.integers(0, 3)),
    dim=st.sampled_from([None, 0, 1]),
    room=st.integers(0, 3),
)
def test_additions_to_gradients(
    shape: tuple[int, int, int], missing: set[int], dim: Literal[0, 1] | None, room: int
) -> None:
    """One by one, by hand; what lies in reserve is left as it is, and a missing gradient begins with zero."""
    additions = torch.randn(shape, dtype=torch.float64)
    wide = list(shape[1:])
    if dim is not None:
        wide[dim] += room
    parameters = [nn.Parameter(torch.zeros(wide, dtype=torch.float64)) for _ in range(shape[0])]
    wanted = []
    for number, parameter in enumerate(parameters):
        if number not in missing:
            parameter.grad = torch.randn_like(parameter)
        before = torch.zeros(wide, dtype=torch.float64) if parameter.grad is None else parameter.grad.clone()
        before[: shape[1], : shape[2]] += additions[number]
        wanted.append(before)
    add_to_gradients(parameters, additions, dim)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("method", ["dira", "pedyra", "dislora", "increlora", "sorsa"])
def test_a_step_in_the_smallest_parts_is_that_in_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for numbers in (1, 1 << 40):
        monkeypatch.setattr(devices, "_IN_CACHE", numbers)
        torch.manual_seed(0)
        settings = {"r": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "total_steps": 12}
        model: Any = peft.get_peft_model(LLAMA.build(), config_class(method)(**settings)).double()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for seed in range(3):
            LLAMA.loss(model.train(), seed=seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        layers = adapter_layers(model, "default").values()
        ends.append([p.detach() for layer in layers for p in layer.adapter_parameters("default").values()])
    for small, whole in zip(*ends, strict=True):
        torch.testing.assert_close(small, whole, rtol=1e-12, atol=1e-13)
