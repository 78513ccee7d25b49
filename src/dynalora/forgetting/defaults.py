"""Names and numbers of the measurements that settings of jobs need before anything is measured."""

from __future__ import annotations

from typing import Literal, get_args

Quantity = Literal[
    "effective_rank", "nuclear_norm", "energy", "entropy_rank", "stable_rank", "energy_rank", "effect_rank"
]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
"""What a rank landscape is drawn of."""

OWN_TEXT = "own text"
"""What the text that the base model writes itself is called among the texts of a measurement."""

PAPER_TAU = 1e-3
"""Threshold of DiRA's paper above which a singular value of s·ΔW counts."""

STRATEGIES = ("rlgr", "random", "naive")
"""Ways to recover a forgotten task."""

TRIM_FACTORS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Factors at which an update that is scaled down is measured."""
