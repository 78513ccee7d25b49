"""Running text whose perplexity a causal language model has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dynalora.common.statistics import Interval
from dynalora.evaluation.heads import CAUSAL_LM
from dynalora.evaluation.kinds.base import Kind, Measuring, Prepared
from dynalora.evaluation.perplexity import perplexity, windows
from dynalora.evaluation.results import TaskResult
from dynalora.evaluation.windows import model_window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PerplexityKind(Kind):
    """Perplexity of a causal language model on windows of running text."""

    heads = (CAUSAL_LM,)
    number = "perplexity"

    def perplexity(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[list[int]],
        how: Measuring,
        title: str,
    ) -> Interval:
        """The perplexity on windows of token ids."""
        what = f"{title}: {how.name}"
        return perplexity(model, rows, batch_size=how.batch_size, what=what, progress=how.progress)

    def measure(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prepared: Prepared,
        how: Measuring,
    ) -> TaskResult:
        text = "".join(item.prompt for item in prepared.items)
        length = min(how.window, model_window(model, tokenizer) - 2)
        rows = windows(tokenizer, text, length, prepared.limit)
        score = self.perplexity(model, tokenizer, rows, how, prepared.task.title)
        return prepared.result({self.number: score}, items=len(rows))


PERPLEXITY = PerplexityKind()
