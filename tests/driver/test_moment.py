"""What methods see around optimizer steps, where several optimizers share the adapter's parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora.adapter.layer import AdapterLayer
from dynalora.driver import Moment, drivers_of
from dynalora.methods import METHODS
from tests.toys import TOYS


@dataclass
class Notes:
    seen: list[tuple[str, ...]] = field(default_factory=list)


def test_a_moment_has_driver_layers_lead_and_what_the_step_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    method: Any = METHODS["dira"]
    before: list[Moment[Notes]] = []
    after: list[Moment[Notes]] = []

    def note(moment: Moment[Notes]) -> None:
        moment.shared.seen.append(tuple(layer.name for layer in moment.layers))
        before.append(moment)

    monkeypatch.setattr(type(method), "shared_class", Notes)
    monkeypatch.setattr(type(method), "before_step", lambda self, moment: note(moment))
    monkeypatch.setattr(type(method), "after_step", lambda self, moment: after.append(moment))
    toy = TOYS["mlp"]
    config = dynalora.DiraConfig(r=2, target_modules=list(toy.targets), total_steps=9)
    model = peft.get_peft_model(toy.build(), config)
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    optimizers = [torch.optim.SGD(layer.adapter_parameters("default").values(), lr=0.1) for layer in layers]
    for _ in range(2):
        toy.loss(model.train()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    ((driver, _),) = drivers_of(model)
    names = [layer.name for layer in layers]
    assert len(names) > 1
    assert [[layer.name for layer in moment.layers] for moment in before] == [[name] for name in names] * 2
    for moment in (*before, *after):
        assert moment.driver is driver
        assert (moment.adapter, moment.config, moment.total_steps) == ("default", config, 9)
        assert list(moment.all_layers) == layers
        assert moment.lead is layers[0]
    # One object for all optimizers of a step, and another for the next step.
    assert [moment.step for moment in before] == [0] * len(names) + [1] * len(names)
    first, second = before[0].shared, before[-1].shared
    assert first is not second
    assert all(moment.shared is (first if moment.step == 0 else second) for moment in (*before, *after))
    assert first.seen == second.seen == [(name,) for name in names]
