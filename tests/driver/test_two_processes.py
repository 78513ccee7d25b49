"""Every method on two processes: what one process learns of the same batches, or a refusal before the first step.

All methods run in one pair of processes per way of training, as most of the time goes into starting them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.adapter.ranks import in_use
from dynalora.errors import UnsupportedError
from tests.driver.loops import adapted, assert_close_weights, trainable
from tests.methods.test_pedyra_processes import fully_sharded, gathered
from tests.processes import run_two
from tests.toys import tokens

STEPS = 8

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
    "disel": lambda: dynalora.DiselConfig(**SHARED, gate_bias_init=0.0),
    "dislora": lambda: dynalora.DisloraConfig(**SHARED, warmup_steps=3, tsd_count=2, total_steps=STEPS),
    "dislora smoothed": lambda: dynalora.DisloraConfig(**SHARED, loss_smoothing=0.5, tsd_count=0),
    "dislora star": lambda: dynalora.DisloraConfig(**SHARED, ortho_weight=5e-3, warmup_steps=2, tsd_count=2),
    "pedyra": lambda: dynalora.PedyraConfig(
        **SHARED, adjust_start=1, adjust_interval=2, adjust_end=7, adjust_size=3, total_steps=STEPS, match_step=False
    ),
    "increlora": lambda: dynalora.IncreloraConfig(
        **SHARED, target_rank=4, grow_start=2, grow_interval=1, grow_matrices=2, total_steps=STEPS
    ),
    "triadaptlora": lambda: dynalora.TriAdaptLoraConfig(
        **SHARED, target_rank=4, grow_start=2, grow_interval=1, total_steps=STEPS
    ),
    "dylora": lambda: dynalora.DyloraConfig(**SHARED),
    "milora": lambda: dynalora.MiloraConfig(**SHARED),
    "sorsa": lambda: dynalora.SorsaConfig(**SHARED),
    "loradash": lambda: dynalora.LoraDashConfig(**SHARED, warmup_steps=3, tsd_count=2),
}


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
    rows = rows_of(step, 5 if way == "accumulating" else 8)
    half = rows[:4] if rank == 0 else rows[4:]
    return list(half.split(2)) if way == "accumulating" else [half]


def train(model: Any, called: Any, rank: int | None, way: str) -> torch.optim.Optimizer:
    """`rank` None: one process on everything."""
    optimizer = torch.optim.SGD(trainable(model), lr=0.05, momentum=0.9)
    model.train()
    for step in range(STEPS):
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


def work(rank: int, folder: str, way: str) -> None:
    """What each process does."""
    results: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        model = adapted(config())
        if way == "join":
            results[name] = joined(model, rank), weights(model)
            continue
        called = fully_sharded(model) if way == "sharded" else DistributedDataParallel(model)
        try:
            optimizer = train(model, called, rank, way)
        except UnsupportedError as error:
            results[name] = str(error)
            continue
        if way == "sharded":
            gathered(model, optimizer)
        results[name] = weights(model)
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What both processes have learned."""
    way: str = request.param
    if way == "sharded" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"fully_shard of PyTorch {torch.__version__} does not run on processors")
    folder = tmp_path_factory.mktemp("two")
    run_two(WORKER, str(folder), way, timeout=500)
    return way, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("results", ["plain", "accumulating", "sharded"], indirect=True)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_learn_what_one_learns(name: str, results: Any) -> None:
    """Also with micro-batches between which nothing is exchanged, and a last batch that is uneven."""
    way, (first, second) = results
    if isinstance(first[name], str):
        assert (name, way) == ("dira budget", "sharded")
        assert "do not train under FSDP2" in first[name]
        return
    model = adapted(CONFIGS[name]())
    train(model, model, None, way)
    alone = weights(model)
    for key, tensor in first[name].items():
        assert torch.equal(tensor, second[name][key]), key
    assert_close_weights(first[name], alone, 2e-5)


EXCHANGING = ("dira budget", "dislora", "dislora smoothed", "pedyra", "increlora", "triadaptlora")


@pytest.mark.parametrize("results", ["join"], indirect=True)
@pytest.mark.parametrize("name", CONFIGS)
def test_processes_that_run_out_of_batches(name: str, results: Any) -> None:
    """DDP's `join()` lets the others go on; where a method needs all processes at its steps, the first is refused."""
    _, both = results
    for said, _ in (one[name] for one in both):
        if name in EXCHANGING:
            assert said.startswith("0 "), said
            assert "does not train within DDP's join()" in said
        else:
            assert said == ""
    if name not in EXCHANGING:
        for key, tensor in both[0][name][1].items():
            assert torch.equal(tensor, both[1][name][1][key]), key
