"""Methods whose ranks grow, and one whose layers share, on two processes: as one process on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import dynalora
from dynalora.adapter.growth import GrowthConfig
from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.ranks import in_use
from tests.driver.loops import adapted, assert_close_weights
from tests.methods.test_pedyra_processes import fully_sharded, gathered, optimizer_of, train
from tests.processes import run_two

STEPS = 9

CONFIGS = {
    "increlora": (dynalora.IncreloraConfig, {"grow_matrices": 2}),
    "triadaptlora": (dynalora.TriAdaptLoraConfig, {}),
    "rasa": (dynalora.RasaConfig, {}),
}

WORKER = """
import os, sys
import torch
from torch import distributed
from tests.methods import test_growth_processes as this

if __name__ == "__main__":
    rank, folder, method, kind, port = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE="2")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=int(rank), world_size=2)
    this.work(int(rank), folder, method, kind)
    distributed.destroy_process_group()
"""


def config(method: str) -> Any:
    kind, options = CONFIGS[method]
    common = {
        "r": 2,
        "alpha": 4,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "total_steps": STEPS,
    }
    if issubclass(kind, GrowthConfig):
        common |= {"target_rank": 4, "grow_start": 2, "grow_interval": 1}
    return kind(**{**common, **options})


def learned(model: Any) -> dict[str, torch.Tensor]:
    """The trained weights of the update, without reserved room."""
    return {
        f"{layer.name}.{role}": in_use(layer, role, "default", parameter.detach()).clone()
        for layer in model.modules()
        if isinstance(layer, AdapterLayer)
        for role, parameter in layer.adapter_parameters("default").items()
        if not role.startswith("ahead")
    }


def ranks(model: Any) -> dict[str, int]:
    return {m.name: m.rank("default") for m in model.modules() if isinstance(m, AdapterLayer)}


def work(rank: int, folder: str, method: str, kind: str) -> None:
    """What each process does."""
    model = adapted(config(method))
    called = fully_sharded(model) if kind == "sharded" else DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    train(model, called, optimizer, slice(2 * rank, 2 * rank + 2), range(STEPS))
    torch.save((learned(model), ranks(model)), f"{folder}/{rank}.pt")
    whole = gathered(model, optimizer)[0] if kind == "sharded" else None
    if rank == 0:
        model.save_pretrained(f"{folder}/end", state_dict=whole)


@pytest.mark.parametrize(
    ("method", "kind"),
    [(method, kind) for method in CONFIGS for kind in ("plain", "sharded") if (method, kind) != ("rasa", "sharded")],
)
def test_two_processes_train_as_one(method: str, kind: str, tmp_path: Path) -> None:
    if kind == "sharded" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"fully_shard of PyTorch {torch.__version__} does not run on processors")
    run_two(WORKER, str(tmp_path), method, kind)
    (weights, found), (others, also) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert found == also
    assert weights
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    alone = adapted(config(method))
    train(alone, alone, optimizer_of(alone), slice(None), range(STEPS))
    assert found == ranks(alone)
    assert (sum(found.values()) > 2 * len(found)) == (method != "rasa")
    assert_close_weights(weights, learned(alone), 1e-5)
    saved = load_file(tmp_path / "end" / "adapter_model.safetensors")
    for name, rank in found.items():
        assert saved[f"base_model.model.{name}.{method}_down"].shape[0] == rank
