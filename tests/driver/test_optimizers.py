"""All methods with every optimizer of the list, ranks that move and interrupted runs included."""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import dynalora
from dynalora.adapter.layer import adapter_layers
from dynalora.driver import drivers_of
from tests.driver.loops import trainable
from tests.driver.optimizers import ANEW, OPTIMIZERS, Tested, table
from tests.driver.test_long_runs import NAMES, config
from tests.toys import MLP

STEPS = 6
LAYERS: dict[str, Any] = {"r": 3, "target_modules": ["first", "second"]}
QUICK: dict[str, Any] = {
    "dira": dynalora.DiraConfig(**LAYERS, target_rank=0.5, total_steps=STEPS),
    "disel": dynalora.DiselConfig(**LAYERS),
    "dislora": dynalora.DisloraConfig(**LAYERS, warmup_steps=2, tsd_count=2),
    "pedyra": dynalora.PedyraConfig(**LAYERS, adjust_start=1, adjust_interval=1, adjust_end=4, adjust_size=2),
}

every_optimizer = pytest.mark.parametrize("tested", OPTIMIZERS, ids=lambda tested: f"{tested.module}-{tested.name}")


class Run:
    """A model in training with an optimizer of the list."""

    def __init__(self, tested: Tested, model: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(16, 12, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        self.tested, self.model = tested, model
        self.optimizers = tested.optimizers(trainable(model))
        self.seen: set[tuple[int, ...]] = set()

    def loss(self) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(self.x), self.y)

    def backward(self) -> torch.Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.loss()
        loss.backward(create_graph=self.tested.hessian)
        return loss.detach()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.seen.add(tuple(layer.rank("default") for layer in adapter_layers(self.model).values()))
            if self.tested.closure:
                self.optimizers[0].step(self.backward)
                continue
            self.backward()
            for optimizer in self.optimizers:
                optimizer.step()

    def continued(self) -> Run:
        """The same run, gone on with in another model and other optimizers."""
        other = Run(self.tested, copy.deepcopy(self.model))
        for mine, theirs in zip(self.optimizers, other.optimizers, strict=True):
            theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
        return other


def require(tested: Tested) -> None:
    """Skip where the package is missing, or where this version of it cannot train a model without adapters."""
    package = tested.module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    try:
        Run(tested, MLP()).steps(1)
    except Exception as error:
        pytest.skip(f"{tested.name} does not work here: {error}")


def made(tested: Tested, chosen: Any) -> Run:
    torch.manual_seed(3)
    return Run(tested, peft.get_peft_model(MLP(), copy.deepcopy(chosen)).train())


def check(tested: Tested, name: str, chosen: Any) -> None:
    """Train, and, where ranks move, once more from the middle on, as if the run had been interrupted there."""
    run = made(tested, chosen)
    before, loss = {n: p.detach().clone() for n, p in run.model.named_parameters()}, run.loss()
    resumed: Run | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.steps(STEPS - 2)
        if tested.resumes and name == "pedyra":
            resumed = run.continued()
        for each in (run, resumed):
            if each is not None:
                torch.manual_seed(1)
                each.steps(2)
    (driver,) = [driver for driver, _ in drivers_of(run.model)]
    assert driver.step == STEPS
    trained = {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}
    assert all(bool(tensor.isfinite().all()) for tensor in trained.values())
    assert any(before[n].shape != tensor.shape or not torch.equal(before[n], tensor) for n, tensor in trained.items())
    if tested.learns:
        assert run.loss() < loss
    if resumed is not None:
        for key, tensor in resumed.model.named_parameters():
            torch.testing.assert_close(tensor, run.model.get_parameter(key), rtol=1e-4, atol=1e-6, msg=key)
    if name in ("dira", "pedyra"):
        assert len(run.seen) > 1
    anew = [str(warning.message) for warning in caught if "starts anew" in str(warning.message)]
    assert tested.state == ANEW or not anew, anew[0]


@every_optimizer
def test_it_trains_our_methods(tested: Tested) -> None:
    """Ranks move, directions are chosen, and a run that was interrupted in between goes on as if it had not been."""
    require(tested)
    for name, chosen in QUICK.items():
        try:
            check(tested, name, chosen)
        except Exception as error:
            error.add_note(f"with {name}")
            raise


@pytest.mark.slow
@every_optimizer
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_every_method(tested: Tested, name: str) -> None:
    require(tested)
    run = made(tested, config(name, 12))
    run.steps(12)
    assert math.isfinite(float(run.loss()))
    assert [driver.step for driver, _ in drivers_of(run.model)] == [12]


def test_the_page_has_the_list() -> None:
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    assert table() in page, "run `python -m tests.driver.optimizers` and put its table into docs/optimizers.md"
