"""Quantised bases besides bitsandbytes': torchao's int8, and layers that PEFT knows and that are not installed here."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import dynalora
from dynalora.errors import UnsupportedError
from dynalora.forgetting.base_model import fingerprint
from tests.matrix.rows import Row, every_method, every_row
from tests.matrix.test_behaviour import adapted_layers, train
from tests.toys import MLP, TOYS, llama, output_of

TARGETS = ("first", "second")


def forward_on(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return output_of(model.eval()(x=x))


def inputs() -> Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(3))


def train_mlp(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x=x), torch.arange(6) % 3).backward()
        optimizer.step()


# --- torchao -------------------------------------------------------------------------------------------------


@pytest.fixture
def int8() -> Any:
    """torchao's setting of int8 weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
    return quantization.Int8WeightOnlyConfig()


def int8_mlp(int8: Any) -> nn.Module:
    from torchao.quantization import quantize_

    torch.manual_seed(11)
    model = MLP(width_in=64, width=64).eval()
    quantize_(model, int8, filter_fn=lambda _, name: name in TARGETS)
    return model


def int8_llama(folder: Path, int8: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.TorchAoConfig(int8), dtype=torch.float32
    )


def is_int8(layer: nn.Module) -> bool:
    return type(layer.weight).__module__.startswith("torchao")


def stored(layer: nn.Module) -> dict[str, Tensor]:
    """The plain tensors that a torchao weight is made of."""
    names, _ = layer.weight.__tensor_flatten__()
    return {name: getattr(layer.weight, name).clone() for name in names}


@every_row
def test_torchao_linear(row: Row, int8: Any, tmp_path: Path) -> None:
    toy, x = TOYS["mlp"], inputs()
    base = int8_mlp(int8)
    assert all(is_int8(getattr(base, name)) for name in TARGETS)
    expected, weights, mark = forward_on(base, x), stored(base.second), fingerprint(base)
    model = row.adapt(toy, base)
    assert len(adapted_layers(model)) == 2
    assert fingerprint(model) == mark
    row.assert_start(forward_on(model, x), expected)
    train_mlp(model, x)
    trained = forward_on(model, x)
    assert not torch.equal(trained, expected)
    with model.disable_adapter():
        assert torch.equal(forward_on(model, x), expected)

    model.save_pretrained(tmp_path)
    assert all("base_layer" not in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(int8_mlp(int8), tmp_path)
    assert torch.equal(forward_on(loaded, x), trained)

    # What was not loaded through transformers does not say how to quantise a merged weight.
    with pytest.raises(UnsupportedError, match="TorchAoConfig" if row.static else "quantised|input"):
        model.merge_adapter()
    assert torch.equal(forward_on(model.unload(), x), expected)
    for name, tensor in stored(base.second).items():
        assert torch.equal(tensor, weights[name])


@every_method
def test_torchao_transformer_through_from_pretrained(row: Row, int8: Any, tmp_path: Path) -> None:
    toy = TOYS["llama"]
    llama(width=64).save_pretrained(tmp_path / "base")
    base = int8_llama(tmp_path / "base", int8)
    expected = toy.logits(base)
    model = row.adapt(toy, base)
    row.assert_start(toy.logits(model), expected)
    train(model, toy)
    trained = toy.logits(model)
    scale = (trained - expected).norm()
    assert scale > 0
    with model.disable_adapter():
        assert torch.equal(toy.logits(model), expected)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(int8_llama(tmp_path / "base", int8), tmp_path / "adapter")
    assert torch.equal(toy.logits(loaded), trained)
    if not row.static:
        with pytest.raises(UnsupportedError, match="input"):
            model.merge_adapter()
        return

    dynalora.export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(int8_llama(tmp_path / "base", int8), tmp_path / "lora").eval()
    torch.testing.assert_close(toy.logits(lora), trained, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep", [False, True], ids=["merge_and_unload", "unmerge"])
def test_merging_into_int8_quantises_again(keep: bool, int8: Any, tmp_path: Path) -> None:
    toy = TOYS["llama"]
    llama(width=64).save_pretrained(tmp_path)
    base = int8_llama(tmp_path, int8)
    config = dynalora.DiraConfig(r=4, alpha=8, target_modules=["q_proj"], init_weights=False, total_steps=9)
    model = peft.get_peft_model(base, config).eval()
    layers = adapted_layers(model)
    expected = {}
    for name, layer in layers.items():
        plain = layer.get_base_layer().weight.dequantize()
        expected[name] = plain, plain + layer.get_delta_weight("default")
    unmerged = toy.logits(model)
    merged = (model.merge_adapter() or model) if keep else model.merge_and_unload(safe_merge=True)
    for name, (plain, wanted) in expected.items():
        layer = layers[name].get_base_layer()
        assert is_int8(layer)
        assert isinstance(layer.weight, nn.Parameter)
        # Half a step of int8, whose largest value in each row is 127.
        step = wanted.abs().amax(1, keepdim=True) / 127
        assert ((layer.weight.dequantize() - wanted).abs() <= 0.51 * step).all()
        assert not torch.allclose(layer.weight.dequantize(), plain)
    assert (toy.logits(merged) - unmerged).norm() < 0.05 * unmerged.norm()
    if keep:
        model.unmerge_adapter()
        for name, (plain, wanted) in expected.items():
            back = layers[name].get_base_layer().weight.dequantize()
            step = wanted.abs().amax(1, keepdim=True) / 127 + plain.abs().amax(1, keepdim=True) / 127
            assert ((back - plain).abs() <= 0.52 * step).all()


def test_a_layer_that_torchao_leaves_alone_stays_as_it_was(int8: Any, tmp_path: Path) -> None:
    """Settings by module name find no name when a layer is quantised by itself."""
    from torchao.quantization import FqnToConfig

    toy = TOYS["llama"]
    llama(width=64).save_pretrained(tmp_path)
    names = [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]
    base = int8_llama(tmp_path, FqnToConfig(dict.fromkeys(names, int8)))
    config = dynalora.DiraConfig(r=4, alpha=8, target_modules=["q_proj"], init_weights=False, total_steps=9)
    model = peft.get_peft_model(base, config).eval()
    assert all(is_int8(layer.get_base_layer()) for layer in adapted_layers(model).values())
    before = toy.logits(model)
    with pytest.raises(UnsupportedError, match="does not say how to quantise this layer by itself"):
        model.merge_adapter()
    assert torch.equal(toy.logits(model), before)


# --- layers that compute and no more (GPTQ, AWQ and others) -----------------------------------------------------


class Packed(nn.Module):
    """What PEFT recognises as GPTQModel's layer: sizes, packed weights as buffers, a forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight * self.scales, self.bias)


@pytest.fixture
def gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for GPTQModel, found where PEFT looks for it."""
    package, inner = types.ModuleType("gptqmodel"), types.ModuleType("gptqmodel.nn_modules")
    qlinear: Any = types.ModuleType("gptqmodel.nn_modules.qlinear")
    qlinear.BaseQuantLinear = Packed
    for module in (package, inner, qlinear):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for place in ("quantization_utils", "other"):
        monkeypatch.setattr(f"peft.utils.{place}.is_gptqmodel_available", lambda: True, raising=False)


def packed_mlp() -> MLP:
    torch.manual_seed(11)
    model = MLP(width_in=64, width=64).eval()
    for name in TARGETS:
        setattr(model, name, Packed(getattr(model, name)))
    return model


@every_row
@pytest.mark.usefixtures("gptq")
def test_a_backend_that_only_computes(row: Row, tmp_path: Path) -> None:
    toy, x = TOYS["mlp"], inputs()
    base = packed_mlp()
    expected = forward_on(base, x)
    if row.needs_weights:  # it trains directions of the weight itself
        with pytest.raises(UnsupportedError, match="values of gptq weights cannot be read"):
            row.adapt(toy, base)
        return
    model = row.adapt(toy, base)
    assert len(adapted_layers(model)) == 2
    row.assert_start(forward_on(model, x), expected)
    train_mlp(model, x)
    trained = forward_on(model, x)
    assert not torch.equal(trained, expected)
    with model.disable_adapter():
        assert torch.equal(forward_on(model, x), expected)
    with pytest.raises(UnsupportedError, match="cannot merge into a gptq layer" if row.static else "gptq|input"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(packed_mlp(), tmp_path)
    assert torch.equal(forward_on(loaded, x), trained)
    assert torch.equal(forward_on(model.unload(), x), expected)


@pytest.mark.usefixtures("gptq")
def test_pissa_says_that_it_needs_the_weights() -> None:
    config = dynalora.PedyraConfig(r=4, target_modules=list(TARGETS), init_weights="pissa", total_steps=9)
    with pytest.raises(UnsupportedError, match="values of gptq weights cannot be read, which pedyra needs"):
        peft.get_peft_model(packed_mlp(), config)


def test_a_packed_layer_without_its_library_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'first' is a Packed, which dira cannot adapt"):
        peft.get_peft_model(packed_mlp(), dynalora.DiraConfig(r=4, target_modules=["first"], total_steps=9))


def test_finetune_holds_the_base_in_int8(int8: Any, tmp_path: Path) -> None:
    from dynalora.jobs.finetune.run import finetune
    from dynalora.jobs.finetune.settings import FinetuneSpec
    from tests.unit import tiny

    tiny.saved_model(tmp_path / "model")
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.rows())
    spec = FinetuneSpec(
        model=str(tmp_path / "model"), data=str(data), output=str(tmp_path / "run"), method="dira", r=2, steps=3,
        quantization="int8", retention=False,
    )  # fmt: skip
    result = finetune(spec)
    layers = adapted_layers(result.model)
    assert layers
    assert all(is_int8(layer.get_base_layer()) for layer in layers.values())
    assert result.held_out_after is not None
    assert result.held_out_after < result.held_out_before
