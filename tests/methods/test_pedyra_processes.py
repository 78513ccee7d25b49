"""PE-DyRA on several processes: all decide the same, and as one process does on the whole batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from dynalora import PedyraConfig
from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.ranks import in_use
from dynalora.methods.pedyra import AdjustmentPlan, adjustments
from tests.driver.loops import adapted, assert_close_weights, trainable
from tests.processes import run_two
from tests.toys import tokens

STEPS = 9

WORKER = """
import json, os, sys
import torch
from torch import distributed
from tests.methods import test_pedyra_processes as this

def work(rank, folder, kind, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    this.work(rank, folder, kind)
    distributed.destroy_process_group()

if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
"""


def config(**options: Any) -> PedyraConfig:
    defaults = {
        "r": 3,
        "alpha": 6,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "adjust_start": 1,
        "adjust_interval": 2,
        "adjust_end": 7,
        "adjust_size": 3,
        "total_steps": STEPS,
    }
    return PedyraConfig(**{"match_step": False, **defaults, **options})


def batch(step: int) -> torch.Tensor:
    return tokens(4, 6, seed=100 + step)


def train(model: nn.Module, called: Any, optimizer: torch.optim.Optimizer, rows: slice, steps: range) -> None:
    model.train()
    for step in steps:
        optimizer.zero_grad()
        ids = batch(step)[rows]
        called(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # Adam divides by its own noise where gradients are near zero, SGD compares what the gradients are.
    return torch.optim.SGD(trainable(model), lr=0.2, momentum=0.9)


def used(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained weights without reserved room."""
    found = {}
    for layer in model.modules():
        if isinstance(layer, AdapterLayer):
            for role in layer.rank_dims:
                if layer.has_parameter(role, "default"):
                    whole = in_use(layer, role, "default", layer.parameter(role, "default").detach())
                    found[f"{layer.name}.{role}"] = whole.clone()
    return found


def fully_sharded(model: Any) -> Any:
    """FSDP2, block by block."""
    from torch.distributed.fsdp import fully_shard

    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def gathered(model: Any, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sharded weights and optimizer state in full, on the first process, as trainers gather them to save."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(model, optimizer, options=options)


def work(rank: int, folder: str, kind: str) -> None:
    """What each process does."""
    model = adapted(config(max_rank=5) if kind == "limited" else config())
    called = fully_sharded(model) if kind.startswith("sharded") else DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    rows = slice(2 * rank, 2 * rank + 2)
    if kind == "resumed":
        train(model, called, optimizer, rows, range(4))
        state = optimizer.state_dict()
        if rank == 0:
            model.save_pretrained(f"{folder}/middle")
        torch.distributed.barrier()
        model = adapted(config())
        model.load_adapter(f"{folder}/middle", "default", is_trainable=True)
        called = DistributedDataParallel(model)
        optimizer = optimizer_of(model)
        optimizer.load_state_dict(state)
        train(model, called, optimizer, rows, range(4, STEPS))
    elif kind == "sharded resumed":
        train(model, called, optimizer, rows, range(4))
        whole, state = gathered(model, optimizer)
        if rank == 0:
            model.save_pretrained(f"{folder}/middle", state_dict=whole)
            torch.save(state, f"{folder}/middle.pt")
        torch.distributed.barrier()
        model = adapted(config())
        model.load_adapter(f"{folder}/middle", "default", is_trainable=True)
        called = fully_sharded(model)
        optimizer = optimizer_of(model)
        set_optimizer_state_dict(
            model, optimizer, torch.load(f"{folder}/middle.pt"), options=StateDictOptions(full_state_dict=True)
        )
        train(model, called, optimizer, rows, range(4, STEPS))
    else:
        train(model, called, optimizer, rows, range(STEPS))
    torch.save(used(model), f"{folder}/{rank}.pt")
    record = [vars(one) for one in adjustments(model)]
    Path(f"{folder}/{rank}.json").write_text(json.dumps(record))
    shapes = {n: list(p.shape) for n, p in model.named_parameters() if "pedyra" in n}
    Path(f"{folder}/{rank}.shapes.json").write_text(json.dumps(shapes))
    whole = gathered(model, optimizer)[0] if kind.startswith("sharded") else None
    if rank == 0:
        model.save_pretrained(f"{folder}/end", state_dict=whole)


@pytest.mark.parametrize("kind", ["plain", "resumed", "limited", "sharded", "sharded resumed"])
def test_two_processes_decide_as_one(kind: str, tmp_path: Path) -> None:
    if kind.startswith("sharded") and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"fully_shard of PyTorch {torch.__version__} does not run on processors")
    run_two(WORKER, str(tmp_path), kind)

    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert records[0] == records[1], "ranks, scores and decisions are the same, bit for bit"
    weights = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name

    alone = adapted(config(max_rank=5) if kind == "limited" else config())
    train(alone, alone, optimizer_of(alone), slice(None), range(STEPS))
    expected = adjustments(alone)
    plan = AdjustmentPlan.of(config(), STEPS)
    assert len(records[0]) == len(expected) == plan.count == 4
    moved = set()
    for here, there in zip(expected, records[0], strict=True):
        assert here.ranks == there["ranks"]
        assert [list(one) for one in here.pruned] == there["pruned"]
        assert here.expanded == there["expanded"]
        assert sum(here.ranks.values()) == 3 * 6
        for name, scores in here.scores.items():
            assert there["scores"][name] == pytest.approx(scores, rel=1e-3, abs=1e-9)
        moved |= set(here.expanded)
    assert len(moved) > 1
    assert_close_weights(weights[0], used(alone), 1e-5)

    shapes = [json.loads((tmp_path / f"{rank}.shapes.json").read_text()) for rank in range(2)]
    assert {shape[0] for name, shape in shapes[0].items() if "_e." in name} == {5 if kind == "limited" else 7}
    saved = load_file(tmp_path / "end" / "adapter_model.safetensors")
    for name, rank in expected[-1].ranks.items():
        assert saved[f"base_model.model.{name}.pedyra_e"].shape == (rank,)
