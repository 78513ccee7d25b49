"""RaSA against its float64 reference: the pool, its one gradient from many users, saving and handing on."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from dynalora import RasaConfig, compact, export_lora
from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import ConfigError, UnsupportedError
from tests.reference import rasa as reference


class Blocks(nn.Module):
    """Blocks of two linear layers of different kinds."""

    def __init__(self, count: int, width: int, inner: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"first": nn.Linear(width, inner, bias=False), "second": nn.Linear(inner, width, bias=False)})
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["second"](torch.tanh(block["first"](x)))  # type: ignore[index]
        return x


def model_of(count: int, width: int, inner: int, *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    base = Blocks(count, width, inner).double()
    config = RasaConfig(**{"alpha": 3, "target_modules": ["first", "second"], **options})
    return peft.get_peft_model(base, config, autocast_adapter_dtype=False).double()


def layers_of(model: Any, name: str) -> list[Any]:
    found = [m for m in model.modules() if isinstance(m, AdapterLayer) and m.name.endswith(name)]
    return sorted(found, key=lambda layer: layer.name)


@settings(deadline=None, max_examples=15)
@given(
    count=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    r=st.integers(1, 5),
    k=st.integers(1, 3),
    seed=st.integers(0, 99),
    other=st.integers(1, 4),
)
def test_updates_and_gradients_are_the_papers(
    count: int, sizes: tuple[int, int], r: int, k: int, seed: int, other: int
) -> None:
    model = model_of(
        count, *sizes, seed=seed, r=r, shared_rank=k, init_weights=False, rank_pattern={r"blocks\.0\.first": other}
    )
    mirrors: dict[str, dict[str, list[Tensor]]] = {}
    with torch.no_grad():
        for name in ("first", "second"):
            layers = layers_of(model, name)
            for layer in layers:
                layer.parameter("mix", "default").copy_(torch.randn_like(layer.parameter("mix", "default")))
            mirrors[name] = {
                role: [layer.parameter(role, "default").detach().clone().requires_grad_() for layer in layers]
                for role in ("down", "up", "mix")
            }
    x = torch.randn(4, sizes[0], dtype=torch.float64)
    model(x).square().sum().backward()
    deltas: dict[str, list[Tensor]] = {}
    for name, mirror in mirrors.items():
        layers = layers_of(model, name)
        # s is each layer's own where ranks differ; the reference takes one layer at a time.
        deltas[name] = [
            reference.updates(mirror["down"], mirror["up"], _only(mirror["mix"], i), k, layer.scaling["default"])[i]
            for i, layer in enumerate(layers)
        ]
        for layer, delta in zip(layers, deltas[name], strict=True):
            torch.testing.assert_close(layer.get_delta_weight("default"), delta, atol=1e-12, rtol=1e-9)
    y = x
    for block in range(count):
        for name in ("first", "second"):
            y = y @ (layers_of(model, name)[block].base_layer.weight.detach() + deltas[name][block]).T
            y = torch.tanh(y) if name == "first" else y
    y.square().sum().backward()
    for name, mirror in mirrors.items():
        for role, tensors in mirror.items():
            for layer, tensor in zip(layers_of(model, name), tensors, strict=True):
                assert tensor.grad is not None
                torch.testing.assert_close(layer.parameter(role, "default").grad, tensor.grad, atol=1e-8, rtol=1e-8)


def _only(mixes: list[Tensor], index: int) -> list[Tensor]:
    """The weights of one layer, and what stands for those of the others, which do not matter to it."""
    return [mix if i == index else mix.detach() for i, mix in enumerate(mixes)]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("r", "k"), [(16, None), (4, 1), (5, 3), (2, 2)])
def test_it_starts_as_the_paper_says(r: int, k: int | None, rslora: bool) -> None:
    model = model_of(3, 20, 18, r=r, shared_rank=k, alpha=6.0, use_rslora=rslora)
    shared = k or r // 8
    for layer in layers_of(model, "first"):
        s = layer.scaling["default"]
        assert s == pytest.approx(6.0 / (r**0.5 if rslora else r))
        expected = reference.start(r, 3 * shared, shared, 6.0, s)
        torch.testing.assert_close(layer.parameter("mix", "default").detach(), torch.tensor(expected).double())
        assert layer.factors("default")[1].shape[0] == r - shared + 3 * shared
        assert not layer.parameter("up", "default").any()


def test_every_component_is_saved_once_and_exported_with_each_layer_that_uses_it(tmp_path: Path) -> None:
    model = model_of(3, 6, 5, r=4, init_weights=False, shared_rank=2)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path / "own")
    saved = load_file(tmp_path / "own" / "adapter_model.safetensors")
    assert sum(t.numel() for n, t in saved.items() if "down" in n or "up" in n) == 6 * 4 * (6 + 5)
    written = export_lora(model, tmp_path / "lora")
    assert set(written.ranks.values()) == {2 + 2 * 3}
    torch.manual_seed(0)
    base = Blocks(3, 6, 5).double()
    for kind in ("own", "lora"):
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / kind, autocast_adapter_dtype=False)
        torch.testing.assert_close(loaded.eval()(x), expected, atol=1e-12, rtol=1e-12)
        base = loaded.unload()
    torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-12, rtol=1e-12)


def test_a_deleted_model_is_freed_at_once() -> None:
    model = model_of(3, 6, 5, r=4)
    model(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    layers = [weakref.ref(layer) for layer in layers_of(model, "first")]
    del model
    assert all(layer() is None for layer in layers)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="shared_rank must be a positive integer, or None"):
        RasaConfig(shared_rank=0)
    model = model_of(2, 6, 5, r=4, init_weights=False)
    with pytest.raises(UnsupportedError, match="pooled components act in all layers of a kind"):
        compact(model)
