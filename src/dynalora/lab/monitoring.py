"""Named texts on which forgetting is followed during training."""

from __future__ import annotations

MONITORED_TEXTS = 32


MONITORED_LENGTH = 128
"""Of text that is named for monitoring: enough for a curve, and cheap at every measurement."""
