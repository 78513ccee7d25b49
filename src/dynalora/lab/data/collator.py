"""Pad tokenised conversations to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynalora.common.names import IGNORED_LABEL
from dynalora.evaluation.tokens import Tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Collator:
    """Pads tokenised conversations to the longest of a batch.

    Args:
        pad_token_id: What to pad the ids with; it gets no attention and no loss.
        pad_to_multiple_of: Round the padded length up to a multiple of this (8 suits tensor cores).
        last_logits: Pad on the left, so that all responses end together, and ask the model for the logits of the last
            positions alone. For a loss on the responses only, prompts then cost no output layer. The model must take
            `logits_to_keep`, `position_ids` and `shift_labels`. False: pad on the right.

    Returns (when called with a list of B rows):
        `input_ids`, `attention_mask` and `labels`, each (B, T), int64. With `last_logits` also `position_ids` (B, T),
        `logits_to_keep` (K,), the positions from the first one that predicts a label on, and `shift_labels` (B, K),
        what they predict.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1
    last_logits: bool = False

    def __call__(self, rows: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids = torch.full((len(rows), length), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED_LABEL, dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            place = slice(length - size, length) if self.last_logits else slice(size)
            ids[index, place] = torch.tensor(row["input_ids"])
            labels[index, place] = torch.tensor(row["labels"])
            mask[index, place] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if not self.last_logits:
            return batch
        labelled = (labels[:, 1:] != IGNORED_LABEL).any(dim=0).nonzero()
        first = int(labelled[0]) if len(labelled) else length - 1
        return {
            **batch,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            # Positions and not their number: the output layer then gets a contiguous input, and multiplies once for the
            # batch and not once for every row.
            "logits_to_keep": torch.arange(first, length),
            # The last position predicts what would come after the end.
            "shift_labels": torch.nn.functional.pad(labels[:, first + 1 :], (0, 1), value=IGNORED_LABEL),
        }
