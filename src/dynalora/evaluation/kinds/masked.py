"""Running text whose perplexity a masked language model has."""

from __future__ import annotations

from dynalora.common.statistics import Interval
from dynalora.evaluation.heads import MASKED_LM
from dynalora.evaluation.kinds.base import Subject
from dynalora.evaluation.kinds.perplexity import PerplexityKind
from dynalora.evaluation.masked_lm import mask_windows, masked_lm_perplexity


class MaskedKind(PerplexityKind):
    """Perplexity of a masked language model on masked tokens of running text."""

    heads = (MASKED_LM,)

    def perplexity(self, subject: Subject, rows: list[list[int]], batch_size: int, title: str) -> Interval:
        return masked_lm_perplexity(
            subject.model, mask_windows(rows, subject.tokenizer), batch_size=batch_size, name=subject.name,
            progress=subject.progress,
        ).interval  # fmt: skip


MASKED = MaskedKind()
