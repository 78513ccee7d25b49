"""Rows of token ids of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence


def padded(
    rows: Sequence[Sequence[int]], padding: int, side: Literal["left", "right"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one tensor, padded to the longest.

    Args:
        rows: B rows of ids.
        padding: Token to pad with.
        side: Where the padding stands.

    Returns:
        Ids (B, T), and the attention mask (B, T), which is 0 on padding; both int64.
    """
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=padding, padding_side=side)
    ones = [torch.ones_like(row) for row in tensors]
    return ids, pad_sequence(ones, batch_first=True, padding_side=side)
