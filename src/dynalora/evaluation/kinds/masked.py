"""Running text whose perplexity a masked language model has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dynalora.common.statistics import Interval
from dynalora.evaluation.heads import MASKED_LM
from dynalora.evaluation.kinds.base import Measuring
from dynalora.evaluation.kinds.perplexity import PerplexityKind
from dynalora.evaluation.masked_lm import mask_windows, masked_lm_perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MaskedKind(PerplexityKind):
    """Perplexity of a masked language model on masked tokens of running text."""

    heads = (MASKED_LM,)

    def perplexity(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[list[int]],
        how: Measuring,
        title: str,
    ) -> Interval:
        return masked_lm_perplexity(
            model, mask_windows(rows, tokenizer), batch_size=how.batch_size, name=how.name, progress=how.progress
        ).interval  # fmt: skip


MASKED = MaskedKind()
