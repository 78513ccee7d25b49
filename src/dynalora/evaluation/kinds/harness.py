"""Tasks of lm-evaluation-harness, which reads their rows and scores them itself."""

from __future__ import annotations

from dataclasses import dataclass

from dynalora.common.statistics import Estimate
from dynalora.evaluation.harness import run_harness
from dynalora.evaluation.heads import CAUSAL_LM
from dynalora.evaluation.kinds.base import Kind, Measuring, Prepared, Subject
from dynalora.evaluation.results import TaskResult

_SHARES = ("acc", "acc_norm", "exact_match", "f1", "em")


@dataclass(frozen=True)
class HarnessKind(Kind):
    """One task of lm-evaluation-harness.

    Attributes:
        name: The harness's name of it.
        shots: Examples before each question; None: as many as the task has by itself.
        max_length: Longest input in tokens; None: what the model takes.
    """

    name: str
    shots: int | None = None
    max_length: int | None = None
    heads = (CAUSAL_LM,)

    def measure(self, subject: Subject, prepared: Prepared, how: Measuring) -> TaskResult:
        (result,) = run_harness(
            subject.model, subject.tokenizer, [self.name], num_fewshot=self.shots, limit=prepared.limit,
            batch_size=how.batch_size, max_length=self.max_length,
        )  # fmt: skip
        scores = {name: Estimate(value, error or 0.0).interval for name, (value, error) in result.numbers.items()}
        main = next(name for name in scores if name.split(" ")[0] == result.metric)
        percent = [name for name in scores if name.split(" ")[0] in _SHARES]
        return prepared.result(scores, percent=percent, main=main, items=result.samples or 0)
