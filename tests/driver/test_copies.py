"""Optimizers that step copies of the weights, as DeepSpeed's ZeRO does: what works, and what is refused when."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.driver import drivers_of
from dynalora.errors import UnsupportedError
from tests.driver.test_long_runs import NAMES, config
from tests.processes import run_two
from tests.toys import MLP

UNDRIVEN = {"milora", "rasa"}
"""Methods that are the same without anything at optimizer steps; DISeL is with its groups."""


class OfCopies:
    """An optimizer of copies, of the form that DeepSpeed documents.

    Args:
        groups: What torch's optimizers take.
        kind: `"copies"` has one of each weight in float32, `"flat"` a vector of all, `"zero"` a vector too, and has
            marked the weights as DeepSpeed marks those whose high-precision part is elsewhere.
    """

    def __init__(self, groups: list[dict[str, Any]], kind: str) -> None:
        self.inner = torch.optim.AdamW(groups)
        self.kind, self.weights, self.copies = kind, [], []
        for group in self.inner.param_groups:
            weights = group["params"]
            copies = [nn.Parameter(weight.detach().float().clone()) for weight in weights]
            if kind != "copies":
                copies = [nn.Parameter(torch.cat([copy.detach().reshape(-1) for copy in copies]))]
            if kind == "zero":
                places = copies[0].detach().split([weight.numel() for weight in weights])
                for weight, place in zip(weights, places, strict=True):
                    weight._hp_mapping = SimpleNamespace(hp_fragment=place)
            group["params"] = copies
            self.weights.append(weights)
            self.copies.append(copies)

    def step(self) -> None:
        for weights, copies in zip(self.weights, self.copies, strict=True):
            gradients = [weight.grad.float().reshape(-1) for weight in weights]
            for copy, gradient in zip(
                copies, gradients if self.kind == "copies" else [torch.cat(gradients)], strict=True
            ):
                copy.grad = gradient.reshape(copy.shape)
        self.inner.step()
        for weights, copies in zip(self.weights, self.copies, strict=True):
            values = torch.cat([copy.detach().reshape(-1) for copy in copies])
            for weight, value in zip(weights, values.split([weight.numel() for weight in weights]), strict=True):
                weight.data.copy_(value.reshape(weight.shape))


def made(name: str, kind: str) -> Any:
    torch.manual_seed(3)
    model = peft.get_peft_model(MLP(), config(name, 20))
    return model if kind == "zero" else model.bfloat16()


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def losses(model: Any, step: Any, clear: Any, dtype: torch.dtype) -> list[float]:
    values = []
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(8, 12, generator=generator).to(dtype), torch.randint(0, 3, (8,), generator=generator)
        clear()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        step()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("kind", ["copies", "flat", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_copies_are_refused_before_the_first_step_where_a_method_acts_at_steps(name: str, kind: str) -> None:
    model = made(name, kind)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = OfCopies([{"params": trained(model), "lr": 1e-2}], kind)
    dtype = torch.float32 if kind == "zero" else torch.bfloat16
    if name in UNDRIVEN:
        losses(model, optimizer.step, model.zero_grad, dtype)
        assert any(not torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
        return
    remedy = r"param_groups\(model, lr\)" if name == "disel" else "DistributedDataParallel or FSDP2"
    with pytest.raises(UnsupportedError, match=f"copies of its weights.*{remedy}"):
        losses(model, optimizer.step, model.zero_grad, dtype)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_disel_trains_with_its_groups(tmp_path: Path) -> None:
    """At the rates that the groups have; steps of copies cannot follow the gates from there."""

    def train(kind: str | None) -> tuple[Any, list[float]]:
        model = made("disel", "zero")
        for layer in adapter_layers(model).values():
            layer.matched.clear()
        groups = dynalora.param_groups(model, lr=1e-2, weight_decay=0.1)
        optimizer: Any = torch.optim.AdamW(groups) if kind is None else OfCopies(groups, kind)
        return model, losses(model, optimizer.step, model.zero_grad, torch.float32)

    (plain, expected), (model, found) = train(None), train("zero")
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] != found[0]
    for one, other in zip(trained(plain), trained(model), strict=True):
        torch.testing.assert_close(one, other)
    model.save_pretrained(tmp_path)  # it is not taken for one that nobody drove


def test_what_adds_to_gradients_beside_the_method_is_refused() -> None:
    torch.manual_seed(3)
    model = peft.get_peft_model(MLP(), dynalora.MiloraConfig(r=3, target_modules=["first"], retain=1.0))
    optimizer = OfCopies([{"params": trained(model), "lr": 1e-2}], "zero")
    with pytest.raises(UnsupportedError, match="copies of its weights"):
        losses(model, optimizer.step, model.zero_grad, torch.float32)


def test_a_process_without_a_piece_of_the_adapter_refuses_too() -> None:
    model = made("dira", "zero")
    optimizer = OfCopies([{"params": trained(model), "lr": 1e-2}], "zero")
    for parameter in trained(model):
        parameter._hp_mapping = None
    with pytest.raises(UnsupportedError, match="copies of its weights"):
        losses(model, optimizer.step, model.zero_grad, torch.float32)


def test_another_models_optimizer_is_left_alone() -> None:
    model = made("dira", "zero")
    OfCopies([{"params": trained(model), "lr": 1e-2}], "zero")
    other = nn.Linear(3, 3)
    other(torch.ones(2, 3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    another = made("disel", "zero")  # both under ZeRO
    optimizer = OfCopies(dynalora.param_groups(another, lr=1e-2), "zero")
    losses(another, optimizer.step, another.zero_grad, torch.float32)
    half = made("pedyra", "copies")
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert [driver.optimizer_steps for each in (model, half) for driver, _ in drivers_of(each)] == [0, 0]


def test_weights_in_pieces_are_refused_before_a_layer_is_replaced() -> None:
    model = MLP()
    model.second.weight.ds_id = 1  # as DeepSpeed marks what its stage 3 has spread
    for targets in (["first", "second"], "second"):
        with pytest.raises(UnsupportedError, match=r"'second': DeepSpeed's ZeRO stage 3 .*use stage 1 or 2"):
            peft.get_peft_model(model, dynalora.DiselConfig(r=3, target_modules=targets))
    assert type(model.first) is nn.Linear
    adapted = made("disel", "zero")
    for parameter in trained(adapted):
        parameter.ds_id = 1
        parameter.data = torch.empty(0)
    with pytest.raises(UnsupportedError, match="'first': DeepSpeed's ZeRO stage 3"):
        adapted(torch.randn(2, 12))


WORKER = """
import os, sys
from torch import distributed
from tests.driver import test_copies as this

if __name__ == "__main__":
    rank, work, port = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
    distributed.init_process_group("gloo", rank=int(rank), world_size=2)
    getattr(this, work)()
    distributed.destroy_process_group()
"""


def tensor_parallel() -> None:
    """What each of two processes does with a base model in parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for style in (ColwiseParallel(), RowwiseParallel()):
        for name in NAMES:
            base = parallelize_module(MLP(), init_device_mesh("cpu", (2,)), {"second": style})
            for given in (config(name, 20), type(config(name, 20))(r=3, target_modules="all-linear", total_steps=20)):
                with pytest.raises(UnsupportedError, match="'second' has its weight spread over processes"):
                    peft.get_peft_model(base, given)
            assert type(base.first) is nn.Linear
            assert type(base.second) is nn.Linear


def test_tensor_parallel_weights_are_refused_before_a_layer_is_replaced() -> None:
    run_two(WORKER, "tensor_parallel")


def deepspeed_stages() -> None:
    """All methods under DeepSpeed itself, each stage: what one process learns of the same batches, or a refusal."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    settings = {"train_micro_batch_size_per_gpu": 8, "zero_allow_untested_optimizer": True}
    settings["zero_force_ds_cpu_optimizer"] = False

    def train(name: str, stage: int | None) -> list[float]:
        torch.manual_seed(3)
        given = config(name, 20)
        if name == "dira":
            given.compact_every = None  # refused on several processes
        model = peft.get_peft_model(MLP(), given)
        groups = dynalora.param_groups(model, lr=1e-2)
        optimizer = torch.optim.AdamW(groups)
        if stage is None:
            return losses(model, optimizer.step, model.zero_grad, torch.float32)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config={**settings, "zero_optimization": {"stage": stage}}
        )
        values = []
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            x, y = torch.randn(8, 12, generator=generator), torch.randint(0, 3, (8,), generator=generator)
            loss = nn.functional.cross_entropy(engine(x), y)
            engine.backward(loss)
            engine.step()
            values.append(loss.item())
        return values

    for name in NAMES:
        expected = train(name, None)
        for stage in range(4):
            works = stage == 0 or (stage < 3 and (name in UNDRIVEN or name == "disel"))
            if works:
                assert train(name, stage) == pytest.approx(expected, rel=1e-4), (name, stage)
            else:
                with pytest.raises(UnsupportedError, match="stage 3" if stage == 3 else "copies of its weights"):
                    train(name, stage)


def test_deepspeed_itself() -> None:
    pytest.importorskip("deepspeed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run_two(WORKER, "deepspeed_stages", timeout=500)
