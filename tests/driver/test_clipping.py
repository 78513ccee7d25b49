"""Gradients that are clipped together with a penalty: as if it were part of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as had_before  # as a loop may have it before any adapter is made

import dynalora
from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import ConfigError
from tests.driver.loops import CONFIGS, adapted, assert_close_weights, batches, dira, trainable, weights
from tests.driver.test_trainers import trained

MAX_NORM = 0.02


def small(weight: float, **options: Any) -> tuple[Any, list[Any]]:
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    config = dynalora.DiraConfig(
        r=3,
        target_modules=["0", "2"],
        penalty_weight=weight,
        penalty_schedule="constant",
        init_weights=False,
        **options,
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).double()
    return model, [module for module in model.modules() if isinstance(module, AdapterLayer)]


def task(model: Any, step: int) -> Tensor:
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - 1).square().mean()


def in_the_loss(weight: float, norm_type: float) -> list[Tensor]:
    """The papers' way: the penalty is a part of the loss, and nothing is added afterwards."""
    model, layers = small(0.0)
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    for step in range(4):
        optimizer.zero_grad()
        penalty = sum(
            (layer.parameter("up", "default").norm(dim=0) * layer.parameter("down", "default").norm(dim=1)).sum()
            for layer in layers
        )
        (task(model, step) + weight * penalty).backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), MAX_NORM, norm_type)
        optimizer.step()
    return [p.detach().clone() for p in trainable(model)]


def clipped(weight: float, norm_type: float = 2.0, clip: Any = had_before, **options: Any) -> list[Tensor]:
    model, _ = small(weight, **options)
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    for step in range(4):
        optimizer.zero_grad()
        task(model, step).backward()
        clip(trainable(model), MAX_NORM, norm_type)
        optimizer.step()
    return [p.detach().clone() for p in trainable(model)]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_a_bare_loop_clips_the_sum_as_the_papers_do(norm_type: float) -> None:
    expected = in_the_loss(0.3, norm_type)
    assert distance(clipped(0.3, norm_type, clip_penalty=True), expected) < 1e-12
    assert distance(clipped(0.3, norm_type), expected) > 1e-4, "the setting changes nothing here"
    named = torch.nn.utils.clip_grad_norm_
    assert distance(clipped(0.3, norm_type, clip=named, clip_penalty=True), expected) < 1e-12


@pytest.mark.parametrize("name", ["dira", "dislora", "pedyra"])
def test_trainer_and_bare_loop_clip_alike(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "dira": {"penalty_schedule": "constant"},
        "dislora": {"ortho_weight": 30.0},
        "pedyra": {},
    }[name]
    by_trainer = trained(tmp_path, CONFIGS[name](clip_penalty=True, **options), max_grad_norm=MAX_NORM)

    def by_hand(clip_penalty: bool) -> Any:
        model = adapted(CONFIGS[name](total_steps=6, clip_penalty=clip_penalty, **options))
        named = dict(model.named_parameters())
        groups = [{"params": [p for n, p in named.items() if p.requires_grad and "bias" not in n], "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
        model.train()
        for batch in batches(6):
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable(model), MAX_NORM)
            optimizer.step()
            scheduler.step()
        return model

    hand = by_hand(True)
    assert_close_weights(weights(by_trainer), weights(hand), 1e-5)
    others = weights(by_hand(False))
    assert any(
        tensor.shape != others[key].shape or not torch.allclose(tensor, others[key], atol=1e-5)
        for key, tensor in weights(hand).items()
    )


def test_the_gradients_of_a_step_have_the_norm_that_was_asked_for() -> None:
    model, _ = small(0.3, clip_penalty=True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    task(model, 0).backward()
    norm = torch.nn.utils.clip_grad_norm_(trainable(model), MAX_NORM)
    assert norm > MAX_NORM
    optimizer.step()
    total = torch.stack([p.grad.norm() for p in trainable(model)]).norm()  # type: ignore[union-attr]
    assert float(total) == pytest.approx(MAX_NORM, rel=1e-4)


def test_what_was_clipped_for_a_step_that_was_never_made_is_forgotten() -> None:
    results = []
    for stray in (False, True):
        model, _ = small(0.3, clip_penalty=True)
        optimizer = torch.optim.SGD(trainable(model), lr=0.5)
        if stray:
            task(model, 9).backward()
            torch.nn.utils.clip_grad_norm_(trainable(model), MAX_NORM)
            optimizer.zero_grad(set_to_none=False)
        task(model, 0).backward()
        optimizer.step()
        results.append([p.detach().clone() for p in trainable(model)])
    assert distance(*results) == 0


def test_a_scaler_unscales_before_and_a_second_call_clips_again() -> None:
    plain, _ = small(0.3, clip_penalty=True)
    scaled, _ = small(0.3, clip_penalty=True)
    for model, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=64.0))):
        optimizer = torch.optim.SGD(trainable(model), lr=0.5)
        loss = task(model, 0)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable(model), MAX_NORM)
        torch.nn.utils.clip_grad_norm_(trainable(model), MAX_NORM / 2)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
    total = torch.stack([p.grad.norm() for p in trainable(plain)]).norm()  # type: ignore[union-attr]
    assert float(total) == pytest.approx(MAX_NORM / 2, rel=1e-4)
    assert distance([p.detach() for p in trainable(plain)], [p.detach() for p in trainable(scaled)]) < 1e-12


def test_without_clipping_or_setting_nothing_is_touched() -> None:
    def run(clip_penalty: bool) -> dict[str, Tensor]:
        model = adapted(dira(total_steps=6, clip_penalty=clip_penalty))
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        for batch in batches(3):
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        return weights(model)

    plain, other = run(False), run(True)
    assert all(torch.equal(tensor, other[name]) for name, tensor in plain.items())
    with pytest.raises(ConfigError, match="clip_penalty must be True or False"):
        dira(clip_penalty=1)
