"""DISeL against its float64 reference: gates, forward, their learning rate and the weight decay they never get."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dynalora
from dynalora import DiselConfig
from dynalora.adapter.layer import AdapterLayer
from tests.reference import disel as reference
from tests.toys import TOYS, tokens

shapes = st.integers(1, 9)


def adapted_linear(in_features: int, out_features: int, *, seed: int = 0, **options: Any) -> tuple[nn.Module, Any]:
    """One float64 linear layer with a non-zero DISeL adapter and gates that are half open: (PEFT model, layer)."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(in_features, out_features)).double()
    options = {"r": 3, "alpha": 5, **options}
    model = peft.get_peft_model(base, DiselConfig(target_modules=["0"], **options))
    layer = only_layer(model)
    for parameter in own(layer).values():
        parameter.data.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return model, layer


def only_layer(model: nn.Module) -> Any:
    (layer,) = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    return layer


def own(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in layer.named_parameters() if not n.startswith("base_layer.")}


def is_gate(name: str) -> bool:
    return "disel_gate" in name


# --- forward -------------------------------------------------------------------------------------------------


@given(
    in_features=shapes,
    out_features=shapes,
    r=st.integers(1, 6),
    normalize=st.booleans(),
    rslora=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forward_equals_the_reference(
    in_features: int, out_features: int, r: int, normalize: bool, rslora: bool, seed: int
) -> None:
    model, layer = adapted_linear(
        in_features, out_features, r=r, seed=seed, gate_normalize=normalize, use_rslora=rslora
    )
    x = torch.randn(2, 4, in_features, dtype=torch.float64)
    gate = layer.disel_gate_weight["default"], layer.disel_gate_bias["default"]
    expected = reference.forward(
        x,
        layer.base_layer.weight,
        layer.base_layer.bias,
        layer.disel_down["default"],
        layer.disel_up["default"],
        *gate,
        5 / math.sqrt(r) if rslora else 5 / r,
        normalize,
    )
    torch.testing.assert_close(model(x), expected, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(layer.gates(x, "default"), reference.gates(x, *gate, normalize), atol=1e-11, rtol=1e-9)


@given(in_features=shapes, out_features=shapes, r=st.integers(1, 5), width=st.integers(1, 3), seed=st.integers(0, 99))
def test_bottleneck_is_a_factored_gate(in_features: int, out_features: int, r: int, width: int, seed: int) -> None:
    """W_g = U·V through a layer of the given width: the same as the full gate with that product."""
    model, layer = adapted_linear(in_features, out_features, r=r, seed=seed, gate_bottleneck=width)
    gate_in, gate_out = layer.disel_gate_in["default"], layer.disel_gate_out["default"]
    assert tuple(gate_in.shape) == (width, in_features)
    assert tuple(gate_out.shape) == (r, width)
    x = torch.randn(6, in_features, dtype=torch.float64)
    expected = reference.forward(
        x,
        layer.base_layer.weight,
        layer.base_layer.bias,
        layer.disel_down["default"],
        layer.disel_up["default"],
        gate_out @ gate_in,
        layer.disel_gate_bias["default"],
        5 / r,
    )
    torch.testing.assert_close(model(x), expected, atol=1e-11, rtol=1e-9)


def test_gates_are_per_token_and_deterministic() -> None:
    model, layer = adapted_linear(6, 4, dropout=0.5)
    model.train()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    together = layer.gates(x, "default")
    assert tuple(together.shape) == (3, 5, 3)
    assert torch.equal(together, layer.gates(x, "default"))
    torch.testing.assert_close(together[1, 2], layer.gates(x[1, 2], "default"))
    assert together.flatten(0, 1).std(0).min() > 0.01


# --- start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [-3.0, -7.0, 0.0])
def test_gates_start_closed(bias: float) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(50, 20))
    layer = only_layer(peft.get_peft_model(base, DiselConfig(r=8, target_modules=["0"], gate_bias_init=bias)))
    assert torch.equal(layer.disel_gate_bias["default"], torch.full((8,), bias))
    assert torch.count_nonzero(layer.disel_up["default"]) == 0
    at_zero = layer.gates(torch.zeros(1, 50), "default")
    torch.testing.assert_close(at_zero, torch.full((1, 8), 1 / (1 + math.exp(-bias))))


def test_default_gates_are_almost_closed_on_random_input() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(200, 20))
    layer = only_layer(peft.get_peft_model(base, DiselConfig(r=8, target_modules=["0"])))
    mean = float(layer.gates(torch.randn(500, 200), "default").mean())
    assert mean == pytest.approx(1 / (1 + math.exp(3)), rel=0.3)


@pytest.mark.parametrize("name", ["disel_down", "disel_gate_weight"])
def test_kaiming_start(name: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(400, 20))
    layer = only_layer(peft.get_peft_model(base, DiselConfig(r=50, target_modules=["0"])))
    weight = getattr(layer, name)["default"]
    bound = 1 / math.sqrt(400)
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_down_and_gate_start_apart() -> None:
    base = nn.Sequential(nn.Linear(40, 20))
    layer = only_layer(peft.get_peft_model(base, DiselConfig(r=4, target_modules=["0"])))
    assert not torch.allclose(layer.disel_down["default"], layer.disel_gate_weight["default"])


def test_zeros_start_gives_the_same_gate_everywhere() -> None:
    base = nn.Sequential(nn.Linear(40, 20))
    config = DiselConfig(r=4, target_modules=["0"], gate_weight_init="zeros")
    layer = only_layer(peft.get_peft_model(base, config))
    gates = layer.gates(torch.randn(9, 40), "default")
    torch.testing.assert_close(gates, torch.full((9, 4), 1 / (1 + math.exp(3.0))))


def test_zeros_start_with_a_bottleneck_can_still_learn() -> None:
    """Both factors at zero would have zero gradients for ever."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 5))
    config = DiselConfig(r=4, target_modules=["0"], gate_weight_init="zeros", gate_bottleneck=2, init_weights=True)
    model = peft.get_peft_model(base, config)
    layer = only_layer(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    x = torch.randn(16, 10)
    for _ in range(10):
        optimizer.zero_grad()
        (model(x) - x[:, :5]).square().mean().backward()
        optimizer.step()
    gates = layer.gates(x, "default")
    assert float(gates.std(0).max()) > 1e-6


@given(in_features=shapes, out_features=shapes, r=st.integers(1, 6))
def test_parameter_count(in_features: int, out_features: int, r: int) -> None:
    _, layer = adapted_linear(in_features, out_features, r=r)
    assert sum(p.numel() for p in own(layer).values()) == reference.parameter_count(r, in_features, out_features)


# --- the optimizer's view of the gates -----------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("multiplier", "bottleneck"), [(5.0, None), (1.0, None), (2.5, 2)])
def test_gates_have_their_own_learning_rate_and_no_weight_decay(
    fused: bool, multiplier: float, bottleneck: int | None
) -> None:
    model, layer = adapted_linear(6, 4, gate_lr_multiplier=multiplier, gate_bottleneck=bottleneck, match_step=False)
    lr, decay = 1e-2, 0.3
    x = torch.randn(16, 6, dtype=torch.float64)
    parameters = own(layer)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=lr, weight_decay=decay, fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    by_hand = reference.AdamW()
    expected = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in parameters.items()}
        now = lr / (1 + step)
        expected = by_hand.step(
            expected,
            gradients,
            {name: now * multiplier if is_gate(name) else now for name in expected},
            {name: 0.0 if is_gate(name) else decay for name in expected},
        )
        optimizer.step()
        scheduler.step()
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name].detach(), value, atol=1e-11, rtol=1e-9, msg=name)


def test_default_multiplier_is_five() -> None:
    """1e-3 for the gates against 2e-4 for the factors."""
    assert DiselConfig().gate_lr_multiplier == 5.0


class RecordingTrainer(transformers.Trainer):
    """Trainer with its own default optimizer; keeps the gradients of every step."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        return loss


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_gates_under_trainers_defaults(optim: str, tmp_path: Path) -> None:
    """Trainer builds the optimizer itself, with weight decay, schedule and no idea of gates."""
    toy = TOYS["llama"]
    torch.manual_seed(0)
    config = DiselConfig(r=3, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM", match_step=False)
    model = peft.get_peft_model(toy.build(), config)
    start = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 6)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        optim=optim,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.3,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = RecordingTrainer(model=model, args=arguments, train_dataset=data)
    trainer.gradients = []
    trainer.train()
    by_hand = reference.AdamW()
    expected = start
    for step, gradients in enumerate(trainer.gradients):
        now = 1e-2 * (1 - step / 4)
        expected = by_hand.step(
            expected,
            gradients,
            {name: now * 5 if is_gate(name) else now for name in expected},
            {name: 0.0 if is_gate(name) else 0.3 for name in expected},
        )
    after = dict(model.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(after[name].detach().double(), value, atol=2e-6, rtol=2e-5, msg=name)


# --- mistakes others have made -------------------------------------------------------------------------------


def saved(tmp_path: Path, **options: Any) -> tuple[Path, Tensor]:
    toy = TOYS["llama"]
    config = DiselConfig(r=3, target_modules=["q_proj", "down_proj"], init_weights=False, **options)
    model = peft.get_peft_model(toy.build(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        toy.loss(model.train()).backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    return tmp_path, toy.logits(model)


def test_loaded_for_inference_nothing_trains(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path)
    toy = TOYS["llama"]
    model = peft.PeftModel.from_pretrained(toy.build(), folder)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == []
    assert torch.equal(toy.logits(model), expected)
    trainable = peft.PeftModel.from_pretrained(toy.build(), folder, is_trainable=True)
    gates = [n for n, p in trainable.named_parameters() if is_gate(n)]
    assert len(gates) == 2 * 4
    assert all(dict(trainable.named_parameters())[n].requires_grad for n in gates)


def test_gate_options_survive_loading(tmp_path: Path) -> None:
    """gate_normalize changes the function without changing a tensor's shape: losing it would go unnoticed."""
    folder, expected = saved(tmp_path, gate_normalize=True)
    toy = TOYS["llama"]
    assert torch.equal(toy.logits(peft.PeftModel.from_pretrained(toy.build(), folder)), expected)


def test_training_on_a_bf16_base() -> None:
    toy = TOYS["llama"]
    config = DiselConfig(r=3, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(toy.build().to(torch.bfloat16), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = toy.loss(model.train())
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_gates_are_computed_in_the_adapters_precision() -> None:
    """bf16 logits near −3 would be off by a hundredth."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 8)).to(torch.bfloat16)
    model = peft.get_peft_model(base, DiselConfig(r=4, target_modules=["0"], init_weights=False))
    layer = only_layer(model)
    x = torch.randn(10, 64).to(torch.bfloat16)
    exact = reference.gates(
        x.double(), layer.disel_gate_weight["default"].double(), layer.disel_gate_bias["default"].double()
    )
    gates = layer.gates(x, "default")
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.double(), exact, atol=1e-6, rtol=1e-5)


# --- settings, and what the gates are for --------------------------------------------------------------------


def test_recorded_gates_are_the_references_mean() -> None:
    """Over the tokens that count only, layer by layer, from the inputs that the layers really get."""
    toy = TOYS["llama"]
    config = DiselConfig(r=3, target_modules=["q_proj"], init_weights=False, gate_bias_init=-1.0)
    model = peft.get_peft_model(toy.build(), config).eval()
    ids = tokens(4, 7)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    labels = ids.clone()
    labels[:, :2] = -100
    seen: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer)}
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0].detach()}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    recorded = dynalora.record_gates(model, [batch])
    assert len(recorded) == len(layers) == 2
    counted = mask.bool() & (labels != -100)
    for (name, layer), entry in zip(layers.items(), recorded, strict=True):
        assert name.endswith(entry.module)
        weight, bias = layer.disel_gate_weight["default"], layer.disel_gate_bias["default"]
        gates = reference.gates(seen[name][counted].double(), weight.double(), bias.double())
        assert entry.tokens == int(counted.sum()) == 17
        torch.testing.assert_close(entry.mean.double(), gates.mean(0), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(entry.mean_square.double(), gates.square().mean(0), atol=1e-6, rtol=1e-5)
        wanted = torch.histc(gates, bins=len(entry.histogram), min=0, max=1).long()
        assert int((entry.histogram - wanted).abs().sum()) <= 2  # a value on the edge of a bin
        assert int(entry.histogram.sum()) == 17 * 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gate_weight_init", "orthogonal"),
        ("gate_lr_multiplier", 0.0),
        ("gate_lr_multiplier", -1.0),
        ("gate_bottleneck", 0),
        ("gate_bias_init", float("nan")),
    ],
)
def test_bad_values_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(dynalora.errors.ConfigError) as caught:
        DiselConfig(**{field: value})
    assert field in str(caught.value)
    assert str(value) in str(caught.value)


def test_no_total_steps_are_needed() -> None:
    """DISeL has no schedule: a bare loop must not be asked for its length."""
    model, layer = adapted_linear(6, 4)
    optimizer = torch.optim.SGD(list(own(layer).values()), lr=0.1)
    model(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()


@pytest.fixture
def two_populations() -> tuple[Tensor, Tensor]:
    """Inputs that differ only in the sign of their mean."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(8, generator=generator)
    noise = torch.randn(2, 400, 8, generator=generator)
    return mean + 0.5 * noise[0], -mean + 0.5 * noise[1]


def test_gates_learn_where_to_act(two_populations: tuple[Tensor, Tensor]) -> None:
    """§2: a correction that is right for one population and wrong for the other needs the gate."""
    tuned, kept = two_populations
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(8, 6, bias=False))
    weight = base[0].weight.detach().clone()
    change = torch.outer(torch.randn(6), torch.randn(8))
    model = peft.get_peft_model(base, DiselConfig(r=2, alpha=2, target_modules=["0"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    inputs = torch.cat([tuned, kept])
    wanted = torch.cat([tuned @ (weight + change).T, kept @ weight.T])

    def loss() -> Tensor:
        return (model(inputs) - wanted).square().mean()

    best_fixed = (inputs @ (weight + change / 2).T - wanted).square().mean()
    for _ in range(400):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss()) < 0.2 * float(best_fixed)
    layer = only_layer(model)
    with torch.no_grad():
        openness = [float(layer.gates(x, "default").mean(0).max()) for x in (tuned, kept)]
    assert openness[0] > 0.5 > openness[1]


def test_default_alpha_is_twice_the_rank() -> None:
    assert DiselConfig(r=6).alpha == 12
    layer = only_layer(peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), DiselConfig(r=3, target_modules=["0"])))
    assert layer.scaling["default"] == 2.0


def test_dropout_leaves_the_gates_input_alone() -> None:
    """Dropout zeroes entries of what the update is made of; the gates see the whole input (methods: per token)."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 5)),
        DiselConfig(r=3, target_modules=["0"], dropout=0.5, init_weights=False, gate_bias_init=0.0),
    )
    layer = model.base_model.model[0]
    x = torch.randn(4, 6)
    gates = layer.gates(x, "default")
    for _ in range(5):
        narrow = layer.train().narrow(x, "default")
        torch.manual_seed(3)
        dropped = layer.narrow(x, "default") / gates
        torch.manual_seed(3)
        expected = torch.nn.functional.dropout(x, 0.5) @ layer.parameter("down", "default").t()
        torch.testing.assert_close(dropped, expected)
        assert not torch.allclose(narrow, layer.eval().narrow(x, "default"))


# --- steps as long as LoRA's ---------------------------------------------------------------------------------


def moved_function(config: Any, *, seed: int = 0) -> Tensor:
    """How far one step of Adam moves the outputs (tokens, out) of a fresh adapter on one layer."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 32)).double(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x, target = torch.randn(50, 64, dtype=torch.float64), torch.randn(50, 32, dtype=torch.float64)
    before = model(x).detach()
    (model(x) - target).square().mean().backward()
    optimizer.step()
    moved: Tensor = model(x).detach() - before
    return moved


@pytest.mark.parametrize(("bias", "factor"), [(-3.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (-7.0, 32 / (1 + math.exp(7)))])
def test_a_step_moves_the_function_about_as_far_as_loras(bias: float, factor: float) -> None:
    lora = moved_function(peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"])).norm()
    zeros = {"r": 8, "target_modules": ["0"], "gate_bias_init": bias, "gate_weight_init": "zeros"}
    matched = moved_function(DiselConfig(**zeros)).norm()
    assert float(matched / lora) == pytest.approx(factor, rel=0.2)
    paper = moved_function(DiselConfig(**zeros, match_step=False)).norm()
    assert float(paper / lora) == pytest.approx(1 / (1 + math.exp(-bias)), rel=0.2)


def test_the_papers_form_is_one_setting_away() -> None:
    """With `match_step=False` only the gates have a rate of their own."""
    for match, expected in ((False, 1e-3), (True, 1e-3 * (1 + math.exp(3)))):
        model = peft.get_peft_model(
            nn.Sequential(nn.Linear(6, 4)), DiselConfig(r=2, target_modules=["0"], match_step=match)
        )
        layer = only_layer(model)
        rates = {id(p): group["lr"] for group in dynalora.param_groups(model, 1e-3) for p in group["params"]}
        assert rates[id(layer.disel_up["default"])] == pytest.approx(expected)
        assert rates[id(layer.disel_down["default"])] == pytest.approx(1e-3)
        assert rates[id(layer.disel_gate_bias["default"])] == pytest.approx(5e-3)


@pytest.mark.parametrize("load", [DiselConfig.from_pretrained, peft.PeftConfig.from_pretrained])
def test_a_configuration_from_before_there_was_match_step_trains_as_it_did(tmp_path: Path, load: Any) -> None:
    assert DiselConfig().match_step is True
    for match in (True, False):
        DiselConfig(match_step=match).save_pretrained(str(tmp_path))
        assert load(str(tmp_path)).match_step is match
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    del content["match_step"]
    file.write_text(json.dumps(content))
    assert load(str(tmp_path)).match_step is False
