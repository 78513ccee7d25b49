"""What a layer knows of the base model's own text; see [`adapter.retain`][dynalora.adapter.retain]."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynalora.spectral.second_moment import SecondMoment


@dataclass
class Curvature:
    """What a layer knows of the base model's own text.

    Attributes:
        inputs: C, of (in) values; layers with the same input share the object.
        outputs: G, of (out) values.
        bank: Inputs (n, in), for updates that depend on them; None where none does.
    """

    inputs: SecondMoment
    outputs: SecondMoment
    bank: torch.Tensor | None = None
