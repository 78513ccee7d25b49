"""Long runs and many models: nothing grows, nothing drifts, nothing stays; and a seed is a result."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.driver import drivers_of, registry
from tests.toys import MLP

SHARED: dict[str, Any] = {"r": 3, "target_modules": ["first", "second"]}


def config(name: str, steps: int) -> Any:
    """A method with something to do all along."""
    often = max(1, steps // 100)
    options: dict[str, tuple[Any, dict[str, Any]]] = {
        "dira": (dynalora.DiraConfig, {"penalty_weight": 1e-3, "total_steps": steps, "compact_every": 10 * often}),
        "disel": (dynalora.DiselConfig, {}),
        "dislora": (dynalora.DisloraConfig, {"tsd_count": 2, "total_steps": steps, "loss_smoothing": 0.9}),
        "pedyra": (
            dynalora.PedyraConfig,
            {"adjust_start": often, "adjust_interval": often, "adjust_end": steps - 1, "adjust_size": 1},
        ),
        "increlora": (
            dynalora.IncreloraConfig,
            {"target_rank": 4, "grow_start": often, "grow_interval": often, "total_steps": steps},
        ),
        "triadaptlora": (
            dynalora.TriAdaptLoraConfig,
            {"target_rank": 4, "grow_start": often, "grow_interval": often, "total_steps": steps},
        ),
        "dylora": (dynalora.DyloraConfig, {}),
        "milora": (dynalora.MiloraConfig, {}),
        "sorsa": (dynalora.SorsaConfig, {}),
        "loradash": (dynalora.LoraDashConfig, {"warmup_steps": often, "tsd_count": 2}),
        "rasa": (dynalora.RasaConfig, {"shared_rank": 1}),
    }
    kind, more = options[name]
    return kind(**SHARED, **more)


NAMES = [
    *("dira", "disel", "dislora", "pedyra", "increlora", "triadaptlora"),
    *("dylora", "milora", "sorsa", "loradash", "rasa"),
]


def adapted(name: str, steps: int) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(4)
    model = peft.get_peft_model(MLP(), config(name, steps)).train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    generator = torch.Generator()
    for step in steps:
        generator.manual_seed(step)
        x, y = torch.randn(8, 12, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def hooks(model: Any) -> int:
    """Hooks of modules, parameters and of all optimizers."""
    every: Any = sys.modules[torch.optim.Optimizer.__module__]
    number = len(every._global_optimizer_pre_hooks) + len(every._global_optimizer_post_hooks)
    for module in model.modules():
        number += sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks"))
    return number + sum(len(p._backward_hooks or ()) for p in model.parameters())


def objects() -> Counter[str]:
    """What Python keeps, by type."""
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects())


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def nothing_grows(name: str, steps: int) -> None:
    model, optimizer = adapted(name, steps)
    first = steps // 5  # by then growth has reached its budget, and everything has been made once
    budget = sum(layer.rank("default") for layer in adapter_layers(model).values())
    train(model, optimizer, range(first))
    before, hooked, memory = objects(), hooks(model), resident()
    train(model, optimizer, range(first, steps))
    after = objects()
    # Each thing to do comes 80 times; Python's own caches take some objects the first times.
    grown = {kind: after[kind] - before[kind] for kind in after if after[kind] - before[kind] > 60}
    assert grown == {}
    assert hooks(model) == hooked
    assert resident() - memory < 8 << 20
    (driver,) = [driver for driver, _ in drivers_of(model)]
    assert driver.step == steps
    ranks = [layer.rank("default") for layer in adapter_layers(model).values()]
    expected = {"increlora": 8, "triadaptlora": 8, "pedyra": budget}.get(name)
    assert expected is None or sum(ranks) == expected
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    state = sum(t.numel() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    assert state <= 2 * sum(p.numel() for p in model.parameters() if p.requires_grad) + 64


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads its memory from Linux")


@needs_proc
@pytest.mark.parametrize("name", NAMES)
def test_nothing_grows_in_a_run(name: str) -> None:
    nothing_grows(name, 200)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nothing_grows_in_ten_thousand_steps(name: str) -> None:
    nothing_grows(name, 10_000)


def make_and_drop(count: int) -> list[weakref.ref[Any]]:
    """Models, each trained for two steps and left."""
    dead = []
    for name in itertools.islice(itertools.cycle(NAMES), count):
        model, optimizer = adapted(name, 20)
        train(model, optimizer, range(2))
        dead += [weakref.ref(model), weakref.ref(optimizer)]
        dead += [weakref.ref(layer) for layer in adapter_layers(model).values()]
    return dead


@needs_proc
def test_two_hundred_models_leave_nothing() -> None:
    make_and_drop(len(NAMES))
    before, memory = objects(), resident()
    known = len(list(registry.all_drivers()))
    dead = make_and_drop(200)
    gc.collect()
    assert not any(reference() is not None for reference in dead)
    del dead
    after = objects()
    assert {kind: after[kind] - before[kind] for kind in after if after[kind] - before[kind] > 60} == {}
    assert len(list(registry.all_drivers())) == known
    assert resident() - memory < 16 << 20


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_result(name: str) -> None:
    def run(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = peft.get_peft_model(MLP(), config(name, 30)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        train(model, optimizer, range(30))
        return {key: tensor.clone() for key, tensor in model.state_dict().items()}

    one, other, third = run(1), run(1), run(2)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert any(tensor.shape != third[key].shape or not torch.equal(tensor, third[key]) for key, tensor in one.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_takes_no_memory_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = peft.get_peft_model(MLP(), config(name, 20))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.get_nb_trainable_parameters()[0] > 0


class Deep(torch.nn.Module):
    """Many layers of one size."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(192, 192, bias=False) for _ in range(layers))


def memory_of_start(name: str, layers: int) -> tuple[int, int]:
    """Bytes that were held at most while an adapter was made besides those that it keeps, and those."""
    torch.manual_seed(0)
    model = Deep(layers)
    names = [f"blocks.{index}" for index in range(layers)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        adapted = peft.get_peft_model(model, replace(config(name, 20), target_modules=names))
    kineto: Any = profiler.profiler
    events = sorted(
        (event for event in kineto.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    assert adapted is not None
    assert held > 0
    return most - held, held


@pytest.mark.parametrize("name", NAMES)
def test_a_start_takes_the_memory_of_one_layer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path))
    (few, _), (many, adapter) = memory_of_start(name, 3), memory_of_start(name, 16)
    assert many <= few + adapter // 16
