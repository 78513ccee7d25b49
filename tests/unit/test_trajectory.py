"""The record of a run's ranks: numbers worked out by hand, and that everything can be drawn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.errors import DynaloraError
from dynalora.forgetting.trajectory import pareto_variance, spearman
from dynalora.methods.pedyra import adjustments
from tests.driver.loops import adamw, adapted, batches, dira, loop, pedyra
from tests.toys import TOYS


def test_spearman() -> None:
    assert spearman([1, 2, 3, 9], [2, 4, 6, 7]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 1.125, variances 1.125 and 1.25.
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(1.125 / math.sqrt(1.125 * 1.25))
    assert math.isnan(spearman([1, 1], [1, 2]))


def test_trajectory_follows_the_record(tmp_path: Path) -> None:
    model = adapted(pedyra(total_steps=6))
    with pytest.raises(DynaloraError, match="no adjustment"):
        dynalora.rank_trajectory(model)
    loop(model, adamw(model), batches(6))
    trajectory = dynalora.rank_trajectory(model)
    record = adjustments(model)
    assert trajectory.steps == [1, 3, 5]
    assert trajectory.modules == list(model.rank_pattern)
    assert trajectory.ranks[0] == [3] * 4
    assert trajectory.ranks[-1] == list(model.rank_pattern.values())
    assert all(sum(row) == 12 for row in trajectory.ranks)
    for one, scores, places, ranks, variance in zip(
        record, trajectory.scores, trajectory.importance, trajectory.ranks, trajectory.pareto_variance, strict=False
    ):
        assert scores == [np.mean(own) for own in one.scores.values()] == pytest.approx(scores)
        assert sorted(places) == [1, 2, 3, 4]
        assert trajectory.modules[places.index(1)] == one.expanded[0]
        assert variance == pytest.approx(
            math.log(np.var([g ** (2 / 3) / r for g, r in zip(scores, ranks, strict=True)]))
        )
    assert set(trajectory.utilisation) == set(trajectory.modules)
    assert all(0 <= share <= 1 for share in trajectory.utilisation.values())

    figure = dynalora.plot_rank_trajectory(trajectory, str(tmp_path / "ranks.png"))
    assert len(figure.axes) == 7
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "ranks.svg").read_text()

    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(TOYS["llama"].build(), tmp_path / "adapter")
    assert dynalora.rank_trajectory(loaded) == trajectory


def test_the_scores_of_a_static_lora_are_recorded() -> None:
    models = []
    for config in (pedyra(total_steps=6, alpha=6, mode="static", ortho_weight=0.3), dira(penalty_weight=0.0)):
        config.init_weights = True
        config.total_steps = 6
        models.append(adapted(config))
        loop(models[-1], adamw(models[-1]), batches(6))
    static, lora = (list(adapter_layers(model).values()) for model in models)
    for one, other in zip(static, lora, strict=True):
        assert torch.equal(one.parameter("e", "default"), torch.ones(3))
        torch.testing.assert_close(one.get_delta_weight("default"), other.get_delta_weight("default"))
    trajectory = dynalora.rank_trajectory(models[0])
    assert trajectory.steps == [1, 3, 5]
    assert trajectory.ranks == [[3] * 4] * 4
    assert trajectory.pareto_variance[0] == -math.inf  # at LoRA's start up is zero, and so is every score
    assert all(math.isfinite(value) for value in trajectory.pareto_variance[1:])


def test_ranks_in_proportion_to_scores_have_no_variance() -> None:
    assert pareto_variance([3.0, 3.0], [2, 2]) == -math.inf
    assert pareto_variance([0.0, 0.0], [1, 4]) == -math.inf
    assert pareto_variance([0.0, 8.0], [1, 2]) == pytest.approx(0.0)  # 0 and 2, a variance of 1


def test_rank_pattern_makes_a_fresh_lora_of_the_same_ranks() -> None:
    model = adapted(pedyra(total_steps=6))
    loop(model, adamw(model), batches(6))
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], rank_pattern=dynalora.rank_pattern(model))
    fresh = peft.get_peft_model(TOYS["llama"].build(), config)
    found = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in fresh.named_modules()
        if hasattr(module, "lora_A") and isinstance(module.lora_A, torch.nn.ModuleDict)
    }
    assert found == model.rank_pattern
    assert dynalora.rank_pattern(adapted(dira())).keys() == dynalora.rank_pattern(model).keys()
    with pytest.raises(DynaloraError, match="other"):
        dynalora.rank_pattern(model, "other")
