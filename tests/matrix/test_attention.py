"""`nn.MultiheadAttention`: an update for each of its projections, in the same form as every layer's."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_base_model_state_dict, set_base_model_state_dict
from torch import Tensor, nn

import dynalora
from dynalora.adapter.attention import AdaptedAttention
from dynalora.adapter.layer import adapter_layers
from dynalora.errors import ConfigError, UnsupportedError
from dynalora.export import export_lora
from dynalora.export.lora import export_adapter_folder
from tests.matrix.rows import Row, every_method, every_static_row
from tests.matrix.test_behaviour import train_all
from tests.toys import Toy

PARTS = {"q", "k", "v", "out"}


class Attending(nn.Module):
    """An attention between an input and its first places, and a head; ``forward(x)`` gives the logits."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        for name, parameter in self.attn.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, size = x.to(self.head.weight.dtype), self.attn.kdim
        seen, _ = self.attn(x, x[:, :3, :size], x[:, :3], need_weights=False)
        return self.head(seen)


def toy(**settings: Any) -> Toy:
    def batch(seed: int) -> dict[str, Tensor]:
        return {"x": torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed))}

    return Toy("attention", lambda: Attending(**settings), ("attn",), batch)


PLAIN = toy()


def merged_reference(model: Any) -> nn.Module:
    """torch's own attention with the updates in its parameters."""
    plain: nn.Module = copy.deepcopy(model).merge_and_unload()
    attention = plain.attn
    assert type(attention) is nn.MultiheadAttention
    assert "in_proj_weight" in dict(attention.named_parameters())
    return plain


@pytest.mark.parametrize("cross", [False, True], ids=["joined", "kdim"])
@every_static_row
def test_it_computes_what_torchs_attention_with_merged_weights_does(row: Row, cross: bool) -> None:
    """Result and gradients, the latter by autograd through W0 + s·ΔW, in float64."""
    if row.alone:
        pytest.skip("DoRA takes its norms for constants")
    model = row.adapt(toy(kdim=6) if cross else PLAIN, init_weights=False).double()
    layers = {name.rpartition(".")[2]: layer for name, layer in adapter_layers(model).items()}
    assert layers.keys() == PARTS
    loss = PLAIN.loss(model)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [p.grad for p in trained]
    model.zero_grad()

    base = (toy(kdim=6) if cross else PLAIN).build().double()
    deltas = {
        name: layer.scaling["default"] * torch.matmul(*layer.factors("default")) for name, layer in layers.items()
    }
    weights = {name: p.detach() for name, p in base.named_parameters()}
    if cross:
        for name in "qkv":
            weights[f"attn.{name}_proj_weight"] = weights[f"attn.{name}_proj_weight"] + deltas[name]
    else:
        joined = torch.cat([deltas[name] for name in "qkv"])
        weights["attn.in_proj_weight"] = weights["attn.in_proj_weight"] + joined
    weights["attn.out_proj.weight"] = weights["attn.out_proj.weight"] + deltas["out"]

    class Merged(nn.Module):
        def forward(self, **batch: Any) -> Any:
            return torch.func.functional_call(base, weights, kwargs=batch)

    expected = PLAIN.loss(Merged())
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, trained, allow_unused=True)
    for parameter, before, after in zip(trained, found, wanted, strict=True):
        zero = torch.zeros_like(parameter)
        torch.testing.assert_close(zero if before is None else before, zero if after is None else after)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "added-keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other-widths": {"kdim": 5, "vdim": 6},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=[*SETTINGS])
@pytest.mark.parametrize("layout", ["rows", "places", "one"])
@pytest.mark.parametrize("need_weights", [False, True, None])
def test_every_argument_means_what_it_means_to_torchs_attention(
    settings: dict[str, Any], layout: str, need_weights: bool | None
) -> None:
    """Masks of all kinds, weights by head and averaged (None), layouts, added keys: against torch's own."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=layout == "rows", **settings)})
    config = dynalora.DiraConfig(r=2, target_modules=["attn"], init_weights=False)
    model = peft.get_peft_model(base, config).double().eval()
    attention: Any = model.base_model.model["attn"]
    reference = copy.deepcopy(model).merge_and_unload()["attn"]
    widths = 8, settings.get("kdim", 8), settings.get("vdim", 8)
    inputs = [torch.randn(3, 4, width).double() for width in widths]
    if layout == "places":
        inputs = [x.transpose(0, 1) for x in inputs]
    elif layout == "one":
        inputs = [x[0] for x in inputs]
    heads = 2 if layout == "one" else 6
    causal = torch.ones(4, 4).triu(1).bool()
    by_head = torch.rand(heads, 4, 4) > 0.7
    by_head[..., 0] = False
    masks = [None, causal, torch.randn(4, 4).double(), by_head]
    padded = torch.arange(4) >= torch.tensor([4, 2, 3])[:, None]
    paddings = [None, padded, torch.randn(3, 4).double()]
    for mask in masks:
        for padding in paddings:
            if layout == "one" and padding is not None:
                padding = padding[0]
            arguments: dict[str, Any] = {
                "attn_mask": mask,
                "key_padding_mask": padding,
                "is_causal": mask is causal,
                "need_weights": need_weights is not False,
                "average_attn_weights": need_weights is not True,
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # masks of two types
                expected, expected_weights = reference(*inputs, **arguments)
            result, weights = attention(*inputs, **arguments)
            torch.testing.assert_close(result, expected)
            assert (weights is None) == (expected_weights is None)
            if weights is not None:
                torch.testing.assert_close(weights, expected_weights)
    with pytest.raises(ConfigError, match="attn_mask"):
        attention(*inputs, is_causal=True)


@every_method
def test_it_starts_trains_merges_and_is_saved(row: Row, tmp_path: Path) -> None:
    expected = PLAIN.logits(PLAIN.build())
    model = row.adapt(PLAIN)
    torch.testing.assert_close(PLAIN.logits(model), expected, atol=2e-5, rtol=2e-5)
    train_all(model, PLAIN, steps=4)
    trained = PLAIN.logits(model)
    assert not torch.allclose(trained, expected, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(PLAIN.logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(PLAIN.build(), tmp_path)
    # torch's fused attention rounds as its operands lie in memory.
    torch.testing.assert_close(PLAIN.logits(loaded), trained, atol=1e-6, rtol=1e-6)
    if not row.static:
        with pytest.raises(UnsupportedError, match="depends on the input"):
            model.merge_adapter()
        return
    model.merge_adapter()
    torch.testing.assert_close(PLAIN.logits(model), trained, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():  # takes the updates back
        torch.testing.assert_close(PLAIN.logits(model), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(PLAIN.logits(model), trained, atol=1e-5, rtol=1e-5)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(PLAIN.logits(model), trained, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(PLAIN.logits(merged_reference(model)), trained, atol=1e-5, rtol=1e-5)
    assert type(model.unload().attn) is nn.MultiheadAttention


def test_gates_see_every_place() -> None:
    model = Row("disel", dynalora.DiselConfig, static=False).adapt(PLAIN, init_weights=False).double()
    layer = adapter_layers(model)["base_model.model.attn.projections.k"]
    x = torch.randn(2, 3, 8).double()
    up, down = layer.sides("default")
    gates = (x @ layer.parameter("gate_weight", "default").t() + layer.parameter("gate_bias", "default")).sigmoid()
    base = model.base_model.model.attn.base_layer
    expected = x @ base.in_proj_weight[8:16].t() + base.in_proj_bias[8:16]
    expected = expected + layer.scaling["default"] * (gates * (x @ down.t())) @ up.t()
    torch.testing.assert_close(layer(x), expected)


def test_mixed_batches_go_by_rows_in_both_layouts() -> None:
    for batch_first in (False, True):
        torch.manual_seed(0)
        base = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=batch_first)})
        config = dynalora.DiselConfig(r=2, target_modules=["attn"], init_weights=False)
        model = peft.get_peft_model(base, config).eval()
        model.add_adapter("other", dynalora.DiselConfig(r=3, target_modules=["attn"], init_weights=False))
        attention: Any = model.base_model.model["attn"]
        x = torch.randn(3, 4, 8)

        def outputs(rows: Tensor, batch_first: bool = batch_first, attention: Any = attention) -> Tensor:
            y = rows if batch_first else rows.transpose(0, 1)
            y = attention(y, y, y, need_weights=False)[0]
            return y if batch_first else y.transpose(0, 1)

        expected = []
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            expected.append(outputs(x))
        with model.base_model._enable_peft_forward_hooks(adapter_names=["default", "other", "__base__"]):
            mixed = outputs(x)
        torch.testing.assert_close(mixed[0], expected[0][0])
        torch.testing.assert_close(mixed[1], expected[1][1])
        with model.disable_adapter():
            torch.testing.assert_close(mixed[2], outputs(x)[2])


def test_mixed_batches_with_an_attention_that_the_active_adapter_leaves_alone() -> None:
    config = dynalora.DiraConfig(r=2, target_modules=["head"], init_weights=False)
    model = peft.get_peft_model(PLAIN.build(), config)
    model.add_adapter("other", dynalora.DiraConfig(r=2, target_modules=["attn"], init_weights=False))
    model.eval()
    batch, names = PLAIN.batch(5), ["other", "default", "__base__"]
    with torch.no_grad():
        found = model(**batch, adapter_names=names)
        for number, name in enumerate(names[:2]):
            model.set_adapter(name)
            torch.testing.assert_close(found[number], model(**batch)[number])
        torch.testing.assert_close(found[2], PLAIN.build()(**batch)[2])
        model.set_adapter("other")
        model.merge_adapter()
        with pytest.raises(ConfigError, match="other is merged; call unmerge_adapter"):
            model(**batch, adapter_names=names)


@pytest.mark.parametrize("which", ["all", "only"])
def test_the_outputs_bias_trains_as_with_lora(which: str, tmp_path: Path) -> None:
    """PEFT's LoRA trains the bias of the output's projection; those of the others lie in one parameter."""
    trained = {}
    for method, kind, run in (("lora", peft.LoraConfig, {}), ("dira", dynalora.DiraConfig, {"total_steps": 2})):
        bias: Any = which if which == "all" else f"{method}_only"
        config: Any = kind(r=2, target_modules=["attn"], bias=bias, **run)
        model: Any = peft.get_peft_model(PLAIN.build(), config)
        names = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
        trained[method] = {name.replace("base_layer.", "") for name in names}
    assert trained["dira"] == trained["lora"]
    assert "base_model.model.attn.out_proj.bias" in trained["dira"]
    before = model.base_model.model.attn.out_proj.bias.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        PLAIN.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.base_model.model.attn.out_proj.bias, before)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(PLAIN.build(), tmp_path)
    assert torch.equal(PLAIN.logits(loaded), PLAIN.logits(model))
    torch.testing.assert_close(PLAIN.logits(copy.deepcopy(model).merge_and_unload()), PLAIN.logits(model))


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_does_not_pass_over_it_in_evaluation(padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    config = dynalora.DiselConfig(r=2, target_modules=["self_attn"], init_weights=False)
    model = peft.get_peft_model(nn.TransformerEncoder(layer, 2), config)
    x = torch.randn(3, 4, 8)
    mask = torch.arange(4) >= torch.tensor([4, 2, 3])[:, None] if padded else None
    seen = ~mask if mask is not None else torch.ones(3, 4, dtype=torch.bool)
    expected = model.train()(x, src_key_padding_mask=mask)[seen]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=mask)[seen], expected, atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(model(x, src_key_padding_mask=mask)[seen], expected, atol=1e-2)


# --- which are meant -----------------------------------------------------------------------------------------


def parts(model: nn.Module, adapter: str = "default") -> set[str]:
    return {name.rpartition("projections.")[2] for name in adapter_layers(model, adapter) if "projections" in name}


@every_method
def test_the_whole_or_the_output_is_named_or_all_linear_takes_it(row: Row) -> None:
    def adapted(**settings: Any) -> Any:
        return peft.get_peft_model(Attending(), row.configure(PLAIN, **{"r": 2, **settings}))

    assert parts(adapted(target_modules=["attn"])) == PARTS
    assert parts(adapted(target_modules="all-linear")) == PARTS
    assert parts(adapted(target_modules=["head", "out_proj"])) == {"out"}
    assert parts(adapted(target_modules=r".*attn.*")) == PARTS
    assert parts(adapted(target_modules="all-linear", exclude_modules=["out_proj"])) == PARTS - {"out"}
    assert parts(adapted(target_modules=["attn"], exclude_modules=["projections.k"])) == PARTS - {"k"}
    assert parts(adapted(target_modules="all-linear", exclude_modules=["attn"])) == set()
    second = adapted(target_modules=["head"])
    second.add_adapter("second", row.configure(PLAIN, r=2, target_modules="all-linear"))
    assert parts(second) == set()
    assert parts(second, "second") == PARTS
    second.set_adapter("second")
    assert not second.base_model.model.attn.projections["q"].disable_adapters


@pytest.mark.parametrize(
    ("target", "excluded"),
    [(["attn", "head"], ["out_proj"]), (["attn", "head"], ["projections.k"]), ("all-linear", ["attn"])],
)
def test_what_is_left_out_is_not_said_to_have_been_left_in(
    target: Any, excluded: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """PEFT warns where `exclude_modules` names nothing, and must not where it took effect."""
    peft.get_peft_model(Attending(), dynalora.DiraConfig(r=2, target_modules=target, exclude_modules=excluded))
    assert not [warning for warning in recwarn if "no modules were excluded" in str(warning.message)]
    with pytest.warns(UserWarning, match="no modules were excluded"):
        peft.get_peft_model(Attending(), dynalora.DiraConfig(r=2, target_modules=target, exclude_modules=["other"]))


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "own": Own(8, 2), "narrow": nn.Linear(8, 1)})
    for settings, error, match in (
        ({"target_modules": ["attn", "own"]}, UnsupportedError, "'own' is a Own"),
        ({"target_modules": ["attn", "narrow"]}, ConfigError, "'narrow'"),
    ):
        with pytest.raises(error, match=match):
            peft.get_peft_model(model, dynalora.DisloraConfig(r=4, total_steps=4, **settings))  # type: ignore[arg-type]
        assert type(model["attn"]) is nn.MultiheadAttention


def test_peft_finds_the_base_models_weights_by_their_own_names() -> None:
    base = Attending()
    before = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, dynalora.DiraConfig(r=2, target_modules="all-linear"))
    found = get_base_model_state_dict(model)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    result = set_base_model_state_dict(model, before)
    assert not result.missing_keys + result.unexpected_keys
    assert all(torch.equal(tensor, before[name]) for name, tensor in get_base_model_state_dict(model).items())


def test_it_is_not_exported(tmp_path: Path) -> None:
    """PEFT's LoRA of an attention adds the output's update twice; if this fails, an export can be written."""
    stock = peft.get_peft_model(Attending(), peft.LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False))
    layer = stock.base_model.model.attn.base_layer.out_proj  # type: ignore[union-attr]
    delta = layer.get_delta_weight("default").detach()
    merged: Any = copy.deepcopy(stock).merge_and_unload()
    torch.testing.assert_close(merged.attn.out_proj.weight.detach() - layer.base_layer.weight.detach(), 2 * delta)

    model = peft.get_peft_model(Attending(), dynalora.DiraConfig(r=2, target_modules=["attn"]))
    with pytest.raises(UnsupportedError, match=r"'attn' .* merge_and_unload"):
        export_lora(model, tmp_path / "export")
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(UnsupportedError, match=r"'attn' .* merge_and_unload"):
        export_adapter_folder(str(tmp_path / "ours"), str(tmp_path / "export"))


def test_copies_and_compiled_code_have_their_own() -> None:
    model = Row("dira", dynalora.DiraConfig, static=True).adapt(PLAIN, init_weights=False)
    copied = copy.deepcopy(model)
    expected = PLAIN.logits(model)
    assert isinstance(copied.base_model.model.attn, AdaptedAttention)
    with torch.no_grad():
        model.base_model.model.attn.in_proj_weight.zero_()
    assert torch.equal(PLAIN.logits(copied), expected)
    assert not torch.allclose(PLAIN.logits(model), expected)
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**PLAIN.batch(5)), expected)
