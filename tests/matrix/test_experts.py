"""Experts in fused parameters: one update for each, in the same form as every layer's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_base_model_state_dict
from torch import nn

import dynalora
from dynalora.adapter import experts as expert_layers
from dynalora.adapter.experts import AdaptedExperts
from dynalora.adapter.layer import AdapterLayer, adapter_layers
from dynalora.drawing.landscape import rank_grid
from dynalora.errors import ConfigError, UnsupportedError
from dynalora.forgetting.effects import narrow_moments
from dynalora.lab.configs import check_targets
from tests.families import FAMILIES
from tests.matrix.rows import Row, every_method, every_static_row
from tests.matrix.test_behaviour import train
from tests.toys import Toy

NAMES = ("qwen3-moe", "mixtral", "gpt-oss", "deepseek")
MIXTURES = tuple(FAMILIES[name] for name in NAMES)
every_mixture = pytest.mark.parametrize("toy", MIXTURES, ids=lambda toy: toy.name)
QWEN = FAMILIES["qwen3-moe"]


def experts_of(model: nn.Module, adapter: str = "default") -> dict[str, AdapterLayer]:
    return {name: layer for name, layer in adapter_layers(model, adapter).items() if ".experts." in f".{name}"}


@every_mixture
@pytest.mark.parametrize("targets", ["all-linear", None])
@every_method
def test_every_expert_has_its_update(row: Row, targets: Any, toy: Toy) -> None:
    model = row.adapt(toy, target_modules=targets or list(toy.targets))
    blocks = 1 if toy.name == "deepseek" else 2
    assert len(experts_of(model)) == blocks * 2 * 4
    base = toy.logits(toy.build())
    with model.disable_adapter():
        assert torch.equal(toy.logits(model), base)
    row.assert_start(toy.logits(model), base)


@every_mixture
@every_static_row
def test_it_computes_what_the_merged_model_does_and_its_gradients(row: Row, toy: Toy) -> None:
    """Against autograd through W0 + s·ΔW of every layer, in float64."""
    if row.alone:
        pytest.skip("DoRA takes its norms for constants")
    model = row.adapt(toy, init_weights=False).double()
    reference = copy.deepcopy(model)
    toy.loss(model).backward()

    # The same updates, put into the parameters of a model without adapters.
    layers = adapter_layers(reference)
    plain: Any = toy.build().double().eval()
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    weights: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        short = name.removeprefix("base_model.model.")
        up, down = layer.factors("default")
        delta = layer.scaling["default"] * up @ down
        owner, _, last = short.rpartition(".")
        if ".experts." in short:
            whole = plain.get_parameter(owner)
            grown = weights.get(owner, whole)
            swap = getattr(plain.get_submodule(owner.rpartition(".")[0]), "is_transposed", False)
            index = torch.tensor([int(last)])
            weights[owner] = grown.index_add(0, index, (delta.t() if swap else delta)[None])
        else:
            weights[f"{short}.weight"] = plain.get_parameter(f"{short}.weight") + delta
    rest = dict(plain.named_parameters()) | dict(plain.named_buffers())

    class Merged(nn.Module):
        training = False

        def forward(self, **batch: Any) -> Any:
            return torch.func.functional_call(plain, {**rest, **weights}, kwargs=batch)

    loss = toy.loss(Merged())
    torch.testing.assert_close(toy.loss(model), loss)
    loss.backward()
    others = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            zero = torch.zeros_like(parameter)
            mine, other = (zero if p.grad is None else p.grad for p in (parameter, others[name]))
            torch.testing.assert_close(mine, other, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        dynalora.PedyraConfig(r=2, adjust_start=2, adjust_interval=1, adjust_end=3, adjust_size=6),
        dynalora.DiraConfig(r=3, target_rank=2, total_steps=3),
    ],
    ids=lambda config: config.method,
)
def test_ranks_move_between_experts_and_are_saved(config: Any, tmp_path: Path) -> None:
    config.target_modules = {"gate_up_proj", "down_proj"}
    model = peft.get_peft_model(QWEN.build(), config)
    train(model, QWEN)
    ranks = {name: layer.rank("default") for name, layer in experts_of(model).items()}
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) == 2 * len(ranks)
    assert "model.layers.0.mlp.experts.gate_up_proj.3" in dynalora.state_report(model)[0].ranks
    assert [row.rank for row in dynalora.rank_landscape(model)] == list(ranks.values())
    trained = QWEN.logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(QWEN.build(), tmp_path)
    assert {name: layer.rank("default") for name, layer in experts_of(loaded).items()} == ranks
    assert torch.equal(QWEN.logits(loaded), trained)


@every_mixture
def test_merged_and_taken_back(toy: Toy) -> None:
    row = Row("dira", dynalora.DiraConfig, static=True)
    model = row.adapt(toy, init_weights=False)
    base, expected = toy.logits(toy.build()), toy.logits(model)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(toy.logits(model), expected, atol=2e-5, rtol=2e-5)
        model.unmerge_adapter()
    model.merge_adapter()
    with model.disable_adapter():  # takes the updates back
        torch.testing.assert_close(toy.logits(model), base, atol=2e-5, rtol=2e-5)
    assert torch.allclose(toy.logits(model), expected, atol=2e-5)
    unloaded = model.unload()
    assert not any(isinstance(module, (AdaptedExperts, AdapterLayer)) for module in unloaded.modules())
    torch.testing.assert_close(toy.logits(unloaded), base, atol=2e-5, rtol=2e-5)


def test_adapters_beside_each_other() -> None:
    row = Row("disel", dynalora.DiselConfig, static=False)
    model = row.adapt(QWEN, target_modules=["down_proj"], init_weights=False)
    alone = QWEN.logits(model)
    second = row.configure(QWEN, target_modules="all-linear", init_weights=False)
    model.add_adapter("second", second)
    assert torch.equal(QWEN.logits(model), alone)
    assert len(experts_of(model, "second")) == 16
    assert len(experts_of(model)) == 8
    model.set_adapter("second")
    assert not torch.allclose(QWEN.logits(model), alone)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(QWEN.logits(model), alone)


@every_mixture
@every_method
def test_mixed_batches_go_by_rows(row: Row, toy: Toy) -> None:
    """Experts see tokens, of all rows one after the other; one adapter adapts other layers than the active one."""
    model = row.adapt(toy, target_modules=["q_proj", "kv_a_proj_with_mqa"], init_weights=False)
    for name, targets in (("second", "all-linear"), ("third", ["down_proj"])):
        model.add_adapter(name, row.configure(toy, target_modules=targets, init_weights=False, r=3))
    model.eval()
    batch = {"input_ids": torch.cat([toy.batch(seed)["input_ids"] for seed in (1, 2, 3)])}
    names = ["second", "__base__", "third", "default", "second", "third"]
    with torch.no_grad():
        found = model(**batch, adapter_names=names).logits
        for number, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(**batch).logits
            else:
                model.set_adapter(name)
                alone = model(**batch).logits
            torch.testing.assert_close(found[number], alone[number], atol=1e-5, rtol=1e-5)
    model.set_adapter("default")
    with pytest.raises(ConfigError, match="4 names"), torch.no_grad():
        model(**batch, adapter_names=names[:4])


def test_mixed_batches_generate_with_experts() -> None:
    row = Row("disel", dynalora.DiselConfig, static=False)
    model = row.adapt(QWEN, target_modules="all-linear", init_weights=False)
    model.add_adapter("second", row.configure(QWEN, target_modules="all-linear", init_weights=False))
    model.eval()
    ids = QWEN.batch(3)["input_ids"]
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "num_beams": 2}
    options |= {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    found = model.generate(**options, adapter_names=["second", "default"])
    for index, name in enumerate(["second", "default"]):
        model.set_adapter(name)
        assert torch.equal(model.generate(**options)[index], found[index])


def test_experts_that_are_not_given_tokens_are_told_in_mixed_batches() -> None:
    row = Row("dira", dynalora.DiraConfig, static=True)
    model = row.adapt(QWEN, target_modules=["down_proj"], init_weights=False)
    experts = next(module for module in model.modules() if isinstance(module, AdaptedExperts))
    with pytest.raises(UnsupportedError, match=r"3 names, and adapted experts \(a Qwen3MoeExperts\)"):
        experts(torch.zeros(4, 16), torch.zeros(4, 2).long(), torch.zeros(4, 2), adapter_names=["default"] * 3)


def test_what_cannot_be_adapted_is_told() -> None:
    row = Row("dislora", dynalora.DisloraConfig, static=True)
    with pytest.warns(UserWarning, match="gate_proj cannot be adapted without the other half"):
        row.adapt(QWEN, target_modules=["q_proj", "gate_proj"])
    model = QWEN.build()
    with pytest.raises(ConfigError, match=r"experts\.down_proj\.0"):
        row.adapt(QWEN, model, r=13, target_modules=["down_proj"])
    assert not any(isinstance(module, AdaptedExperts) for module in model.modules())
    with pytest.warns(UserWarning, match="leaves out model.layers.0.mlp.experts.down_proj"):
        adapted = row.adapt(QWEN, r=13, target_modules="all-linear", exclude_modules=["k_proj", "v_proj"])
    assert {name.split(".")[-2] for name in experts_of(adapted)} == {"gate_up_proj"}


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (r".*experts.*", set()),
        (["experts"], set()),
        (["mlp.experts"], set()),
        (["gate_up_proj"], {"down_proj"}),
        (["experts.down_proj"], {"gate_up_proj"}),
    ],
)
def test_experts_are_left_out_as_a_whole_or_by_their_parameter(
    excluded: Any, left: set[str], recwarn: pytest.WarningsRecorder
) -> None:
    row = Row("dira", dynalora.DiraConfig, static=True)
    model = row.adapt(QWEN, target_modules="all-linear", exclude_modules=excluded)
    assert {name.split(".")[-2] for name in experts_of(model)} == left
    assert not [warning for warning in recwarn if "no modules were excluded" in str(warning.message)]


def test_peft_finds_the_base_models_weights_by_their_own_names() -> None:
    row, base = Row("dira", dynalora.DiraConfig, static=True), QWEN.build()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = get_base_model_state_dict(row.adapt(QWEN, base, target_modules="all-linear"))
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def test_a_single_expert_is_not_left_out() -> None:
    row, model = Row("dira", dynalora.DiraConfig, static=True), QWEN.build()
    with pytest.raises(ConfigError, match=r"leaves out the single expert '.*layers\.0\.mlp\.experts\.gate_up_proj\.3'"):
        row.adapt(QWEN, model, target_modules="all-linear", exclude_modules=["gate_up_proj.3"])
    assert not any(isinstance(module, AdaptedExperts) for module in model.modules())


class OwnExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->bo", x, self.weight)


class OwnMixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(8, 8), OwnExperts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.experts(self.first(x))
        return result


def test_experts_of_an_unknown_form_are_not_left_out_in_silence() -> None:
    with pytest.warns(UserWarning, match="OwnExperts holds them in the parameters weight"):
        peft.get_peft_model(OwnMixture(), dynalora.DiselConfig(r=2, target_modules="all-linear"))


@every_mixture
def test_export_is_what_pefts_lora_of_parameters_computes(toy: Toy, tmp_path: Path) -> None:
    """With experts of different ranks and scalings; from the model, and from its folder alone."""
    torch.manual_seed(0)
    config = dynalora.DiraConfig(
        r=3,
        alpha=5,
        dropout=0.1,
        target_modules="all-linear",
        rank_pattern={r"experts\.gate_up_proj\.1": 1, r"experts\.down_proj\.[02]": 2},
        alpha_pattern={r"experts\.gate_up_proj\.2": 7},
        init_weights=False,
    )
    model = peft.get_peft_model(toy.build(), config).eval()
    expected = toy.logits(model)
    model.save_pretrained(tmp_path / "saved")
    reports = [
        dynalora.export_lora(model, tmp_path / "live"),
        dynalora.export.export_adapter_folder(str(tmp_path / "saved"), str(tmp_path / "folder")),
    ]
    for report in reports:
        assert report.max_error < 1e-6
        plain = peft.PeftModel.from_pretrained(toy.build(), report.path)
        torch.testing.assert_close(toy.logits(plain), expected, atol=2e-5, rtol=2e-5)
        vllm, *others = report.serving
        assert "scales all matrices alike" in str(vllm)
        assert all("experts" in str(server) for server in others)
    even = dynalora.export_lora(model, tmp_path / "even", uniform_rank=0)
    assert not even.serving[0].problems, even.serving


def test_servers_name_parameters_by_their_number(tmp_path: Path) -> None:
    """Of one of two fused parameters alone vLLM would take the factors for the other's."""
    model = Row("dira", dynalora.DiraConfig, static=True).adapt(QWEN, target_modules=["gate_up_proj"])
    assert "both of their parameters" in str(dynalora.export_lora(model, tmp_path / "lora").serving[0])


def test_with_several_processes_all_experts_get_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data parallelism waits for them, and a batch need not reach all experts."""
    row = Row("dira", dynalora.DiraConfig, static=True)
    model = row.adapt(QWEN, init_weights=False)

    def without() -> set[str]:
        model.zero_grad()
        model(input_ids=torch.tensor([[5]])).logits.sum().backward()
        return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}

    assert without()
    monkeypatch.setattr(expert_layers, "process_count", lambda: 2)
    assert not without()


def test_jobs_know_the_names_of_experts() -> None:
    def config(*targets: str) -> Any:
        return dynalora.DiselConfig(r=2, target_modules=list(targets))

    model = QWEN.build()
    fused = [f"model.layers.{block}.mlp.experts.{name}" for block in (0, 1) for name in ("gate_up_proj", "down_proj")]
    assert set(check_targets(model, config("gate_up_proj", "down_proj"))) == set(fused)
    assert set(check_targets(model, config("gate_proj", "up_proj", "down_proj"))) == set(fused)
    everything = check_targets(model, dynalora.DiselConfig(r=2, target_modules="all-linear"))
    assert set(fused) < set(everything)
    with pytest.raises(ConfigError, match="'gate_down_proj' matches nothing"):
        check_targets(model, config("gate_down_proj"))


def test_the_landscape_shows_every_expert() -> None:
    """Each is of a kind of its own, and its effect is that on the tokens that were sent to it."""
    config = dynalora.DiraConfig(r=2, target_modules=list(QWEN.targets), init_weights=False, penalty_weight=0.0)
    model = peft.get_peft_model(QWEN.build(), config).eval()
    ids = QWEN.batch(5)["input_ids"]
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, layer in experts_of(model).items():
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs.setdefault(name, []).append(given[0]))
    moments = narrow_moments(model, [{"input_ids": ids}])
    rows = {row.module: row for row in dynalora.rank_landscape(model, effects=moments)}
    kinds, layers, _ = rank_grid(list(rows.values()))
    assert {f"gate_up_proj.{expert}" for expert in range(4)} | {f"down_proj.{expert}" for expert in range(4)} <= set(
        kinds
    )
    assert len(layers) == 2
    assert inputs
    for name, given in inputs.items():
        layer = experts_of(model)[name]
        x = torch.cat(given).double()
        root = torch.linalg.cholesky(x.T @ x / len(x) + 1e-14 * torch.eye(x.shape[1], dtype=torch.float64))
        expected = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double() @ root)[:2]
        short = name.removeprefix("base_model.model.")
        torch.testing.assert_close(
            torch.tensor(rows[short].effect, dtype=torch.float64), expected, atol=1e-5, rtol=1e-4
        )
    only = dynalora.DiraConfig(r=2, target_modules=["down_proj"], init_weights=False, penalty_weight=0.0)
    masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    masked["attention_mask"][0, 0] = 0
    with pytest.raises(ConfigError, match="experts give texts without padding"):
        narrow_moments(peft.get_peft_model(QWEN.build(), only), [masked])
