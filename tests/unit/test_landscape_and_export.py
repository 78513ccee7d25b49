"""Landscapes of other adapters, export without the base model, and what the state report says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import peft
import pytest
import torch

import dynalora
from dynalora import DiraConfig, DiselConfig, PedyraConfig
from dynalora.errors import CheckpointError, ConfigError, DynaloraError, UnsupportedError
from dynalora.export import export_adapter_folder, held_gates, load_without_base
from dynalora.forgetting.effects import narrow_moments
from dynalora.forgetting.landscape import QUANTITIES, TAUS, LandscapeRow, energy_table, landscape_records, landscape_row
from dynalora.forgetting.recovery import zero_updates
from dynalora.lab.configs import adapter_config
from tests.toys import TOYS

LLAMA = TOYS["llama"]


def test_landscape_of_a_plain_lora() -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(LLAMA.build(), config)
    rows = dynalora.rank_landscape(model)
    delta = model.get_submodule("base_model.model." + rows[1].module).get_delta_weight("default")
    expected = torch.linalg.svdvals(delta.double())[:3]
    torch.testing.assert_close(torch.tensor(rows[1].singular_values, dtype=torch.float64), expected)
    assert [row.layer for row in rows] == [0, 1]


def test_landscape_of_disel_is_of_its_ungated_factors() -> None:
    model = peft.get_peft_model(LLAMA.build(), DiselConfig(r=2, alpha=5, target_modules=["q_proj"], init_weights=False))
    (row, *_) = dynalora.rank_landscape(model)
    layer = model.get_submodule("base_model.model." + row.module)
    delta = 2.5 * layer.parameter("up", "default") @ layer.parameter("down", "default")
    assert row.nuclear_norm == pytest.approx(float(torch.linalg.svdvals(delta.double()).sum()), rel=1e-6)


def test_landscape_of_a_start_is_empty_of_rank() -> None:
    model = peft.get_peft_model(LLAMA.build(), DiraConfig(target_modules=["q_proj"]))
    assert [(r.effective_rank, r.nuclear_norm, r.energy) for r in dynalora.rank_landscape(model)] == [(0, 0, 0)] * 2


def test_the_landscape_of_several_active_adapters_is_that_of_their_sum() -> None:
    toy = TOYS["mlp"]
    model = peft.get_peft_model(toy.build(), DiraConfig(r=2, target_modules=["first"], init_weights=False))
    model.add_adapter("other", DiraConfig(r=3, alpha=5, target_modules=["first", "second"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    first, second = dynalora.rank_landscape(model)
    layer = model.base_model.model.first
    both = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    expected = torch.linalg.svdvals(both.detach().double())[:5]
    torch.testing.assert_close(torch.tensor(first.singular_values, dtype=torch.float64), expected, atol=1e-6, rtol=1e-5)
    assert (first.rank, second.rank) == (5, 3)
    assert [row.rank for row in dynalora.rank_landscape(model, adapter_name="default")] == [2]
    with pytest.raises(ConfigError, match=r"default \+ other are active"):
        dynalora.rank_landscape(model, effects={"first": torch.eye(5)})


def test_landscape_without_an_adapter_says_so() -> None:
    with pytest.raises(DynaloraError, match="no active adapter"):
        dynalora.rank_landscape(LLAMA.build())
    with pytest.raises(ConfigError, match=r"tau must be at least 0, got -1"):
        dynalora.rank_landscape(LLAMA.build(), tau=-1)


METHODS = ("dira", "disel", "dislora", "pedyra", "lora")


@pytest.mark.parametrize("method", METHODS)
def test_every_statistic_is_that_of_a_full_decomposition(method: str) -> None:
    torch.manual_seed(3)
    model = peft.get_peft_model(LLAMA.build(), adapter_config(method, r=3, options={}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    values = sorted(value for row in dynalora.rank_landscape(model) for value in row.singular_values)
    values = [value for value in values if value > 1e-3]
    tau = sum(values[len(values) // 2 - 1 :][:2]) / 2  # between two values, so that rounding decides nothing
    rows = dynalora.rank_landscape(model, tau=tau)
    assert len(rows) == 14
    for row in rows:
        layer = model.get_submodule("base_model.model." + row.module)
        if method == "disel":
            up, down = layer.parameter("up", "default"), layer.parameter("down", "default")
            delta = layer.scaling["default"] * up.double() @ down.double()
        else:
            delta = layer.get_delta_weight("default").double()
        sigma = torch.linalg.svdvals(delta.detach())
        assert row.effective_rank == int((sigma > tau).sum())
        assert row.nuclear_norm == pytest.approx(float(sigma.sum()), rel=1e-5)
        above = float(sigma[sigma > tau].square().sum())
        assert row.energy == pytest.approx(above / float(sigma.square().sum()), rel=1e-5)
    assert any(0 < row.effective_rank < len(row.singular_values) for row in rows), "tau must cut through"
    everything = torch.tensor([value for row in rows for value in row.singular_values]).double()
    (energy,) = energy_table(rows, [tau])
    share = float(everything[everything > tau].square().sum() / everything.square().sum())
    assert energy.energy == pytest.approx(share)
    assert energy.effective_rank == pytest.approx(sum(row.effective_rank for row in rows) / 14)
    assert (energy.tau, energy.matrices) == (tau, 14)


def batches_of_tokens() -> list[dict[str, torch.Tensor]]:
    """Two batches of two texts each, of which one has padding, and one a prompt that does not count."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 40, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.clone()
    labels[2, :3] = -100
    return [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "labels": labels[2:]}]


@pytest.mark.parametrize("method", [*METHODS, "adalora"])
def test_the_effect_is_what_the_update_adds_to_the_outputs(method: str) -> None:
    """Singular values of the added outputs, token by token, against those that the landscape has from moments."""
    torch.manual_seed(3)
    model = peft.get_peft_model(LLAMA.build(), adapter_config(method, r=3, options={})).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    batches = batches_of_tokens()
    added: dict[str, list[torch.Tensor]] = {}
    rows = dynalora.rank_landscape(model, effects=narrow_moments(model, iter(batches)))
    hooks = []
    for row in rows:
        layer = model.get_submodule("base_model.model." + row.module)

        def see(layer: Any, inputs: Any, output: Any, name: str = row.module) -> None:
            added.setdefault(name, []).append((output - layer.base_layer(inputs[0])).detach()[counted])

        hooks.append(layer.register_forward_hook(see))
    for batch in batches:
        counted = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        counted &= batch.get("labels", batch["input_ids"]) != -100
        model(**{name: value for name, value in batch.items() if name != "labels"})
    for row in rows:
        outputs = torch.cat(added[row.module]).double()
        assert len(outputs) == 28 - 2 - 3
        expected = torch.linalg.svdvals(outputs)[: len(row.effect)] / len(outputs) ** 0.5
        torch.testing.assert_close(
            torch.tensor(row.effect).double(), expected, rtol=1e-3, atol=1e-4 * float(expected[0])
        )
        energy = expected.square().cumsum(0) / expected.square().sum()
        assert row.effect_rank == int((energy < 0.99).sum()) + 1


def test_inputs_decide_which_directions_count() -> None:
    """Two equal directions, of which no input has the second; the scale of the update changes nothing."""
    for scale in (1.0, 1e-6):
        base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        model = peft.get_peft_model(base, DiraConfig(r=2, target_modules=["0"]))
        layer = model.base_model.model[0]
        layer.parameter("down", "default").data = torch.eye(4)[:2]
        layer.parameter("up", "default").data = scale * torch.eye(4)[:, :2]
        x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-3, 1.0, 1.0])
        (row,) = dynalora.rank_landscape(model, effects=narrow_moments(model, [{"input": x}]))
        assert (row.energy_rank, row.effect_rank) == (2, 1)
    (row,) = dynalora.rank_landscape(model)
    assert (row.effect, row.effect_rank) == (None, None)
    with pytest.raises(ConfigError, match=r"shape \(3, 3\) for '0', which has 2 components"):
        dynalora.rank_landscape(model, effects={"0": torch.eye(3)})
    with pytest.raises(ConfigError, match="effect_rank was not measured"):
        dynalora.plot_rank_landscape([row], quantity="effect_rank")


def test_an_effect_needs_an_adapter_and_text() -> None:
    with pytest.raises(DynaloraError, match="no adapter with low-rank factors"):
        narrow_moments(LLAMA.build(), batches_of_tokens())
    model = peft.get_peft_model(LLAMA.build(), DiraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="no tokens to measure"):
        narrow_moments(model, [])
    with pytest.raises(ConfigError, match="got one string"):
        narrow_moments(model, "text")


def gated_pedyra(e: float) -> peft.PeftModel:
    config = PedyraConfig(gates=True, r=3, alpha=6, target_modules=["q_proj"], init_weights=False, total_steps=20)
    model = peft.get_peft_model(LLAMA.build(), config)
    for name, parameter in model.named_parameters():
        if name.endswith("pedyra_e.default"):
            parameter.data = e * torch.rand_like(parameter)
    return model


def test_open_gates_leave_the_trained_diagonal_in_the_landscape() -> None:
    assert [(row.effective_rank, row.nuclear_norm) for row in dynalora.rank_landscape(gated_pedyra(0))] == [
        (0, 0.0)
    ] * 2
    model = gated_pedyra(2.0)
    for row in dynalora.rank_landscape(model):
        layer = model.get_submodule("base_model.model." + row.module)
        up, down, e = (layer.parameter(role, "default").double() for role in ("up", "down", "e"))
        sigma = torch.linalg.svdvals((2 * up @ e.diag() @ down).detach())[:3]
        torch.testing.assert_close(torch.tensor(row.singular_values, dtype=torch.float64), sigma)


def test_held_gates_count_alike_wherever_they_are_held() -> None:
    model = gated_pedyra(2.0)
    gates = dynalora.record_gates(model, [{"input_ids": torch.arange(3, 20)[None]}])
    rows = dynalora.rank_landscape(model, gates=gates)
    with held_gates(model, gates):
        assert dynalora.rank_landscape(model) == rows
        for row in rows:
            delta = model.get_submodule("base_model.model." + row.module).get_delta_weight("default")
            sigma = torch.linalg.svdvals(delta.double().detach())[:3]
            torch.testing.assert_close(torch.tensor(row.singular_values, dtype=torch.float64), sigma)
    assert dynalora.rank_landscape(model) != rows
    model = peft.get_peft_model(LLAMA.build(), DiraConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="gates were given, but adapter 'default' has none"):
        dynalora.rank_landscape(model, gates=gates)


def test_mean_gates_count_each_component_as_far_as_it_opens() -> None:
    torch.manual_seed(0)
    config = DiselConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"], init_weights=False)
    model = peft.get_peft_model(LLAMA.build(), config)
    gates = dynalora.record_gates(model, [{"input_ids": torch.arange(3, 20)[None]}])
    rows = dynalora.rank_landscape(model, gates=gates)
    for row, found in zip(rows, gates, strict=True):
        layer = model.get_submodule("base_model.model." + row.module)
        up, down = layer.parameter("up", "default").double(), layer.parameter("down", "default").double()
        sigma = torch.linalg.svdvals((2 * up @ torch.diag(found.mean) @ down).detach())[:3]
        torch.testing.assert_close(torch.tensor(row.singular_values, dtype=torch.float64), sigma)
    with pytest.raises(ConfigError, match=r"gates has none for '.*down_proj', which has rank 3"):
        dynalora.rank_landscape(model, gates=gates[:1])


def test_energies_need_matrices_and_thresholds() -> None:
    model = peft.get_peft_model(LLAMA.build(), DiraConfig(target_modules=["q_proj"]))
    rows = dynalora.rank_landscape(model)
    assert [row.energy for row in energy_table(rows)] == [0.0] * len(TAUS)
    with pytest.raises(ConfigError, match="no matrices"):
        energy_table([])
    with pytest.raises(ConfigError, match="tau must be at least 0, got -1"):
        energy_table(rows, [-1])


@hypothesis.given(
    values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9), zeros=st.integers(0, 3), scale=st.floats(1e-2, 1e2)
)
def test_ranks_that_no_threshold_decides(values: list[float], zeros: int, scale: float) -> None:
    def row(factor: float) -> LandscapeRow:
        sigma = torch.tensor([*values, *[0.0] * zeros], dtype=torch.float64).sort(descending=True).values
        return landscape_row("layers.0.q", len(sigma), factor * sigma, 1e-3)

    ranks, scaled = row(1.0), row(scale)
    shares = np.array(values) / np.sum(values)
    assert ranks.entropy_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    assert ranks.stable_rank == pytest.approx(np.square(values).sum() / max(values) ** 2, rel=1e-9)
    energies = sorted(np.square(values), reverse=True)
    held = [sum(energies[:count]) / sum(energies) for count in range(len(energies) + 1)]
    # Sums of floating-point numbers may fall on either side of the bound.
    assert held[ranks.energy_rank] >= 0.99 - 1e-9
    assert held[max(0, ranks.energy_rank - 1)] < 0.99 + 1e-9
    for rank in (ranks.entropy_rank, ranks.stable_rank, ranks.energy_rank):
        assert 1 - 1e-9 <= rank <= len(values) + 1e-9
    assert scaled.entropy_rank == pytest.approx(ranks.entropy_rank, rel=1e-6)
    assert scaled.stable_rank == pytest.approx(ranks.stable_rank, rel=1e-6)


def test_equal_directions_count_fully_and_an_update_of_nothing_has_no_rank() -> None:
    three = landscape_row("q", 4, torch.tensor([2.0, 2.0, 2.0, 0.0], dtype=torch.float64), 1e-3)
    assert (three.entropy_rank, three.stable_rank, three.energy_rank) == (pytest.approx(3), pytest.approx(3), 3)
    nothing = landscape_row("q", 4, torch.zeros(4, dtype=torch.float64), 1e-3)
    assert (nothing.entropy_rank, nothing.stable_rank, nothing.energy_rank) == (0.0, 0.0, 0)
    (record,) = landscape_records({"run": [three]})
    assert (record["entropy_rank"], record["stable_rank"], record["energy_rank"]) == (
        three.entropy_rank, three.stable_rank, 3,
    )  # fmt: skip


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_quantity_is_drawn_with_runs_told_apart(quantity: str, tmp_path: Path) -> None:
    runs = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = DiraConfig(target_modules=["q_proj", "v_proj"], init_weights=False, r=seed + 2)
        model = peft.get_peft_model(LLAMA.build(), config)
        effects = narrow_moments(model, batches_of_tokens())
        runs[f"run {seed}"] = dynalora.rank_landscape(model, tau=0.2, effects=effects)
    figure = dynalora.plot_rank_landscape(runs, tmp_path / "drawn.png", quantity=quantity)
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "drawn.svg").read_text()
    words = quantity.replace("_", " ").split()[0]
    assert words in figure.get_suptitle().lower()
    assert [axis.get_title() for axis in figure.axes] == ["q_proj", "v_proj"]
    for axis in figure.axes:
        assert axis.get_xlabel() == "layer"
        assert words in axis.get_ylabel()
        lines = {line.get_label(): line for line in axis.lines if str(line.get_label()).startswith("run")}
        for name, rows in runs.items():
            chosen = [row for row in rows if row.kind == axis.get_title()]
            assert list(lines[name].get_xdata()) == [row.layer for row in chosen]
            assert list(lines[name].get_ydata()) == [getattr(row, quantity) for row in chosen]
        assert len({(line.get_marker(), line.get_linestyle()) for line in lines.values()}) == 2
        ceilings = [line.get_ydata()[0] for line in axis.lines if line not in lines.values()]
        assert ceilings == ([3] if quantity.endswith("_rank") else [])
        assert axis.get_ylim()[0] == (-0.5 if quantity.endswith("_rank") else 0)
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == set(runs)
    plain = {name: [replace(row, effect=None) for row in rows] for name, rows in runs.items()}
    half = {**runs, "run 1": plain["run 1"]}
    for drawn, deciding in ((runs, "99 % of the effect"), (plain, "99 % of the energy"), (half, "99 % of the energy")):
        assert deciding in dynalora.plot_rank_landscape(drawn).get_suptitle()
    with pytest.raises(ConfigError, match="quantity is 'rank'; choose one of effective_rank"):
        dynalora.plot_rank_landscape(runs, quantity="rank")
    with pytest.raises(ConfigError, match="no matrices to draw"):
        dynalora.plot_rank_landscape([])


def test_landscape_is_drawn(tmp_path: Path) -> None:
    rows = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            LLAMA.build(), DiraConfig(target_modules="all-linear", init_weights=False, r=seed + 2)
        )
        rows[f"run {seed}"] = dynalora.rank_landscape(model)
    figure = dynalora.plot_rank_landscape(rows, str(tmp_path / "landscape.png"))
    assert (tmp_path / "landscape.png").stat().st_size > 5000
    drawn = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert set(drawn) == {row.kind for row in rows["run 0"]}
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn["q_proj"].lines}
    assert lines["run 1"] == [row.effective_rank for row in rows["run 1"] if row.kind == "q_proj"]


def test_export_from_the_folder_alone_equals_export_of_the_model(tmp_path: Path) -> None:
    config = DiraConfig(
        r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.0.*.q_proj": 2}, init_weights=False
    )
    model = peft.get_peft_model(LLAMA.build(), config)
    model.save_pretrained(tmp_path / "adapter")
    report = export_adapter_folder(str(tmp_path / "adapter"), str(tmp_path / "lora"))
    assert report.max_error < 1e-7
    assert sorted(report.ranks.values()) == [2, 4, 4, 4]
    loaded = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "lora")
    assert isinstance(loaded.base_model, peft.LoraModel)
    torch.testing.assert_close(LLAMA.logits(loaded), LLAMA.logits(model), atol=1e-5, rtol=1e-5)


def delta_of(folder: Path, module: str) -> torch.Tensor:
    """The update that a folder with a plain LoRA makes, in float64, loaded by PEFT itself."""
    plain = peft.PeftModel.from_pretrained(LLAMA.build(), folder)
    return plain.get_submodule("base_model.model." + module).get_delta_weight("default").detach().double()


@pytest.mark.parametrize(
    ("options", "rank"),
    [({"max_rank": 2}, 2), ({"tolerance": 0.0}, 6), ({"tolerance": 0.35}, 4), ({"tolerance": 0.35, "max_rank": 3}, 3)],
    ids=str,
)
def test_export_cuts_to_the_best_of_its_rank(options: dict[str, float], rank: int, tmp_path: Path) -> None:
    """Six components, two of which are written twice; the spectrum falls so that a rank of 4 loses just under 0.35."""
    model = peft.get_peft_model(LLAMA.build(), DiraConfig(r=8, alpha=8, target_modules=["q_proj"]))
    with torch.no_grad():
        for layer in (m for m in model.modules() if hasattr(m, "dira_up")):
            up = torch.linalg.qr(torch.randn(32, 6)).Q * torch.tensor([5.0, 4.0, 3.5, 3.0, 2.0, 1.0])
            down = torch.linalg.qr(torch.randn(32, 6)).Q.t()
            layer.parameter("up", "default").copy_(torch.cat([up[:, :4], up[:, 4:] / 2, up[:, 4:] / 2], 1))
            layer.parameter("down", "default").copy_(torch.cat([down[:4], down[4:], down[4:]]))
    report = dynalora.export_lora(model, tmp_path / "cut", **options)
    assert set(report.ranks.values()) == {rank}
    module = next(iter(report.ranks))
    whole = model.get_submodule("base_model.model." + module).get_delta_weight("default").detach().double()
    u, values, v = torch.linalg.svd(whole)
    best = u[:, :rank] * values[:rank] @ v[:rank]
    torch.testing.assert_close(delta_of(tmp_path / "cut", module), best, atol=1e-5, rtol=1e-5)
    lost = float((whole - best).norm() / whole.norm())
    assert report.lost == pytest.approx(lost if rank < 6 else 0.0, abs=1e-5)


@pytest.mark.parametrize("options", [{"max_rank": 0}, {"tolerance": 1.0}, {"tolerance": -0.1}], ids=str)
def test_export_refuses_ranks_and_shares_out_of_range(options: dict[str, float], tmp_path: Path) -> None:
    model = peft.get_peft_model(LLAMA.build(), DiraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=next(iter(options))):
        dynalora.export_lora(model, tmp_path / "cut", **options)
    assert not (tmp_path / "cut").exists()


def test_export_keeps_trained_heads(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        LLAMA.build(), DiraConfig(target_modules=["q_proj"], init_weights=False, modules_to_save=["lm_head"])
    )
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    dynalora.export_lora(model, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "lora")
    torch.testing.assert_close(LLAMA.logits(loaded), LLAMA.logits(model), atol=1e-5, rtol=1e-5)


def test_export_never_writes_over_anything(tmp_path: Path) -> None:
    model = peft.get_peft_model(LLAMA.build(), DiraConfig(target_modules=["q_proj"]))
    (tmp_path / "theirs").write_text("keep me")
    with pytest.raises(DynaloraError, match="already exists"):
        dynalora.export_lora(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_export_refuses_trained_biases(tmp_path: Path) -> None:
    model = peft.get_peft_model(TOYS["gpt2"].build(), DiraConfig(target_modules=["c_attn"], bias="dira_only"))
    with pytest.raises(UnsupportedError, match="bias='dira_only'"):
        dynalora.export_lora(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "holds no adapter"),
        (
            lambda folder: peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(str(folder)),
            "made by .*LORA, which is none of dynalora's methods",
        ),
        (
            lambda folder: DiraConfig(target_modules=["q_proj"]).save_pretrained(str(folder)),
            r"no adapter_model\.safetensors",
        ),
    ],
    ids=["empty", "another library's", "no weights"],
)
def test_what_is_no_adapter_is_refused(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        load_without_base(str(tmp_path))


def test_state_report_says_what_the_adapter_does_now() -> None:
    config = DiraConfig(r=2, target_modules=["q_proj"], penalty_weight=0.5, total_steps=4, init_weights=False)
    model = peft.get_peft_model(LLAMA.build(), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    (report,) = dynalora.state_report(model)
    assert (report.method, report.adapter, report.step, report.total_steps) == ("dira", "default", 1, 4)
    assert list(report.ranks.values()) == [2, 2]
    assert report.details["dira_penalty_weight"] == pytest.approx(0.5 * 3 / 4)
    deltas = [row.nuclear_norm for row in dynalora.rank_landscape(model)]
    assert report.details["nuclear_norm_bound"] >= sum(deltas) - 1e-9  # alpha = r, so s = 1
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_landscape_and_zeroing_of_adalora() -> None:
    config = peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj"], lora_alpha=8)
    model = peft.get_peft_model(LLAMA.build(), config)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            parameter.data.normal_()
    layers = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    rows = dynalora.rank_landscape(model)
    assert len(rows) == len(layers) > 0
    for row, layer in zip(rows, layers, strict=True):
        wanted = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double())[:3]
        assert row.singular_values == pytest.approx(wanted.tolist(), rel=1e-5)
    zero_updates(model, [rows[0].module])
    assert float(layers[0].get_delta_weight("default").detach().abs().max()) == 0
    assert float(layers[1].get_delta_weight("default").detach().abs().max()) > 0
