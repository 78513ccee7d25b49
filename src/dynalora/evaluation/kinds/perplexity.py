"""Running text whose perplexity a causal language model has."""

from __future__ import annotations

from dynalora.common.statistics import Interval
from dynalora.evaluation.heads import CAUSAL_LM
from dynalora.evaluation.kinds.base import Kind, Measuring, Prepared, Subject
from dynalora.evaluation.perplexity import perplexity, windows
from dynalora.evaluation.results import TaskResult


class PerplexityKind(Kind):
    """Perplexity of a causal language model on windows of running text."""

    heads = (CAUSAL_LM,)
    number = "perplexity"

    def measure(self, subject: Subject, prepared: Prepared, how: Measuring) -> TaskResult:
        text = "".join(item.prompt for item in prepared.items)
        length = min(how.window, subject.room() - 2)
        rows = windows(subject.tokenizer, text, length, prepared.limit)
        score = self.perplexity(subject, rows, how.batch_size, prepared.task.title)
        return prepared.result({self.number: score}, items=len(rows))

    def perplexity(self, subject: Subject, rows: list[list[int]], batch_size: int, title: str) -> Interval:
        """The perplexity on windows of token ids."""
        what = f"{title}: {subject.name}"
        return perplexity(subject.model, rows, batch_size=batch_size, what=what, progress=subject.progress)


PERPLEXITY = PerplexityKind()
