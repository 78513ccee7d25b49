"""Second moments of vectors, E[x xᵀ], as low rank plus diagonal, from rows that are seen once.

A sketch Y = C·Ω with a random Ω (n × m) is added up while the rows come by; at the end

    C ≈ Y (Ωᵀ Y)⁺ Yᵀ = F Fᵀ                          (Nyström; Tropp et al. 2017, Algorithm 3, with a small shift)

is cut to its k largest eigenvalues, and what is missing on the diagonal, which is never negative, is put there. So the
trace is exact, and memory is n × m numbers instead of n × n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

OVERSAMPLING = 16
"""Columns of the sketch beyond the rank that is kept."""


@dataclass(frozen=True)
class SecondMoment:
    """C ≈ basisᵀ·basis + diag(diagonal).

    Attributes:
        basis: (k, n).
        diagonal: (n), at least 0.
    """

    basis: torch.Tensor
    diagonal: torch.Tensor

    def form(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows · C · rowsᵀ`.

        Args:
            rows: (…, r, n).

        Returns:
            (…, r, r).
        """
        narrow = rows @ self.basis.mT
        return narrow @ narrow.mT + (rows * self.diagonal.unsqueeze(-2)) @ rows.mT

    def dense(self) -> torch.Tensor:
        """C, (n, n)."""
        return self.basis.mT @ self.basis + torch.diag_embed(self.diagonal)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SecondMoment:
        """The same numbers on another device, or in another precision."""
        return SecondMoment(self.basis.to(device, dtype), self.diagonal.to(device, dtype))

    @staticmethod
    def stack(moments: list[SecondMoment]) -> SecondMoment:
        """Moments of equal shapes, with a first dimension that counts them: (L, k, n) and (L, n)."""
        return SecondMoment(
            torch.stack([moment.basis for moment in moments]), torch.stack([moment.diagonal for moment in moments])
        )


class MomentSketch:
    """Adds up rows, and gives their second moment as low rank plus diagonal.

    Args:
        width: n.
        rank: k, at most n; where the sketch is as wide as the rows, the moment is exact but for the cut.
        device: Where to add up, in float32.
        seed: Of Ω.
    """

    def __init__(self, width: int, rank: int, *, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.rank = min(rank, width)
        columns = min(width, self.rank + OVERSAMPLING)
        if columns == width:
            self.test = torch.eye(width, device=device)
        else:
            generator = torch.Generator().manual_seed(seed)
            self.test = torch.randn(width, columns, generator=generator).to(device)
        self.sketch = torch.zeros(width, columns, device=device)
        self.squares = torch.zeros(width, device=device)
        self.count = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add rows, (t, n) of any floating dtype."""
        rows = rows.to(self.sketch.device, torch.float32)
        self.sketch.addmm_(rows.mT, rows @ self.test)
        self.squares += rows.square().sum(0)
        self.count += rows.shape[0]

    def result(self) -> SecondMoment:
        """The mean over the rows so far, float32; zero without any."""
        count = max(self.count, 1)
        test, sketch = self.test.double(), self.sketch.double() / count
        mean = (self.squares.double() / count).clamp_min(0)
        # A shift of the size of float32's rounding makes the core positive definite whatever the rows were.
        shift = torch.finfo(torch.float32).eps * mean.sum().clamp_min(torch.finfo(torch.float64).tiny)
        sketch = sketch + shift * test
        core = test.mT @ sketch
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        usable = values > shift * 1e-3
        factor = sketch @ (vectors[:, usable] / values[usable].sqrt())  # (n, ≤ m), C + shift ≈ F Fᵀ
        left, sizes, _ = torch.linalg.svd(factor, full_matrices=False)
        kept = (sizes[: self.rank].square() - shift).clamp_min(0)
        basis = left[:, : self.rank].mT * kept.sqrt()[:, None]
        if basis.shape[0] < self.rank:
            basis = torch.cat([basis, basis.new_zeros(self.rank - basis.shape[0], basis.shape[1])])
        diagonal = (mean - basis.square().sum(0)).clamp_min(0)
        return SecondMoment(basis.float(), diagonal.float())
