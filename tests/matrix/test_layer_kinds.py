"""Convolutions and embeddings: every method's update of them is one of their weight, as it is of a linear layer's."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.errors import CheckpointError, ConfigError, UnsupportedError
from tests.families import DECODER
from tests.matrix.rows import FIRST_OF_EACH_METHOD, Row
from tests.matrix.test_behaviour import train_all
from tests.toys import Toy, tokens

TOKENS = 11


class Around(nn.Module):
    """A layer between two others; ``forward(x)`` gives the logits."""

    def __init__(self, layer: nn.Module, channels: int, outputs: int) -> None:
        super().__init__()
        self.before: nn.Module = nn.Identity() if isinstance(layer, nn.Embedding) else nn.Linear(3, channels)
        self.layer = layer
        self.head = nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            x = self.before(x.to(self.head.weight.dtype)).movedim(-1, 1)
        y = torch.tanh(self.layer(x))
        return self.head(y.movedim(1, -1).flatten(1, -2).mean(1) if x.is_floating_point() else y.mean(1))


def _convolution(kind: Any, name: str, channels: int, outputs: int, **settings: Any) -> Toy:
    size = {nn.Conv1d: (9,), nn.Conv2d: (7, 6), nn.Conv3d: (5, 4, 4)}[kind]

    def build() -> nn.Module:
        torch.manual_seed(3)
        return Around(kind(channels, outputs, **settings), channels, outputs)

    def batch(seed: int) -> dict[str, Tensor]:
        return {"x": torch.randn(3, *size, 3, generator=torch.Generator().manual_seed(seed))}

    return Toy(name, build, ("layer",), batch)


def _embedding(name: str, **settings: Any) -> Toy:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return Around(nn.Embedding(TOKENS, 8, **settings), 0, 8)

    def batch(seed: int) -> dict[str, Tensor]:
        return {"x": torch.randint(0, TOKENS, (4, 6), generator=torch.Generator().manual_seed(seed))}

    return Toy(name, build, ("layer",), batch)


PLAIN = _convolution(nn.Conv2d, "conv2d", 4, 6, kernel_size=3, stride=2, padding=1)
EMBEDDING = _embedding("embedding")
KINDS = (
    PLAIN,
    EMBEDDING,
    _embedding("padded-embedding", padding_idx=2),
    _convolution(nn.Conv1d, "conv1d", 4, 6, kernel_size=3, dilation=2, bias=False),
    _convolution(nn.Conv1d, "depthwise", 6, 6, kernel_size=5, padding=4, groups=6),
    _convolution(nn.Conv2d, "groups", 4, 6, kernel_size=(3, 2), padding="same", groups=2, padding_mode="reflect"),
    _convolution(nn.Conv2d, "one-by-one", 4, 6, kernel_size=1),
    _convolution(nn.Conv3d, "conv3d", 4, 6, kernel_size=(2, 2, 1), padding_mode="circular", padding=(1, 0, 1)),
)
EVERY_KIND = tuple(row for row in FIRST_OF_EACH_METHOD if row.name != "increlora")
every_kind = pytest.mark.parametrize("toy", KINDS, ids=lambda toy: toy.name)
every_row = pytest.mark.parametrize("row", EVERY_KIND, ids=lambda row: row.name)


def adapted(row: Row, toy: Toy, **overrides: Any) -> Any:
    torch.manual_seed(5)
    return row.adapt(toy, **{"r": 3, "alpha": 5, **overrides})


@every_kind
@every_row
def test_an_update_is_one_of_the_weight(row: Row, toy: Toy) -> None:
    """Result and gradients against autograd through the weight of a layer of torch's, in float64."""
    model = adapted(row, toy, init_weights=False).double()
    assert torch.equal(toy.logits(toy.build()), toy.logits(disabled(model).float()))
    model = model.double()
    (layer,) = adapter_layers(model).values()
    held = torch.rand(3, dtype=torch.float64)
    if not row.static:
        layer.held_gates["default"] = held
    loss = toy.loss(model)
    loss.backward()
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    model.zero_grad()

    base = toy.build().double()
    delta = layer.scaling["default"] * torch.matmul(*layer.factors("default"))
    weight = base.layer.weight  # type: ignore[union-attr]
    assert delta.shape == (layer.out_features, layer.in_features)
    delta = delta.t() if isinstance(base.layer, nn.Embedding) else delta.reshape(weight.shape)

    class Merged(nn.Module):
        training = False

        def forward(self, **batch: Any) -> Any:
            return functional_call(base, {"layer.weight": weight.detach() + delta}, kwargs=batch)

    expected = toy.loss(Merged())
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and "gate" not in name:
            zero = torch.zeros_like(parameter)
            torch.testing.assert_close(found.get(name, zero), zero if parameter.grad is None else parameter.grad)


def disabled(model: Any) -> nn.Module:
    """A copy without its adapter."""
    base: nn.Module = copy.deepcopy(model).unload()
    return base


@every_row
@pytest.mark.parametrize("toy", [PLAIN, EMBEDDING, KINDS[5]], ids=lambda toy: toy.name)
def test_it_starts_trains_merges_and_is_saved(row: Row, toy: Toy, tmp_path: Path) -> None:
    base = toy.build()
    expected = toy.logits(base)
    model = adapted(row, toy)
    row.assert_start(toy.logits(model), expected)
    train_all(model, toy, steps=4)
    trained = toy.logits(model)
    assert not torch.allclose(trained, expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(toy.logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(toy.build(), tmp_path)
    assert torch.equal(toy.logits(loaded), trained)
    if not row.static:
        with pytest.raises(UnsupportedError, match="depends on the input"):
            model.merge_adapter()
        return
    model.merge_adapter()
    torch.testing.assert_close(toy.logits(model), trained, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(toy.logits(model), trained, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    assert type(merged.layer) is type(base.layer)
    torch.testing.assert_close(toy.logits(merged), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("toy", [PLAIN, EMBEDDING, KINDS[5]], ids=lambda toy: toy.name)
def test_gates_see_every_patch_and_every_token(toy: Toy) -> None:
    """Against a loop over the vectors that the layer's matrix multiplies."""
    model = adapted(Row("disel", dynalora.DiselConfig, static=False), toy, init_weights=False).double()
    (layer,) = adapter_layers(model).values()
    x = toy.batch(0)["x"]
    if x.is_floating_point():
        x = model.base_model.model.before(x.double()).movedim(-1, 1)
    base, (up, down) = layer.get_base_layer(), layer.sides("default")
    gate, bias = layer.parameter("gate_weight", "default"), layer.parameter("gate_bias", "default")
    expected = base(x)
    if isinstance(base, nn.Embedding):
        vectors = nn.functional.one_hot(x, TOKENS).double()
        expected = (
            expected
            + layer.scaling["default"] * ((vectors @ gate.t() + bias).sigmoid() * (vectors @ down.t())) @ up.t()
        )
    else:
        fields = nn.Conv2d(
            x.shape[1], layer.in_features * base.groups, base.kernel_size, base.stride, base.padding,
            groups=base.groups, bias=False, padding_mode=base.padding_mode, dtype=x.dtype,
        )  # fmt: skip
        eye = torch.eye(layer.in_features, dtype=x.dtype).reshape(layer.in_features, *base.weight.shape[1:])
        fields.weight.data = eye.repeat(base.groups, 1, 1, 1)
        vectors = fields(x).unflatten(1, (base.groups, -1)).movedim(2, -1)  # (batch, groups, …, in)
        m = (vectors @ gate.t() + bias).sigmoid() * (vectors @ down.t())
        wide = torch.einsum("bg...r,gor->bgo...", m, up.unflatten(0, (base.groups, -1)))
        expected = expected + layer.scaling["default"] * wide.flatten(1, 2)
        assert torch.allclose(layer.layer_kind.patches(base, x), vectors.flatten(0, -2))
        squares = layer.layer_kind.squares(base, x)
        torch.testing.assert_close(squares[:-1] / squares[-1], vectors.flatten(0, -2).square().mean(0))
    torch.testing.assert_close(layer(x), expected)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_half_precision_autocast_and_dropout() -> None:
    row = Row("dira", dynalora.DiraConfig, static=True)
    for toy in (PLAIN, EMBEDDING):
        model = row.adapt(toy, toy.build().bfloat16(), init_weights=False)
        (layer,) = adapter_layers(model).values()
        assert layer.parameter("down", "default").dtype == torch.float32
        assert toy.logits(model).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(toy.logits(adapted(row, toy, init_weights=False))).all()
    model = adapted(row, PLAIN, init_weights=False, dropout=0.5)
    evaluated = PLAIN.logits(model)
    assert not torch.equal(model.train()(**PLAIN.batch(5)), evaluated)


def test_rows_of_a_mixed_batch() -> None:
    row = Row("disel", dynalora.DiselConfig, static=False)
    for toy in (PLAIN, EMBEDDING):
        model = adapted(row, toy, init_weights=False)
        batch = toy.batch(5)
        names = ["default", "__base__", *["default"] * (len(batch["x"]) - 2)]
        with torch.no_grad():
            mixed, alone = model(**batch, adapter_names=names), model(**batch)
        torch.testing.assert_close(mixed[[0, *range(2, len(names))]], alone[[0, *range(2, len(names))]])
        torch.testing.assert_close(mixed[1], toy.build().eval()(**batch)[1])


@pytest.mark.parametrize("toy", [PLAIN, EMBEDDING, KINDS[3], KINDS[7]], ids=lambda toy: toy.name)
def test_export_is_what_pefts_lora_computes(toy: Toy, tmp_path: Path) -> None:
    """From the model, and from its folder alone; where PEFT's LoRA would compute something else, nothing is written."""
    model = adapted(Row("dira", dynalora.DiraConfig, static=True), toy, init_weights=False)
    model.save_pretrained(tmp_path / "saved")
    exports = (
        lambda path: dynalora.export_lora(model, path),
        lambda path: dynalora.export.export_adapter_folder(str(tmp_path / "saved"), str(path)),
    )
    for number, export in enumerate(exports):
        path = tmp_path / f"lora{number}"
        if toy.name in ("conv1d", "conv3d"):  # dilation, padding
            with pytest.raises(UnsupportedError, match="PEFT's LoRA computes something else"):
                export(path)
            assert not path.exists()
            continue
        report = export(path)
        assert report.max_error < 1e-6
        plain = peft.PeftModel.from_pretrained(toy.build(), path)
        torch.testing.assert_close(toy.logits(plain), toy.logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("described", [{"kind": "sheet", "shape": [2, 2]}, {"kind": "embedding", "shape": [-2, 8]}, {}])
def test_a_file_that_says_what_no_layer_is(described: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(Row("dira", dynalora.DiraConfig, static=True), EMBEDDING)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["layer_kinds"] == {"layer": {"kind": "embedding", "shape": [TOKENS, 8]}}
    settings["layer_kinds"]["layer"] = {"kind": "none", **described}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="layer_kinds"):
        dynalora.export.export_adapter_folder(str(tmp_path), str(tmp_path / "lora"))


def test_an_embedding_that_is_scaled_and_the_heads_weight_too(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(4)
        config = transformers.Gemma3TextConfig(**DECODER, head_dim=4, tie_word_embeddings=True)
        return transformers.Gemma3ForCausalLM(config)

    gemma = Toy("gemma3", build, ("embed_tokens",), lambda seed: {"input_ids": tokens(seed=seed)}, "CAUSAL_LM")
    model = Row("dira", dynalora.DiraConfig, static=True).adapt(gemma, init_weights=False)
    expected = gemma.logits(model)
    assert not torch.allclose(expected, gemma.logits(build()), atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, that the weight is tied
        dynalora.export_lora(model, tmp_path / "lora")
        plain = peft.PeftModel.from_pretrained(build(), tmp_path / "lora")
        torch.testing.assert_close(gemma.logits(plain), expected, atol=2e-5, rtol=2e-5)
        with pytest.raises(UnsupportedError, match="whose weight is also that of 'lm_head'"):
            model.merge_adapter()
        merged = model.merge_and_unload()
    torch.testing.assert_close(gemma.logits(merged), expected, atol=2e-5, rtol=2e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(gemma.logits(loaded), expected, atol=2e-5, rtol=2e-5)


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4


def test_what_computes_something_else_is_refused() -> None:
    row = Row("dira", dynalora.DiraConfig, static=True)
    parametrised = PLAIN.build()
    nn.utils.parametrizations.weight_norm(parametrised.layer)  # type: ignore[arg-type]
    scaled = EMBEDDING.build()
    scaled.layer = Scaled(TOKENS, 8)
    turned = PLAIN.build()
    turned.layer = nn.ConvTranspose2d(4, 6, 3)
    bounded = _embedding("bounded", max_norm=1.0).build()
    for model in (parametrised, scaled, turned, bounded):
        with pytest.raises(UnsupportedError, match=r"module 'layer' is a .*, which dira cannot adapt"):
            row.adapt(PLAIN, model)
        assert not adapter_layers(model)
    with pytest.raises(UnsupportedError, match="which increlora cannot adapt"):
        Row("increlora", dynalora.IncreloraConfig, static=True).adapt(PLAIN)
    with pytest.raises(UnsupportedError, match="use_dora=True knows the norms of linear layers only"):
        Row("dora", dynalora.PedyraConfig, static=True).adapt(EMBEDDING, use_dora=True)
    with pytest.raises(ConfigError, match="retain knows linear layers only"):
        row.adapt(EMBEDDING, retain=1.0)


def test_models_may_ask_for_what_a_layer_is() -> None:
    """As Whisper asks its convolutions for their stride."""
    base = nn.ModuleDict({"conv": nn.Conv2d(2, 6, (3, 1), stride=2, groups=2), "words": nn.Embedding(9, 4, 1)})
    model = peft.get_peft_model(base, dynalora.DiraConfig(r=2, target_modules=["conv", "words"]))
    conv, words = model.base_model.model["conv"], model.base_model.model["words"]
    assert (conv.stride, conv.kernel_size, conv.groups, conv.in_channels) == ((2, 2), (3, 1), 2, 2)
    assert (words.num_embeddings, words.embedding_dim, words.padding_idx) == (9, 4, 1)
