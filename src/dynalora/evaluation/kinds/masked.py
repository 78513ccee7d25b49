"""Running text whose perplexity a masked language model has: in windows, or in sentences drawn from a corpus."""

from __future__ import annotations

import random
import re

from dynalora.common.statistics import Interval
from dynalora.evaluation.heads import MASKED_LM
from dynalora.evaluation.kinds.base import Measuring, Prepared, Subject
from dynalora.evaluation.kinds.perplexity import PerplexityKind
from dynalora.evaluation.masked_lm import MaskedText, mask_text, mask_windows, masked_lm_perplexity
from dynalora.evaluation.results import TaskResult

SENTENCES = 2000
"""Sentences that are drawn from a corpus, unless another number is asked for."""
_LEAST_WORDS = 5  # fewer are headings, names and the like
_SEED = 0
_ENDS = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)\]])\s+|\n+")


class MaskedKind(PerplexityKind):
    """Perplexity of a masked language model on masked tokens of running text."""

    heads = (MASKED_LM,)

    def perplexity(self, subject: Subject, rows: list[list[int]], batch_size: int, title: str) -> Interval:
        return _perplexity(subject, mask_windows(rows, subject.tokenizer), batch_size)


class MaskedSentencesKind(MaskedKind):
    """The same on sentences that are drawn from a corpus, always the same ones (DISeL, App. II.5)."""

    def measure(self, subject: Subject, prepared: Prepared, how: Measuring) -> TaskResult:
        drawn = sentences([item.prompt for item in prepared.items], prepared.limit or SENTENCES)
        longest = min(how.window, subject.room())
        masked = mask_text(drawn, subject.tokenizer, max_length=longest)
        return prepared.result({self.number: _perplexity(subject, masked, how.batch_size)}, items=len(masked.rows))


def sentences(texts: list[str], count: int) -> list[str]:
    """Sentences of at least five words, drawn with a fixed seed from all that there are, in their order.

    Args:
        texts: Of a corpus.
        count: How many; of a corpus that has fewer, all.
    """
    whole = [part.strip() for text in texts for part in _ENDS.split(text)]
    whole = [part for part in whole if len(part.split()) >= _LEAST_WORDS]
    places = random.Random(_SEED).sample(range(len(whole)), min(count, len(whole)))
    return [whole[place] for place in sorted(places)]


def _perplexity(subject: Subject, text: MaskedText, batch_size: int) -> Interval:
    return masked_lm_perplexity(
        subject.model, text, batch_size=batch_size, name=subject.name, progress=subject.progress
    ).interval


MASKED = MaskedKind()
MASKED_SENTENCES = MaskedSentencesKind()
