"""`retain`: the penalty against dense matrices and brute force in float64, its text, and training with it."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dynalora
from dynalora.adapter.curvature import Curvature
from dynalora.adapter.layer import AdapterLayer, adapter_layers
from dynalora.adapter.retain import BANK_ROWS, RetentionPenalty
from dynalora.errors import ConfigError, ScheduleError, TrainingError, UnsupportedError
from dynalora.forgetting.budget import TextMeter
from dynalora.forgetting.retain import read_curvature, retain_cost
from dynalora.forgetting.retention import retention
from dynalora.forgetting.texts import CHATS, OPENINGS, MeasuredText, anchor_text, own_text
from dynalora.spectral.second_moment import MomentSketch, SecondMoment, StackedMoments
from tests.toys import TOYS

from . import tiny

CONFIGS = {
    "dira": dynalora.DiraConfig(r=3, alpha=5, penalty_weight=0.0),
    "dira-gates": dynalora.DiraConfig(r=3, alpha=5, penalty_weight=0.0, gates=True, dropout=0.5),
    "disel": dynalora.DiselConfig(r=3, gate_bias_init=0.3),
    "dislora": dynalora.DisloraConfig(r=3, tsd_count=2, warmup_steps=1, total_steps=9),
    "pedyra": dynalora.PedyraConfig(r=3, alpha=7, total_steps=90),
    "pedyra-gates": dynalora.PedyraConfig(r=3, gates=True, total_steps=90),
    "pedyra-pissa": dynalora.PedyraConfig(r=3, init_weights="pissa", total_steps=90),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


# --- second moments -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 40), rank=st.integers(1, 50), count=st.integers(1, 60), seed=st.integers(0, 9))
def test_a_sketch_has_the_trace_and_never_exceeds_the_moment(width: int, rank: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator) * torch.rand(width, generator=generator)
    sketch = MomentSketch(width, rank)
    for block in rows.split(7):
        sketch.add(block)
    moment, exact = sketch.result(), rows.double().mT @ rows.double() / count
    assert moment.basis.shape == (min(rank, width), width)
    torch.testing.assert_close(moment.dense().diagonal().double(), exact.diagonal(), atol=1e-5, rtol=1e-4)
    low = moment.basis.double().mT @ moment.basis.double()
    assert torch.linalg.eigvalsh(exact - low).min() > -1e-5 * (1 + exact.trace())
    if rank >= min(width, count):
        torch.testing.assert_close(moment.dense().double(), exact, atol=1e-5, rtol=1e-4)
    form = torch.randn(2, 3, width, generator=generator)
    torch.testing.assert_close(moment.form(form), form @ moment.dense() @ form.mT, atol=1e-4, rtol=1e-4)


def test_a_sketch_finds_the_largest_directions_of_a_wide_moment() -> None:
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0].float()
    rows = torch.randn(2000, 300, generator=generator) * (0.8 ** torch.arange(300)) @ basis
    sketch = MomentSketch(300, 20)
    sketch.add(rows)
    exact = rows.mT @ rows / len(rows)
    error = torch.linalg.matrix_norm(sketch.result().dense() - exact) / torch.linalg.matrix_norm(exact)
    assert error < 1e-3


# --- the penalty --------------------------------------------------------------------------------------------


def random_model(name: str, toy: str = "mlp") -> Any:
    base = TOYS[toy].build().double()
    config = CONFIGS[name]
    config = type(config)(**{**config.to_dict(), "peft_type": None, "target_modules": list(TOYS[toy].targets)})
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.train()


def curvature_of(layer: AdapterLayer, rows: int = 11) -> Curvature:
    generator = torch.Generator().manual_seed(layer.in_features)

    def moment(width: int) -> SecondMoment:
        return SecondMoment(
            torch.randn(4, width, generator=generator, dtype=torch.float64),
            torch.rand(width, generator=generator, dtype=torch.float64),
        )

    bank = torch.randn(rows, layer.in_features, generator=generator, dtype=torch.float64)
    return Curvature(moment(layer.in_features), moment(layer.out_features), bank)


@torch.no_grad()
def by_definition(model: Any) -> float:
    """Σ ½ tr(G ΔW C ΔWᵀ), and for gates the mean of ½ u(x)ᵀ G u(x) with the update u(x) of each stored input alone."""
    training = model.training
    model.eval()  # dropout is training's, not the function's
    total = 0.0
    for layer in adapter_layers(model, "default").values():
        curvature = layer.curvatures["default"]
        outputs = curvature.outputs.dense()
        if layer.depends_on_input("default"):
            assert curvature.bank is not None
            for x in curvature.bank:
                nothing = torch.zeros(1, layer.out_features, dtype=torch.float64)
                update = layer.add_update(nothing, x[None], "default")[0]
                total += float(0.5 * update @ outputs @ update) / len(curvature.bank)
        else:
            up, down = layer.factors("default")
            delta = layer.scaling["default"] * up @ down
            total += float(0.5 * torch.trace(outputs @ delta @ curvature.inputs.dense() @ delta.mT))
    model.train(training)
    return total


def prepared(name: str, toy: str = "mlp") -> tuple[Any, dict[str, AdapterLayer]]:
    model = random_model(name, toy)
    layers = adapter_layers(model, "default")
    for layer in layers.values():
        layer.curvatures["default"] = curvature_of(layer)
    return model, layers


def penalty_of(layers: dict[str, AdapterLayer]) -> torch.Tensor:
    ordered = list(layers.values())
    return RetentionPenalty(ordered, "default")(ordered)


@every_config
@pytest.mark.parametrize("toy", ["mlp", "gpt2"])
def test_the_penalty_is_its_definition(name: str, toy: str) -> None:
    model, layers = prepared(name, toy)
    assert penalty_of(layers).item() == pytest.approx(by_definition(model), rel=1e-9)


@every_config
def test_its_gradient_is_that_of_the_definition(name: str) -> None:
    model, layers = prepared(name)
    parameters = [p for layer in layers.values() for p in layer.adapter_parameters("default").values()]
    gradients = torch.autograd.grad(penalty_of(layers), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(4)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(by_definition(model))
                parameter.sub_(direction, alpha=step)
        slope = 0.0 if gradient is None else float((gradient * direction).sum())
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_steps_take_turns_over_the_stored_inputs() -> None:
    model, layers = prepared("disel")
    for layer in layers.values():
        layer.curvatures["default"] = curvature_of(layer, rows=3 * BANK_ROWS)
    ordered = list(layers.values())
    penalty = RetentionPenalty(ordered, "default")
    values = [float(penalty(ordered, step)) for step in range(6)]
    assert values[:3] == values[3:]
    assert sum(values[:3]) / 3 == pytest.approx(by_definition(model), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 9))
def test_forms_of_stacked_moments_are_those_of_each_alone(data: st.DataObject, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=6))
    moments = [
        SecondMoment(torch.randn(k, n, generator=generator).double(), torch.rand(n, generator=generator).double())
        for n, k in sizes
    ]
    dense = [moment.dense() for moment in moments]
    ranks = [data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)) for _ in sizes]
    rows = [
        [torch.randn(r, n, generator=generator).double() for r in several]
        for (n, _), several in zip(sizes, ranks, strict=True)
    ]
    stacked = StackedMoments(moments, [(torch.device("cpu"), torch.float64)] * len(moments))
    for forms, matrices, moment in zip(stacked.forms(rows), rows, dense, strict=True):
        for form, matrix in zip(forms, matrices, strict=True):
            torch.testing.assert_close(form, matrix @ moment @ matrix.mT, atol=1e-12, rtol=1e-12)
    for moment, before in zip(moments, dense, strict=True):
        assert torch.equal(moment.dense(), before)


def storages(values: Any) -> int:
    """Bytes of the memory under tensors, each place once."""
    places = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in values}
    return sum(places.values())


def test_steps_hold_the_curvature_once_and_as_much_as_the_cost_says(words: Any) -> None:
    model = language_model(words, dynalora.DiraConfig(r=2, target_modules="all-linear", retain=1.0))
    cost = retain_cost(model, rank=5).bytes
    read_curvature(model, anchor_text(model, words, texts=4, tokens=8, cache=False), rank=5)
    layers = list(adapter_layers(model, "default").values())
    penalty = RetentionPenalty(layers, "default")
    first = penalty(layers)
    assert penalty.serves(layers)
    assert torch.equal(penalty(layers), first)
    held = [layer.curvatures["default"] for layer in layers]
    moments = [moment for curvature in held for moment in (curvature.inputs, curvature.outputs)]
    stacks = [stack for part in (penalty._inputs, penalty._outputs) for _, stack in part._stacks]
    assert storages(t for m in [*moments, *stacks] for t in (m.basis, m.diagonal)) == cost
    model.double()
    assert not penalty.serves(layers)
    assert RetentionPenalty(layers, "default")(layers).dtype == torch.float64


# --- around a step ------------------------------------------------------------------------------------------


def gradients_of(
    name: str, retain: float | None, optimizers: int = 1
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients as the optimizers see them, and those of the penalty at the weights before the step."""
    torch.manual_seed(0)
    values = {**CONFIGS[name].to_dict(), "peft_type": None, "target_modules": ["first", "second"]}
    config = type(CONFIGS[name])(**{**values, "retain": retain, "dropout": 0.0})
    model = peft.get_peft_model(TOYS["mlp"].build().double(), config)
    layers = adapter_layers(model, "default")
    for layer in layers.values():
        layer.curvatures["default"] = curvature_of(layer)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for index, parameter in enumerate(parameters.values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    penalty = torch.autograd.grad(penalty_of(layers), list(parameters.values()))
    TOYS["mlp"].loss(model).backward()
    for index in range(optimizers):
        torch.optim.SGD(list(parameters.values())[index::optimizers], lr=1e-3).step()
    seen = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    return seen, dict(zip(parameters, penalty, strict=True))


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("name", ["dira", "disel", "pedyra-gates"])
def test_the_weighted_gradient_is_added_at_the_step(name: str, optimizers: int) -> None:
    without, penalty = gradients_of(name, None, optimizers)
    added, _ = gradients_of(name, 7.0, optimizers)
    assert added.keys() == without.keys() == penalty.keys()
    for parameter, gradient in penalty.items():
        assert gradient.abs().max() > 0, parameter
        change = added[parameter] - without[parameter]
        torch.testing.assert_close(change, 7.0 * gradient, atol=1e-9, rtol=1e-7)


def test_a_step_without_text_says_what_is_missing() -> None:
    model = peft.get_peft_model(
        TOYS["mlp"].build(), dynalora.DiraConfig(target_modules=["first"], penalty_weight=0.0, retain=10.0)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TOYS["mlp"].loss(model).backward()
    with pytest.raises(TrainingError, match=r"retain=10.*prepare_retain\(model, tokenizer\)"):
        optimizer.step()


def test_training_past_the_driver_is_reported_for_a_method_that_needs_none_itself(tmp_path: Any) -> None:
    config = dynalora.DiraConfig(target_modules=["first"], penalty_weight=0.0, retain=10.0)
    model = peft.get_peft_model(TOYS["mlp"].build(), config)
    TOYS["mlp"].loss(model.train()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    with pytest.raises(ScheduleError, match="plain low-rank adapter"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "much"])
def test_weights_that_cannot_be_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="retain must be a positive number"):
        dynalora.DiraConfig(retain=value)


# --- the text and what layers learn of it -------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def language_model(words: Any, config: Any = None) -> Any:
    config = config or dynalora.DiraConfig(r=4, target_modules="all-linear", penalty_weight=0.0)
    return peft.get_peft_model(tiny.model(len(words)), config)


def test_half_of_the_anchors_are_chats_with_both_sides_by_the_model(words: Any) -> None:
    model = language_model(words)
    text = anchor_text(model, words, texts=6, tokens=8, cache=False)
    decoded = [words.decode(row) for row in text.rows]
    opening = "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\n"
    for row, start in zip(decoded[3:], text.starts[3:], strict=True):
        assert row.startswith(opening)
        assert "<|im_start|>assistant\n" in row[len(opening) :]
        assert start == len(words(opening, add_special_tokens=False)["input_ids"])
    assert text.starts[:3] == (1, 1, 1)
    assert not any(row[0] in words.all_special_ids for row in text.rows[:3])
    measured = own_text(model, words, texts=32, tokens=4, cache=False)
    prompts = {row[:start] for row, start in zip(measured.rows, measured.starts, strict=True)}
    assert not any(row[: len(prompt)] == prompt for row in text.rows for prompt in prompts)
    assert not any(line in row for row in decoded for line in (*OPENINGS, *CHATS))


def test_without_a_chat_template_all_anchors_continue_a_token() -> None:
    plain = tiny.tokenizer(chat=False)
    text = anchor_text(language_model(plain), plain, texts=5, tokens=4, cache=False)
    assert text.starts == (1,) * 5


def test_anchors_are_kept_and_do_not_touch_the_random_state(words: Any, tmp_path: Any) -> None:
    model = language_model(words)
    torch.manual_seed(5)
    first = anchor_text(model, words, texts=4, tokens=5, cache=tmp_path)
    state = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), state)
    assert len(list(tmp_path.iterdir())) == 1
    assert anchor_text(model, words, texts=4, tokens=5, cache=tmp_path) == first
    assert anchor_text(model, words, texts=4, tokens=5, seed=1, cache=tmp_path).rows != first.rows


def watch(seen: dict[str, Any], name: str) -> Any:
    def hook(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen[name] = args[0], output.requires_grad_()

    return hook


@pytest.mark.parametrize("gates", [False, True])
def test_layers_learn_the_moments_of_the_base_models_text(words: Any, gates: bool) -> None:
    model = language_model(
        words, dynalora.DiraConfig(r=2, target_modules="all-linear", init_weights=False, gates=gates)
    )
    text = anchor_text(model, words, texts=7, tokens=9, cache=False)
    read_curvature(model, text, batch_size=3)
    layers = adapter_layers(model, "default")
    assert all(parameter.grad is None for parameter in model.parameters())
    sums = {name: [0.0, 0.0] for name in layers}
    base = model.get_base_model()
    for row, start in zip(text.rows, text.starts, strict=True):  # one text at a time, without padding
        seen: dict[str, Any] = {}
        handles = [layer.base_layer.register_forward_hook(watch(seen, name)) for name, layer in layers.items()]
        with model.disable_adapter():
            logits = base(input_ids=torch.tensor([row])).logits[0]
        loss = nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(row[start:]), reduction="sum")
        gradients = torch.autograd.grad(loss, [seen[name][1] for name in layers])
        for handle in handles:
            handle.remove()
        for (name, _), gradient in zip(layers.items(), gradients, strict=True):
            for place, rows in enumerate((seen[name][0][0], gradient[0])):
                part = rows[start - 1 : -1].detach()
                sums[name][place] += part.mT @ part / text.tokens
    for name, layer in layers.items():
        curvature = layer.curvatures["default"]
        for moment, exact in zip((curvature.inputs, curvature.outputs), sums[name], strict=True):
            scale = float(exact.abs().max())
            torch.testing.assert_close(moment.dense(), exact, atol=2e-4 * scale, rtol=1e-3)
        assert (curvature.bank is not None) == gates
    attention = [
        layer for name, layer in layers.items() if "layers.0" in name and ("q_proj" in name or "k_proj" in name)
    ]
    assert attention[0].curvatures["default"].inputs is attention[1].curvatures["default"].inputs


def test_other_models_than_language_models_are_refused(words: Any) -> None:
    model = peft.get_peft_model(
        TOYS["bert"].build(), dynalora.DiraConfig(target_modules=["query"], penalty_weight=0.0, retain=1.0)
    )
    text = MeasuredText(((4, 5, 6),), (1,))
    with pytest.raises(UnsupportedError, match="`retain` needs a causal language model"):
        read_curvature(model, text)


# --- training -----------------------------------------------------------------------------------------------


def trained(words: Any, retain: float | None, tmp_path: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = dynalora.DiraConfig(r=4, target_modules="all-linear", penalty_weight=0.0, retain=retain)
    model = language_model(words, config)
    rows = [{"input_ids": (ids := words(row["response"])["input_ids"]), "labels": ids} for row in tiny.rows(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=2e-2, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=4,
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(words)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator, **options)
    trainer.train()
    return model.eval(), trainer


def test_a_trainer_with_the_tokenizer_needs_no_call_and_keeps_more(
    words: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))
    lost = {}
    for retain in (None, 30.0):
        model, _ = trained(words, retain, tmp_path, processing_class=words)
        lost[retain] = retention(model, own_text(model, words, texts=16, tokens=12, cache=False)).kl
    assert lost[30.0] < 0.5 * lost[None]


def test_a_trainer_without_the_tokenizer_says_so_at_the_first_step(words: Any, tmp_path: Any) -> None:
    with pytest.raises(TrainingError, match="processing_class"):
        trained(words, 30.0, tmp_path)


def test_the_setting_is_saved_and_another_machine_loads_the_adapter(words: Any, tmp_path: Any) -> None:
    model = language_model(words, dynalora.DiselConfig(target_modules="all-linear", retain=5.0))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.model(len(words)), tmp_path)
    assert loaded.peft_config["default"].retain == 5.0


class RulesOut(torch.nn.Module):
    """A head that never says some words."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head, self.weight = head, head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head(x).clone()
        logits[..., -2:] = -float("inf")
        return logits


def ruling_out(retain_mode: str) -> Any:
    model = tiny.model(64, layers=1)
    model.lm_head = RulesOut(model.lm_head)
    torch.manual_seed(0)
    config = dynalora.DiselConfig(
        r=2, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM", retain=1.0, retain_mode=retain_mode
    )
    return peft.get_peft_model(model, config)


WRITTEN = MeasuredText(tuple(map(tuple, torch.randint(3, 60, (4, 8)).tolist())), (3,) * 4)


def test_words_that_the_base_model_rules_out_are_replayed_like_the_others() -> None:
    model = ruling_out("replay")
    parameters = [p for p in model.parameters() if p.requires_grad]
    value, gradients = TextMeter(model, WRITTEN).replay(0, parameters)
    assert float(value) == pytest.approx(retention(model, WRITTEN).kl, rel=1e-4)
    assert float(value) > 0
    assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)


def test_a_text_that_gives_no_numbers_is_refused() -> None:
    model = ruling_out("quadratic")
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[WRITTEN.rows[0][4]] = float("inf")
    with pytest.raises(TrainingError, match=r"gives NaN or infinite inputs of 'model\.layers\.0\.self_attn\.q_proj'"):
        read_curvature(model, WRITTEN)
