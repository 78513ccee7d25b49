"""What is measured of a run while it trains: for the choice of its best weights, and for curves over the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dynalora.jobs.compare.settings import FURTHER, CompareSpec
from dynalora.lab.training.best import AtSteps, KeepBest, score_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from dynalora.lab.tasks.task import ExperimentTask

Kept = Mapping[str, Mapping[str, Any]]


class OverTime:
    """Measures a run at its steps.

    Args:
        spec: What is compared.
        held_out: The task.
        validation: The task with the questions set aside as its held-out ones; None: there are none.
        tokenizer: The model's.
        kept: Measures a model on retention tasks and further ones.

    Attributes:
        best: What keeps the best weights; None: the last are taken.
        at_steps: What measures; None: nothing is.
    """

    def __init__(
        self,
        spec: CompareSpec,
        held_out: ExperimentTask,
        validation: ExperimentTask | None,
        tokenizer: PreTrainedTokenizerBase,
        kept: Callable[[nn.Module], Kept],
    ) -> None:
        self.spec, self.held_out, self.validation = spec, held_out, validation
        self.tokenizer, self.kept = tokenizer, kept
        self.best = KeepBest() if spec.keep_best else None
        measures = spec.over_time or spec.keep_best is not None
        self.at_steps = AtSteps(spec.measure_every, self._look) if measures else None
        self._points: list[dict[str, Any]] = []

    def record(self) -> dict[str, Any]:
        """What was measured, for the cell's result; empty where nothing was."""
        if self.at_steps is None:
            return {}
        taken = None if self.best is None or self.best.best is None else self.best.best.step
        return {"over_time": {"points": self._points, "best_step": taken}}

    def _look(self, model: nn.Module, step: int) -> None:
        spec, by = self.spec, self.spec.keep_best
        point: dict[str, Any] = {"step": step}
        measured = None
        if spec.over_time or by == "held-out-accuracy":
            measured = self.held_out.measure(model, self.tokenizer, spec.measuring, name=f"step {step}")
            accuracy = measured.accuracy
            point |= {"loss": measured.loss.value, "accuracy": None if accuracy is None else accuracy.value}
        if spec.over_time or by == FURTHER:
            point["kept"] = self.kept(model)
        if self.best is not None:
            assert by is not None
            if by == FURTHER:
                number = next(task for task in point["kept"].values() if task.get("further"))
                point["score"] = number["value"] if "perplexity" in number["metric"] else -number["value"]
            elif by == "held-out-accuracy":
                assert measured is not None
                point["score"] = score_of(by, measured, self.held_out.name)
            else:
                assert self.validation is not None  # checked with the settings
                how = replace(spec.measuring, losses_only=by.endswith("loss"))
                score = self.validation.measure(model, self.tokenizer, how, name=f"validation, step {step}")
                point["score"] = score_of(by, score, self.validation.name)
            self.best.consider(model, step, point["score"])
        self._points.append(point)
