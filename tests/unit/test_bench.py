from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from dynalora.errors import ConfigError
from dynalora.jobs.bench.settings import BenchSpec
from dynalora.jobs.bench.setup import CONTROL, random_tokens, sharing_copy
from dynalora.jobs.bench.training import PHASES, Measured, _Contestant, as_json, bench, saved_for_backward, tables
from dynalora.methods.pedyra import adjustments
from tests.unit import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


def small(folder: Path, **more: Any) -> BenchSpec:
    given = {"dtypes": ["float32"], "r": 2, "batch_size": 2, "length": 8, "rounds": 3, "warmup": 1, "memory": False}
    return BenchSpec(model=str(folder), device="cpu", **{**given, **more})


def test_copies_share_the_weights_and_nothing_else() -> None:
    model = tiny.model(64)
    twin = sharing_copy(model)
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in ours)
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}


def test_saved_memory_counts_each_storage_once_and_no_weights() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        y = layer(x)  # keeps the weight, which is not counted
        z = torch.exp(y)  # keeps its result
        return (z * z.view(4, 8)).sum()  # keeps the same result, twice

    assert saved_for_backward(layer, forward) == 4 * 8 * 4


def test_every_method_is_timed_in_every_round(folder: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    spec = small(folder, control=True)
    results = bench(spec, progress=lambda *report: told.append(report))
    assert [item.method for item in results] == ["lora", "dira", "disel", "pedyra", "dislora", CONTROL]
    for item in results:
        assert list(item.seconds) == list(PHASES)
        assert all(len(times) == 3 and min(times) > 0 for times in item.seconds.values())
        assert item.saved_bytes > 0
        assert item.ratio_quartiles[0] <= item.ratio <= item.ratio_quartiles[1]
    reference, dira, disel, *_, control = results
    assert reference.ratio == 1.0
    assert reference.trainable_parameters == dira.trainable_parameters == control.trainable_parameters
    assert disel.trainable_parameters > dira.trainable_parameters
    assert told[0] == ("Training steps, float32", 0, 4)
    assert told[-1] == ("Training steps, float32", 4, 4)


def test_schedules_are_those_of_the_run_that_is_asked_for(folder: Path) -> None:
    base = tiny.model(64)
    for run_steps, moves in ((None, True), (1000, False)):
        spec = small(folder, methods=["lora", "pedyra"], rounds=4, run_steps=run_steps)
        contestant = _Contestant("pedyra", "pedyra", base, spec)
        for number in range(spec.measured_steps):
            contestant.step(random_tokens(64, spec, number))
        assert bool(adjustments(contestant.model)) is moves
    with pytest.raises(ConfigError, match=r"run_steps is 6; 7 steps are made to measure them"):
        small(folder, rounds=4, run_steps=6)


def test_ratio_is_taken_within_rounds() -> None:
    one = Measured(
        "dira", "float32", {"forward": [1.0, 10.0], "backward": [1.0, 10.0]}, 1.0, (1.0, 1.0), 1, 1, None, None
    )
    assert one.steps == [2.0, 20.0]
    assert one.median() == 11.0
    assert one.median("forward") == 5.5


def test_results_as_table_and_json(folder: Path) -> None:
    spec = small(folder, methods=["lora", "disel"], rounds=2)
    results = bench(spec)
    (table,) = tables(spec, results)
    assert [row[0] for row in table.rows] == ["lora", "disel"]
    assert "step / lora" in table.columns
    content = json.loads(as_json(spec, results))
    assert content["settings"]["r"] == 2
    assert content["machine"]["torch"] == torch.__version__
    assert content["results"][1]["median_seconds"]["step"] == pytest.approx(results[1].median())


def test_tokens_depend_on_seed_and_round_only(folder: Path) -> None:
    spec = small(folder)
    assert torch.equal(random_tokens(50, spec, 1), random_tokens(50, spec, 1))
    assert not torch.equal(random_tokens(50, spec, 1), random_tokens(50, spec, 2))
    assert random_tokens(50, spec, 1).shape == (2, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ["qlora"]}, "Unknown method 'qlora'; did you mean 'lora'"),
        ({"methods": []}, "methods is empty"),
        ({"methods": ["lora", "lora"]}, "methods names lora twice"),
        ({"dtypes": ["int8"]}, "dtypes is 'int8'; choose one of float32"),
        ({"rounds": 0}, "rounds is 0"),
        ({"r": 0}, "r is 0"),
        ({"length": 1}, "length is 1"),
    ],
)
def test_wrong_settings_are_named(changed: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        small(folder, **changed)


def test_targets_are_checked_before_weights_are_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynalora.jobs.bench.setup.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="'query' matches nothing; the model's linear modules are q_proj"):
        bench(small(folder, target_modules=["query"]))


def test_times_are_kept_when_memory_cannot_be_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback …\nMemoryError: no room")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    (result,) = bench(small(folder, methods=["lora"], memory=True, rounds=1))
    assert result.median() > 0
    assert result.step_bytes is None
    assert "The memory of 'lora' (float32) could not be measured: MemoryError: no room" in caplog.text


@pytest.mark.slow
def test_memory_is_measured_in_a_fresh_process(folder: Path) -> None:
    (result,) = bench(small(folder, methods=["lora"], memory=True, rounds=1))
    assert result.step_bytes is not None
    assert result.peak_bytes is not None
    assert 0 <= result.step_bytes < result.peak_bytes
    assert result.peak_bytes > 50 * 2**20  # a process with torch in it


def test_methods_without_alpha_and_with_their_own_optimizer_are_timed(folder: Path) -> None:
    found = bench(small(folder, methods=["lora", "miss", "p-tuning", "lora+"], rounds=2))
    assert [item.method for item in found] == ["lora", "miss", "p-tuning", "lora+"]
    contestant = _Contestant("lora+", "lora+", tiny.model(64), small(folder))
    assert sorted({group["lr"] for group in contestant.optimizer.param_groups if group["params"]}) == [1e-4, 16e-4]
