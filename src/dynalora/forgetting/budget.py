"""Measuring the KL that a budget of forgetting is about, during a run and at its end; and replaying the text.

The weight that follows the measurements is [`adapter.budget`][dynalora.adapter.budget]'s.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from dynalora.adapter.retain import Retain
from dynalora.common.processes import from_first
from dynalora.common.progress import Progress, silent
from dynalora.driver import Driver, drivers_of
from dynalora.errors import TrainingError
from dynalora.evaluation.generation import evaluating
from dynalora.forgetting.retention import BasePredictions, base_predictions, continuation_logits, retention
from dynalora.forgetting.texts import MeasuredText
from dynalora.forgetting.trim import trim

logger = logging.getLogger(__name__)

MEASURED = 16
"""Texts that one measurement during a run reads."""
REPLAYED = 4
"""Texts that one step of `retain_mode="replay"` reads."""
TOLERANCE = 0.1
"""How far below its budget a run may end, as a share of it."""
_CACHE_BYTES = 2**30  # for the base model's predictions on the texts that are measured again and again


class TextMeter:
    """Measures and replays the text that an adapter is to keep; it does not keep the model alive.

    Args:
        model: The causal language model with the adapter.
        text: All of the text.
    """

    def __init__(self, model: nn.Module, text: MeasuredText) -> None:
        self.text = text
        self._model = weakref.ref(model)
        self._measured: BasePredictions | None = None
        self._replayed: BasePredictions | None = None

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            TrainingError: It is gone.
        """
        model = self._model()
        if model is None:
            raise TrainingError(
                "the model that dynalora.prepare_retain was called with is gone, while its adapter still trains; call "
                "it with the model that is in training."
            )
        return model

    def kl(self) -> float:
        """KL(base ‖ tuned), nats per token, on texts from all over the text; the first process's number."""
        model = self.model
        if self._measured is None:
            part = some_texts(self.text, MEASURED)
            self._measured = base_predictions(model, part, dtype=None, max_bytes=_CACHE_BYTES)
        return from_first(retention(model, self._measured.text, base=self._measured).kl)

    def replay(self, step: int, parameters: list[nn.Parameter]) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """KL(base ‖ tuned), nats per token, on the texts whose turn it is, and its gradient in parameters.

        Args:
            step: Steps done.
            parameters: What to differentiate in.
        """
        model, count = self.model, len(self.text.rows)
        if self._replayed is None:
            plain = MeasuredText(self.text.rows, self.text.starts)
            self._replayed = base_predictions(model, plain, dtype=None, max_bytes=_CACHE_BYTES)
        groups = -(-count // REPLAYED)
        batch = list(range(step % groups, count, groups))  # texts of all kinds, which lie in sections
        kept = [self._replayed.log_probs[index] for index in batch]
        with evaluating(model):
            base = [part for part in kept if part is not None]
            if len(base) < len(batch):
                with torch.no_grad():
                    base = continuation_logits(model, self.text, batch, off=True)
            with torch.enable_grad():
                tuned = continuation_logits(model, self.text, batch, off=False)
                p = F.log_softmax(torch.cat([part.to(tuned[0].device) for part in base]).float(), dim=-1)
                q = F.log_softmax(torch.cat(tuned).float(), dim=-1)
                # A token that p rules out adds nothing, as in `retention`; torch's kl_div makes NaN of it.
                value = torch.where(torch.isneginf(p), 0.0, p.exp() * (p - q)).sum() / q.shape[0]
                gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        return value.detach(), gradients


def some_texts(text: MeasuredText, count: int) -> MeasuredText:
    """Texts at equal distances."""
    places = [index * len(text.rows) // count for index in range(min(count, len(text.rows)))]
    if len(text.rows) <= count:
        places = list(range(len(text.rows)))
    return MeasuredText(tuple(text.rows[place] for place in places), tuple(text.starts[place] for place in places))


@dataclass(frozen=True)
class BudgetOutcome:
    """What became of a budget of forgetting.

    Attributes:
        adapter: The adapter.
        budget: Its `max_forgetting`, nats per token.
        trained_kl: KL(base ‖ tuned) on all of the text as the run ended.
        kl: The KL now.
        factor: What the update was scaled by to get there; 1 where it was left alone.
        weight: The penalty's weight at the last step.
        retain: The weight that the run began with.
    """

    adapter: str
    budget: float
    trained_kl: float
    kl: float
    factor: float
    weight: float
    retain: float

    @property
    def held(self) -> bool:
        """Whether the run ended within a tenth of its budget."""
        return (1 - TOLERANCE) * self.budget <= self.kl <= (1 + TOLERANCE) * self.budget

    def __str__(self) -> str:
        text = f"adapter {self.adapter!r} forgets {self.kl:.4g} of max_forgetting={self.budget:.4g} nats per token"
        if self.factor < 1:
            text += f" (it was {self.trained_kl:.4g}; its update was scaled by {self.factor:.3f})"
        if self.held:
            return text
        if self.weight < self.retain / 100:
            return (
                f"{text}: the run did not need the budget, since the weight of retain fell to {self.weight:.3g}; "
                "train longer or with a larger learning rate or rank to use it."
            )
        return (
            f"{text}: the weight of retain, {self.weight:.3g} at the end, had not fallen far enough; begin with a "
            f"smaller one than {self.retain:.3g}, or train longer."
        )


def hold_budget(model: nn.Module, *, progress: Progress = silent) -> list[BudgetOutcome]:
    """End the runs of adapters with `max_forgetting`: measure on all of the text, and scale down what is above.

    transformers' Trainer does this by itself when training ends; a loop of your own calls it after the last step.
    Adapters that have made no step are left alone.

    Args:
        model: The model.
        progress: Called while it is measured.

    Returns:
        What became of each budget; the same is logged.
    """
    outcomes = []
    for driver, _ in drivers_of(model):
        part = retain_part(driver)
        config: Any = driver.config
        budget: float | None = getattr(config, "max_forgetting", None)
        if part is None or budget is None or part.weight is None or part.meter is None:
            continue
        assert isinstance(part.meter, TextMeter)
        try:
            result = trim(
                cast(PeftModel, model),
                part.meter.text,
                max_kl=budget,
                factors=(1.0,),
                adapter=driver.adapter,
                progress=progress,
            )
        except TrainingError as error:  # the model is the caller's to look at
            logger.warning("max_forgetting=%g was not held: %s", budget, error)
            continue
        outcome = BudgetOutcome(
            adapter=driver.adapter,
            budget=budget,
            trained_kl=result.points[0].kl,
            kl=result.taken.kl,
            factor=result.factor,
            weight=float(part.weight),
            retain=config.retain,
        )
        part.outcome = outcome
        logger.log(logging.INFO if outcome.held else logging.WARNING, "%s", outcome)
        outcomes.append(outcome)
    return outcomes


def retain_part(driver: Driver) -> Retain | None:
    """The part of an adapter that keeps what the base model says, if it has one."""
    return next((part for part in driver.parts if isinstance(part, Retain)), None)
