"""Training that goes on with another number of processes, and trainings beside each other in one process."""

from __future__ import annotations

import copy
import re
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora.driver import driver
from dynalora.errors import UnsupportedError
from dynalora.methods.pedyra import layer as pedyra_layer
from dynalora.methods.pedyra import method as pedyra_method
from tests.driver.loops import weights
from tests.toys import MLP

TARGETS = ["first", "second"]


def pedyra(**options: Any) -> Any:
    torch.manual_seed(1)
    schedule = {"adjust_start": 2, "adjust_interval": 2, "adjust_end": 12, "adjust_size": 2, "total_steps": 14}
    config = dynalora.PedyraConfig(r=3, target_modules=TARGETS, **schedule, **options)
    return peft.get_peft_model(MLP(), config)


def steps(model: Any, optimizer: torch.optim.Optimizer, which: range) -> None:
    model.train()
    for step in which:
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)).backward()
        optimizer.step()


def used(model: Any) -> dict[str, torch.Tensor]:
    layers = {name: getattr(model.base_model.model, name) for name in TARGETS}
    return {
        f"{name}.{role}": layer.used(role, "default").detach().clone()
        for name, layer in layers.items()
        for role in ("down", "e", "up")
    }


OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=5e-3, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=5e-3, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=5e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=5e-3),
}


@pytest.mark.parametrize("stepped", [False, True], ids=["new optimizer", "used optimizer"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize(("first", "second"), [("1", "2"), ("2", "1"), ("2", "3"), ("2", "2")])
def test_optimizer_state_follows_to_another_number_of_processes(
    first: str, second: str, optimizer: str, stepped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a launcher sets decides whether room is reserved, and with it the shapes of parameters and state."""

    def trainable(model: Any) -> list[Any]:
        return [p for p in model.parameters() if p.requires_grad]

    monkeypatch.setenv("WORLD_SIZE", "1")
    whole = pedyra()
    steps(whole, OPTIMIZERS[optimizer](trainable(whole)), range(12))

    monkeypatch.setenv("WORLD_SIZE", first)
    begun = pedyra()
    before = OPTIMIZERS[optimizer](trainable(begun))
    steps(begun, before, range(5))
    begun.save_pretrained(tmp_path)
    state = copy.deepcopy(before.state_dict())

    monkeypatch.setenv("WORLD_SIZE", second)
    resumed = pedyra()
    after = OPTIMIZERS[optimizer](trainable(resumed))
    if stepped:
        steps(resumed, after, range(1))
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
    after.load_state_dict(state)
    steps(resumed, after, range(5, 12))
    if optimizer == "adafactor":  # takes means over all entries, those of the room included
        assert all(bool(tensor.isfinite().all()) for tensor in used(resumed).values())
        return
    for name, expected in used(whole).items():
        torch.testing.assert_close(used(resumed)[name], expected, rtol=2e-3, atol=2e-5, msg=name)


@pytest.fixture
def often_switched() -> Iterator[None]:
    """Threads that take turns thousands of times more often than usual, so that they meet if they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_a_loss_is_seen_whichever_thread_makes_the_gradients() -> None:
    """A pool may run the forward pass in one thread and the backward pass in another that has made gradients before."""
    config = dynalora.DisloraConfig(r=3, target_modules=TARGETS, total_steps=60, tsd_count=2)
    model = peft.get_peft_model(MLP(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(8, 12)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for forward, backward in ((one, one), (other, other), (one, other), (other, one)):
            optimizer.zero_grad()
            loss = forward.submit(lambda: torch.nn.functional.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)))
            backward.submit(loss.result().backward).result()
            optimizer.step()  # raises where the loss was not seen


@pytest.mark.usefixtures("often_switched")
def test_two_trainings_in_two_threads_do_not_meet() -> None:
    """Each learns as it does alone, with the losses that its penalty is weighed against."""

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        config = dynalora.DisloraConfig(r=3, target_modules=TARGETS, total_steps=60, tsd_count=2, loss_smoothing=0.5)
        return peft.get_peft_model(MLP(), config)

    def train(model: Any, scale: float) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(60):
            x = scale * torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (scale * torch.nn.functional.cross_entropy(model(x), torch.zeros(8, dtype=torch.long))).backward()
            optimizer.step()

    def together() -> list[dict[str, torch.Tensor]]:
        models, failures, barrier = [make(1), make(2)], [], threading.Barrier(2)

        def work(model: Any, scale: float) -> None:
            barrier.wait()
            try:
                train(model, scale)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(models, (1.0, 3.0), strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        return [dict(model.state_dict()) for model in models]

    alone = []
    for seed, scale in ((1, 1.0), (2, 3.0)):
        model = make(seed)
        train(model, scale)
        alone.append(dict(model.state_dict()))
    for _ in range(5):
        for one, other in zip(alone, together(), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_adapter_made_before_its_processes_met_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pedyra()
    roomy = pedyra(max_rank=8)
    for module in (pedyra_method, pedyra_layer):
        monkeypatch.setattr(module, "process_count", lambda: 2)
    monkeypatch.setattr(pedyra_method, "grouped", lambda: True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(UnsupportedError, match=r"before its 2 processes joined .*'first'.*max_rank"):
        steps(model, optimizer, range(1))
    steps(roomy, torch.optim.SGD([p for p in roomy.parameters() if p.requires_grad], lr=0.1), range(1))


def test_weights_in_memory_that_processes_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that torch.multiprocessing hands over lie in shared memory, where every process would step them."""
    model = pedyra(max_rank=8)
    for parameter in model.parameters():
        parameter.data = parameter.data.share_memory_()
    copied = copy.deepcopy(model)
    monkeypatch.setattr(driver, "process_count", lambda: 2)
    monkeypatch.setattr(driver, "grouped", lambda: True)
    monkeypatch.setattr(driver.Driver, "_look", lambda *_: None)
    with pytest.raises(UnsupportedError, match=r"memory that its 2 processes share.*copy\.deepcopy"):
        steps(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), range(1))
    steps(copied, torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.1), range(1))


SPAWNED: dict[str, tuple[str, dict[str, Any]]] = {
    "dira": ("DiraConfig", {"penalty_weight": 1e-2, "total_steps": 8}),
    "dira budget": ("DiraConfig", {"target_rank": 2, "penalty_mode": "gradient", "total_steps": 8}),
    "dira compacting": ("DiraConfig", {"penalty_weight": 1e-2, "compact_every": 2, "total_steps": 8}),
    "disel": ("DiselConfig", {}),
    "dislora": ("DisloraConfig", {"tsd_count": 2, "total_steps": 8}),
    "pedyra": ("PedyraConfig", {"adjust_start": 2, "adjust_interval": 2, "adjust_end": 6, "total_steps": 8}),
    "increlora": ("IncreloraConfig", {"target_rank": 6, "grow_start": 2, "total_steps": 8}),
    "triadaptlora": ("TriAdaptLoraConfig", {"target_rank": 6, "grow_start": 2, "total_steps": 8}),
    "dylora": ("DyloraConfig", {}),
    "milora": ("MiloraConfig", {}),
    "sorsa": ("SorsaConfig", {}),
    "loradash": ("LoraDashConfig", {"warmup_steps": 2, "tsd_count": 2}),
    "rasa": ("RasaConfig", {}),
}


def spawnable(name: str) -> Any:
    torch.manual_seed(0)
    kind, options = SPAWNED[name]
    return peft.get_peft_model(MLP(), getattr(dynalora, kind)(r=4, target_modules=TARGETS, **options))


def spawned(rank: int, port: int, models: dict[str, Any], folder: str) -> None:
    """What each process does with models that were made before there was a group."""
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, handed in models.items():
        model = copy.deepcopy(handed).train()
        called = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        try:
            for step in range(8):
                x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))[4 * rank :][:4]
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(called(x), torch.zeros(4, dtype=torch.long)).backward()
                optimizer.step()
            results[name] = weights(model)
        except UnsupportedError as error:
            results[name] = f"{step} {error}"
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_adapters_made_before_spawned_processes_met_train_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    models = {name: spawnable(name) for name in SPAWNED}
    torch.multiprocessing.spawn(spawned, (port, models, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, found in first.items():
        if name in ("dira compacting", "pedyra", "increlora", "triadaptlora"):
            assert found == second[name]
            assert re.match(r"0 adapter 'default' (was made before|trains on 2 processes)", found)
            continue
        alone = spawnable(name)
        steps(alone, torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1), range(8))
        expected = weights(alone)
        for key, tensor in found.items():
            assert torch.equal(tensor, second[name][key])
            if name != "dira budget":  # whose dead components alone are cut, and here are zeros
                torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "DiraConfig": {"penalty_weight": 1e-2, "total_steps": 6},
    "DiselConfig": {},
    "DisloraConfig": {"tsd_count": 2, "total_steps": 6},
    "PedyraConfig": {"adjust_start": 2, "adjust_interval": 2, "adjust_end": 6, "adjust_size": 1, "max_rank": 6},
}


@pytest.fixture
def alone_in_a_group(tmp_path: Path) -> Any:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_an_optimizer_around_another_with_groups_of_its_own(name: str, alone_in_a_group: None) -> None:
    """ZeroRedundancyOptimizer copies the settings of its groups, one by one, to those of the optimizer inside."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def train(make: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(4)
        model = peft.get_peft_model(MLP(), getattr(dynalora, name)(r=3, target_modules=TARGETS, **OPTIONS[name]))
        steps(model, make([p for p in model.parameters() if p.requires_grad]), range(6))
        return dict(model.state_dict())

    plain = train(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    around = train(lambda parameters: ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2))
    assert all(torch.equal(plain[key], around[key]) for key in plain)


class Lookahead(torch.optim.Optimizer):
    """One around another with the other's groups, as such wrappers are written."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.inner.step(closure)


@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_an_optimizer_around_another_with_the_same_groups(name: str, closure: bool) -> None:
    def train(make: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(4)
        model = peft.get_peft_model(
            MLP(), getattr(dynalora, name)(r=3, target_modules=TARGETS, **OPTIONS[name])
        ).train()
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.ExponentialLR(getattr(optimizer, "inner", optimizer), 0.5)
        for step in range(6):
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))

            def again(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x), torch.zeros(8, dtype=torch.long))
                loss.backward()
                return loss

            if closure:
                optimizer.step(again)
            else:
                again()
                optimizer.step()
            schedule.step()
        assert len(optimizer.param_groups) == 1
        return dict(model.state_dict())

    plain = train(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    around = train(lambda parameters: Lookahead(torch.optim.AdamW(parameters, lr=1e-2)))
    assert all(torch.equal(plain[key], around[key]) for key in plain)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_factors_in_flat_vectors_are_refused_where_rules_need_matrices(name: str) -> None:
    model = peft.get_peft_model(MLP(), getattr(dynalora, name)(r=3, target_modules=TARGETS, **OPTIONS[name]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    model(torch.randn(8, 12)).square().mean().backward()
    for parameter in parameters:  # as FullyShardedDataParallel leaves them between passes
        flat = None if parameter.grad is None else parameter.grad.reshape(-1)
        parameter.grad = None
        parameter.data = parameter.data.reshape(-1)
        parameter.grad = flat
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    if name == "DiselConfig":
        optimizer.step()
        return
    with pytest.raises(UnsupportedError, match=f"{name}.*does not train under FSDP1.*train it under"):
        optimizer.step()
