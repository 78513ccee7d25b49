"""Pad tokenised conversations to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import pad

from dynalora.common.names import IGNORED_LABEL
from dynalora.evaluation.padding import padded
from dynalora.evaluation.tokens import Tokens


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
        side: Literal["left", "right"] = "left" if self.last_logits else "right"
        ids, mask = padded([row["input_ids"] for row in rows], self.pad_token_id, side)
        labels, _ = padded([row["labels"] for row in rows], IGNORED_LABEL, side)
        missing = -ids.shape[1] % self.pad_to_multiple_of
        beside = (missing, 0) if self.last_logits else (0, missing)
        ids, mask, labels = (
            pad(tensor, beside, value=value)
            for tensor, value in ((ids, self.pad_token_id), (mask, 0), (labels, IGNORED_LABEL))
        )
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if not self.last_logits:
            return batch
        labelled = (labels[:, 1:] != IGNORED_LABEL).any(dim=0).nonzero()
        first = int(labelled[0]) if len(labelled) else labels.shape[1] - 1
        return {
            **batch,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            # Positions and not their number: the output layer then gets a contiguous input, and multiplies once for the
            # batch and not once for every row.
            "logits_to_keep": torch.arange(first, labels.shape[1]),
            # The last position predicts what would come after the end.
            "shift_labels": pad(labels[:, first + 1 :], (0, 1), value=IGNORED_LABEL),
        }


def batches_of(
    rows: Sequence[Tokens], pad_token_id: int | None, *, batch_size: int = 8
) -> list[dict[str, torch.Tensor]]:
    """Rows as batches, in their order and padded on the right.

    Returns:
        Batches as [`Collator`][dynalora.lab.data.collator.Collator] makes them, of tensors (batch_size, T).
    """
    collator = Collator(pad_token_id or 0)
    return [collator(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
