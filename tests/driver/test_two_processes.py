"""Every method on two processes: what one process learns of the same batches, or a refusal before the first step.

All methods run in one pair of processes per way of training, as most of the time goes into starting them.
"""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.adapter.ranks import in_use
from dynalora.driver import drivers_of
from dynalora.errors import UnsupportedError
from dynalora.forgetting.budget import TextMeter, retain_part
from dynalora.forgetting.texts import MeasuredText
from tests.driver.loops import adapted, assert_close_weights, trainable
from tests.methods.test_pedyra_processes import fully_sharded, gathered
from tests.processes import run_two
from tests.toys import tokens
from tests.unit.test_retain import curvature_of

STEPS = 8
MIDDLE = 4
"""Steps before a run goes on with another number of processes."""

WORKER = """
import os, sys
import torch
from torch import distributed
from tests.driver import test_two_processes as this

if __name__ == "__main__":
    rank, folder, way, port = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE="2")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=int(rank), world_size=2)
    this.work(int(rank), folder, way)
    distributed.destroy_process_group()
"""

SHARED = {"r": 3, "alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"], "task_type": "CAUSAL_LM"}

CONFIGS: dict[str, Any] = {
    "dira": lambda: dynalora.DiraConfig(**SHARED, penalty_weight=0.02, total_steps=STEPS),
    "dira budget": lambda: dynalora.DiraConfig(**SHARED, target_rank=2, total_steps=STEPS),
    "dira gradient budget": lambda: dynalora.DiraConfig(
        **SHARED, target_rank=2, penalty_mode="gradient", penalty_weight=0.02, total_steps=STEPS
    ),
    "dira compacting": lambda: dynalora.DiraConfig(**SHARED, target_rank=2, compact_every=3, total_steps=STEPS),
    "dira gates retain": lambda: dynalora.DiraConfig(
        **SHARED, penalty_weight=0.02, gates=True, retain=1e-3, total_steps=STEPS
    ),
    "dira forgetting little": lambda: dynalora.DiraConfig(
        **SHARED, penalty_weight=0.02, retain=1e-3, max_forgetting=1e-3, total_steps=STEPS
    ),
    "disel": lambda: dynalora.DiselConfig(**SHARED, gate_bias_init=0.0),
    "dislora": lambda: dynalora.DisloraConfig(**SHARED, warmup_steps=3, tsd_count=2, total_steps=STEPS),
    "dislora smoothed": lambda: dynalora.DisloraConfig(**SHARED, loss_smoothing=0.5, tsd_count=0),
    "dislora star": lambda: dynalora.DisloraConfig(**SHARED, ortho_weight=5e-3, warmup_steps=2, tsd_count=2),
    "pedyra retain": lambda: dynalora.PedyraConfig(
        **SHARED, adjust_start=1, adjust_interval=2, adjust_end=7, adjust_size=3, total_steps=STEPS, retain=1e-3
    ),
    "pedyra": lambda: dynalora.PedyraConfig(
        **SHARED, adjust_start=1, adjust_interval=2, adjust_end=7, adjust_size=3, total_steps=STEPS, match_step=False
    ),
    "increlora": lambda: dynalora.IncreloraConfig(
        **SHARED, target_rank=4, grow_start=2, grow_interval=1, grow_matrices=2, total_steps=STEPS
    ),
    "triadaptlora": lambda: dynalora.TriAdaptLoraConfig(
        **SHARED, target_rank=4, grow_start=2, grow_interval=1, total_steps=STEPS
    ),
    "rasa": lambda: dynalora.RasaConfig(**SHARED),
    "dylora": lambda: dynalora.DyloraConfig(**SHARED),
    "milora": lambda: dynalora.MiloraConfig(**SHARED),
    "sorsa": lambda: dynalora.SorsaConfig(**SHARED),
    "loradash": lambda: dynalora.LoraDashConfig(**SHARED, warmup_steps=3, tsd_count=2),
}


def made(name: str) -> Any:
    """A model with one of the adapters, the same at every call."""
    model = adapted(CONFIGS[name]())
    if CONFIGS[name]().retain is not None:
        for layer in adapter_layers(model).values():
            layer.curvatures["default"] = curvature_of(layer)
    if CONFIGS[name]().max_forgetting is not None:
        (driver, _), *_ = drivers_of(model)
        part = retain_part(driver)
        assert part is not None
        part.meter = TextMeter(model, MeasuredText(tuple(map(tuple, tokens(6, 9, seed=3).tolist())), (4,) * 6))
    return model


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Everything trained, without reserved room, in full; and which directions were chosen."""
    found = {}
    for layer in adapter_layers(model).values():
        for role, parameter in layer.adapter_parameters("default").items():
            if not role.startswith("ahead_"):  # without effect when ranks have grown
                found[f"{layer.name}.{role}"] = in_use(layer, role, "default", parameter.detach()).clone()
    return found | {name: buffer.clone() for name, buffer in model.named_buffers() if "tsd_index" in name}


def rows_of(step: int, last: int) -> torch.Tensor:
    """A global batch: 8 rows, in the last step fewer."""
    return tokens(last if step == STEPS - 1 else 8, 6, seed=100 + step)


def lines(way: str, rank: int, step: int) -> list[torch.Tensor]:
    """The micro-batches of a process in a step."""
    rows = rows_of(step, 5 if way in ("accumulating", "recomputing") else 8)
    half = rows[:4] if rank == 0 else rows[4:]
    return list(half.split(2)) if way in ("accumulating", "recomputing") else [half]


def optimizer_for(model: Any, way: str) -> torch.optim.Optimizer:
    """One that shows what gradients are; a fused one where its state goes from one run to another."""
    if way == "changing":
        return torch.optim.AdamW(trainable(model), lr=0.02, eps=1e-2, fused=True)
    return torch.optim.SGD(trainable(model), lr=0.05, momentum=0.9)


def train(
    model: Any,
    called: Any,
    rank: int | None,
    way: str,
    optimizer: torch.optim.Optimizer | None = None,
    steps: range = range(STEPS),
) -> torch.optim.Optimizer:
    """`rank` None: one process on everything."""
    optimizer = optimizer_for(model, way) if optimizer is None else optimizer
    model.train()
    for step in steps:
        optimizer.zero_grad()
        micro = (
            [batch for each in range(2) for batch in lines(way, each, step)] if rank is None else lines(way, rank, step)
        )
        total = sum(len(batch) for each in range(2) for batch in lines(way, each, step))
        world = 1 if rank is None else 2  # the processes' gradients are averaged
        for number, batch in enumerate(micro):
            waits = number + 1 < len(micro) and isinstance(called, DistributedDataParallel)
            with called.no_sync() if waits else contextlib.nullcontext():
                (called(input_ids=batch, labels=batch).loss * (world * len(batch) / total)).backward()
        optimizer.step()
    return optimizer


def joined(model: Any, rank: int) -> str:
    """Training where the second process has a batch less, with DDP's answer to that; or why not."""
    called = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.05)
    model.train()
    with called.join():
        for step in range(4 - rank):
            optimizer.zero_grad()
            batch = lines("plain", rank, step)[0]
            called(input_ids=batch, labels=batch).loss.backward()
            try:
                optimizer.step()
            except UnsupportedError as error:
                return f"{step} {error}"
    return ""


def save(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """What a checkpoint has."""
    model.save_pretrained(str(folder))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def go_on(name: str, folder: Path, rank: int | None) -> dict[str, torch.Tensor]:
    """Take up what was saved after `MIDDLE` steps, and train to the end; the weights then."""
    model = made(name)
    model.load_adapter(str(folder), "default", is_trainable=True)
    called = model if rank is None else DistributedDataParallel(model)
    optimizer = optimizer_for(model, "changing")
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    train(model, called, rank, "changing", optimizer, range(MIDDLE, STEPS))
    return weights(model)


def wrapped(model: Any, way: str) -> Any:
    """The model as the processes call it."""
    if way == "sharded":
        return fully_sharded(model)
    if way == "recomputing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        return DistributedDataParallel(model, find_unused_parameters=True)
    if way == "options":
        called = DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)
        called.register_comm_hook(None, default_hooks.allreduce_hook)
        return called
    return DistributedDataParallel(model)


def work(rank: int, folder: str, way: str) -> None:
    """What each process does."""
    results: dict[str, Any] = {}
    for name in CONFIGS:
        if way == "changing":
            results[name] = go_on(name, Path(folder, "one", name), rank)
        model = made(name)
        if way == "join":
            results[name] = joined(model, rank), weights(model)
            continue
        called = wrapped(model, way)
        try:
            optimizer = train(model, called, rank, way, steps=range(MIDDLE if way == "changing" else STEPS))
        except UnsupportedError as error:
            results[name] = str(error)
            continue
        if way == "changing":
            if rank == 0:
                save(model, optimizer, Path(folder, "two", name))
            continue
        if way == "sharded":
            gathered(model, optimizer)
        results[name] = weights(model)
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What both processes have learned, and the folder where they have left it."""
    way: str = request.param
    if way == "sharded" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"fully_shard of PyTorch {torch.__version__} does not run on processors")
    folder = tmp_path_factory.mktemp("two")
    if way == "changing":
        for name in CONFIGS:
            model = made(name)
            save(model, train(model, model, None, way, steps=range(MIDDLE)), folder / "one" / name)
    run_two(WORKER, str(folder), way, timeout=500)
    return way, [torch.load(folder / f"{rank}.pt") for rank in range(2)], folder


@functools.cache
def learned_alone(name: str, way: str) -> dict[str, torch.Tensor]:
    """What one process learns of the same batches."""
    model = made(name)
    train(model, model, None, way)
    return weights(model)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "results",
    [*("plain", "recomputing", "sharded"), *(pytest.param(way, marks=slow) for way in ("accumulating", "options"))],
    indirect=True,
)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_learn_what_one_learns(name: str, results: Any) -> None:
    """Also with micro-batches between which nothing is exchanged, and a last batch that is uneven."""
    way, (first, second), _ = results
    if isinstance(first[name], str):
        assert way == "sharded"
        assert re.search("budget|compacting|rasa", name)
        assert re.search("(do|does) not train under (FSDP1 or )?FSDP2", first[name])
        return
    alone = learned_alone(name, "accumulating" if way == "recomputing" else "plain" if way != "accumulating" else way)
    for key, tensor in first[name].items():
        assert torch.equal(tensor, second[name][key]), key
    assert_close_weights(first[name], alone, 2e-5)


@pytest.mark.parametrize("results", ["changing"], indirect=True)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_goes_on_with_another_number_of_processes(name: str, results: Any) -> None:
    """From one to two, and from two to one, in the middle of budgets, growth and adjustments."""
    way, (first, second), folder = results
    alone = learned_alone(name, way)
    for key, tensor in first[name].items():
        assert torch.equal(tensor, second[name][key]), key
    assert_close_weights(first[name], alone, 1e-4)
    assert_close_weights(go_on(name, folder / "two" / name, None), alone, 1e-4)


EXCHANGING = (
    *(
        "dira budget",
        "dira gradient budget",
        "dira compacting",
        "dira forgetting little",
        "dislora",
        "dislora smoothed",
    ),
    *("pedyra", "pedyra retain", "increlora", "triadaptlora"),
)


@pytest.mark.parametrize("results", ["join"], indirect=True)
@pytest.mark.parametrize("name", CONFIGS)
def test_processes_that_run_out_of_batches(name: str, results: Any) -> None:
    """DDP's `join()` lets the others go on; where a method needs all processes at its steps, the first is refused."""
    _, both, _ = results
    for said, _ in (one[name] for one in both):
        if name in EXCHANGING:
            assert said.startswith("0 "), said
            assert "does not train within DDP's join()" in said
        else:
            assert said == ""
    if name not in EXCHANGING:
        for key, tensor in both[0][name][1].items():
            assert torch.equal(tensor, both[1][name][1][key]), key
