"""What only an accelerator shows: waits for it, fused optimizers, short generation, autocast, decompositions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

import dynalora
from dynalora.adapter.layer import AdapterLayer, adapter_layers
from dynalora.common.attention import attention_over_padding
from dynalora.spectral.decomposition import largest_triplets, smallest_triplets
from tests.decompositions import decompose
from tests.matrix.rows import ROWS, Row
from tests.toys import MLP, TOYS, tokens

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LLAMA = TOYS["llama"]
STEPS = 20
EVERYWHERE: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**EVERYWHERE),
    "dira": lambda: dynalora.DiraConfig(total_steps=STEPS, **EVERYWHERE),
    "disel": lambda: dynalora.DiselConfig(**EVERYWHERE),
    "dislora": lambda: dynalora.DisloraConfig(total_steps=10 * STEPS, tsd_count=2, **EVERYWHERE),
    "pedyra": lambda: dynalora.PedyraConfig(total_steps=10 * STEPS, **EVERYWHERE),
}


def adapted(name: str, device: str = DEVICE) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(LLAMA.build(), CONFIGS[name]()).to(device).train()


def optimizer_of(model: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, **options)


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def waits(act: Callable[[], Any]) -> int:
    """How often something waits for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "lora"])
def test_a_step_waits_for_the_device_no_more_than_loras(name: str) -> None:
    counts = []
    for method in ("lora", name):
        model, ids = adapted(method), tokens(2, 9).to(DEVICE)
        optimizer = optimizer_of(model, fused=True)
        for _ in range(16):  # gates are measured at the first eight, and at every other one of the next eight
            step(model, optimizer, ids)
        counts.append(waits(lambda: [step(model, optimizer, ids) for _ in range(3)]))  # noqa: B023
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"fused": True, "amsgrad": True}], ids=str)
def test_ranks_that_change_train_on_as_on_a_cpu(options: dict[str, bool]) -> None:
    def train(device: str) -> list[torch.Tensor]:
        model, ids = adapted("dira", device), tokens(2, 9).to(device)
        optimizer = optimizer_of(model, **options)
        layers: list[AdapterLayer] = list(adapter_layers(model).values())
        for number in range(6):
            step(model, optimizer, ids)
            if number == 2:
                for layer in layers[::2]:
                    layer.resize("default", [3, 0, 2])
        assert {layer.rank("default") for layer in layers} == {3, 4}
        return [p.detach().cpu() for p in model.parameters() if p.requires_grad]

    for here, there in zip(train("cpu"), train(DEVICE), strict=True):
        torch.testing.assert_close(there, here, atol=2e-4, rtol=2e-3)


def test_ranks_are_adjusted_as_on_a_cpu() -> None:
    def train(device: str) -> tuple[list[int], list[float]]:
        torch.manual_seed(0)
        moving = {"adjust_start": 3, "adjust_interval": 2, "adjust_end": 9, "adjust_size": 3}
        config = dynalora.PedyraConfig(total_steps=10, **moving, **EVERYWHERE)  # type: ignore[arg-type]
        model = peft.get_peft_model(LLAMA.build(), config).to(device).train()  # type: ignore[arg-type, operator]
        optimizer = optimizer_of(model, fused=True)
        losses = [float(step(model, optimizer, tokens(2, 9, seed=number).to(device))) for number in range(10)]
        return [layer.rank("default") for layer in adapter_layers(model).values()], losses

    here, there = train("cpu"), train(DEVICE)
    assert here[0] == there[0]
    assert len(set(here[0])) > 1
    assert there[1] == pytest.approx(here[1], rel=1e-3)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_come_to_the_same_as_with_gradients(row: Row, dtype: torch.dtype) -> None:
    """Generation has a shorter way through a layer."""
    torch.manual_seed(0)
    model = row.adapt(LLAMA, init_weights=False).to(DEVICE).eval()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    ids = tokens(2, 1).to(DEVICE)
    expected = model(input_ids=ids).logits.detach().float()
    with torch.no_grad():
        quick = model(input_ids=ids).logits.float()
    error = (quick - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_step_under_autocast_is_near_that_in_float32(name: str, checkpointing: bool) -> None:
    gradients = []
    for autocast in (False, True):
        model, ids = adapted(name), tokens(4, 12).to(DEVICE)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 0.1


@pytest.mark.parametrize("shape", [(48, 48), (300, 90), (90, 300), (900, 700), (700, 1500)], ids=str)
@pytest.mark.parametrize("which", ["smallest", "largest"])
def test_triplets_are_those_of_the_full_decomposition(shape: tuple[int, int], which: str) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    _, values, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    made = (smallest_triplets if which == "smallest" else largest_triplets)(weight.to(DEVICE), 8)
    assert made.values.device.type == torch.device(DEVICE).type
    expected = values[-8:] if which == "smallest" else values[:8]
    torch.testing.assert_close(made.values.cpu().double(), expected, rtol=1e-4, atol=1e-6)
    product = weight.to(DEVICE).double() @ made.down.double().mT
    torch.testing.assert_close(product, made.up.double() * made.values.double(), rtol=0, atol=1e-5 * float(values[0]))


def test_weights_of_one_shape_are_decomposed_together() -> None:
    weights = [torch.randn(64, 40, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in range(5)]
    weights[2][:, 7] = weights[2][:, 3]  # one of them has no full rank
    made = decompose([lambda w=weight: w for weight in weights], [4] * 5, cache=False)
    for weight, triplets in zip(weights, made, strict=True):
        expected = torch.linalg.svdvals(weight.double().cpu())[-4:]
        torch.testing.assert_close(triplets.values.cpu().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["disel", "pedyra"])
def test_a_compiled_model_has_the_same_gradients(name: str) -> None:
    torch.manual_seed(0)
    config: Any = {"disel": dynalora.DiselConfig, "pedyra": dynalora.PedyraConfig}[name]
    options = {} if name == "disel" else {"total_steps": 10, "max_rank": 6}
    model: Any = peft.get_peft_model(MLP(), config(r=4, target_modules=["first", "second"], **options))
    model.to(DEVICE).train()
    x, gradients = torch.randn(8, 12).to(DEVICE), []
    torch._dynamo.reset()
    for inner in (model.base_model.model, torch.compile(model.base_model.model, fullgraph=True)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(inner(x), (torch.arange(8) % 3).to(DEVICE)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


def test_padding_on_the_left_leaves_losses_and_gradients_as_they_are() -> None:
    """Some kernels of attention are wrong where rows see nothing but padding."""
    model, ids = adapted("dira"), tokens(1, 40).to(DEVICE)
    together = torch.cat([torch.zeros_like(ids), ids], dim=1)
    mask = (torch.arange(80, device=DEVICE) >= 40).long()[None]
    places = (mask.cumsum(1) - 1).clamp_min(0)
    losses = []
    for inputs in (
        {"input_ids": ids, "labels": ids},
        {
            "input_ids": together,
            "attention_mask": mask,
            "position_ids": places,
            "labels": together.masked_fill(mask == 0, -100),
        },
    ):
        model.zero_grad()
        with attention_over_padding(), torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
        losses.append(float(loss))
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
