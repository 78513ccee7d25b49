from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dynalora.errors import ConfigError
from dynalora.jobs.bench.generation import bench_generation, generate_greedily, generation_json, generation_tables
from dynalora.jobs.bench.settings import BenchSpec
from dynalora.jobs.bench.setup import CONTROL
from tests.unit import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


def small(folder: Path, **more: object) -> BenchSpec:
    given = {
        "methods": ["lora", "disel"], "dtypes": ["float32"], "r": 2, "batch_size": 2, "length": 6, "rounds": 3,
        "warmup": 1, "new_tokens": 4, "generate": True,
    }  # fmt: skip
    return BenchSpec(model=str(folder), device="cpu", **{**given, **more})  # type: ignore[arg-type]


def test_the_tokens_are_those_of_transformers_generate() -> None:
    model = tiny.model(64).eval()
    prompts = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(2))
    model.generation_config.eos_token_id = None  # nothing ends early
    made, first, each = generate_greedily(model, prompts, 9)
    expected = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=9, do_sample=False, pad_token_id=0
    )  # fmt: skip
    assert torch.equal(made, expected[:, 7:])
    assert min(first, each) > 0


def test_every_method_is_timed_in_every_round(folder: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    spec = small(folder, control=True)
    results = bench_generation(spec, progress=lambda *report: told.append(report))
    assert [item.method for item in results] == ["lora", "disel", CONTROL]
    for item in results:
        assert len(item.prefill_seconds) == len(item.token_seconds) == 3
        assert min(*item.prefill_seconds, *item.token_seconds) > 0
        assert item.token_quartiles[0] <= item.token_ratio <= item.token_quartiles[1]
    assert (results[0].prefill_ratio, results[0].token_ratio) == (1.0, 1.0)
    assert results[1].adapter_parameters > results[0].adapter_parameters
    assert told[-1] == ("Generation, float32", 4, 4)
    (table,) = generation_tables(spec, results)
    assert [row[0] for row in table.rows] == ["lora", "disel", CONTROL]
    assert "token / lora" in table.columns
    content = json.loads(generation_json(spec, results))
    assert content["settings"]["new_tokens"] == 4
    assert content["results"][1]["median_seconds"]["token"] == pytest.approx(results[1].token)


def test_a_single_new_token_has_no_decoding(folder: Path) -> None:
    with pytest.raises(ConfigError, match="new_tokens is 1; give at least 2"):
        small(folder, new_tokens=1)


def test_prompt_learning_is_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(ConfigError, match="Method 'p-tuning' lengthens every prompt"):
        bench_generation(small(folder / "nowhere", methods=["lora", "p-tuning"]))
