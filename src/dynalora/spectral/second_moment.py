"""Second moments of vectors, E[x xᵀ], as low rank plus diagonal, from rows that are seen once.

A sketch Y = C·Ω with a random Ω (n × m) is added up while the rows come by; at the end

    C ≈ Y (Ωᵀ Y)⁺ Yᵀ = F Fᵀ                          (Nyström; Tropp et al. 2017, Algorithm 3, with a small shift)

is cut to its k largest eigenvalues, and what is missing on the diagonal, which is never negative, is put there. So the
trace is exact, and memory is n × m numbers instead of n × n.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

OVERSAMPLING = 16
"""Columns of the sketch beyond the rank that is kept."""


@dataclass(eq=False)
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


class StackedMoments:
    """Many moments whose forms are computed together, in one place of memory for each shape.

    The moments' own tensors become views of that place, so that nothing is held twice and nothing is copied again.

    Args:
        moments: The moments, each of them once.
        places: For each moment the device and the precision in which it is held and its forms are wanted.
    """

    def __init__(self, moments: Sequence[SecondMoment], places: Sequence[tuple[torch.device, torch.dtype]]) -> None:
        groups: dict[tuple[torch.Size, torch.device, torch.dtype], list[int]] = defaultdict(list)
        for index, (moment, place) in enumerate(zip(moments, places, strict=True)):
            groups[moment.basis.shape, place[0], place[1]].append(index)
        self._stacks: list[tuple[list[int], SecondMoment]] = []
        for (_, device, dtype), members in groups.items():
            stack = SecondMoment(
                torch.stack([moments[index].basis.to(device, dtype) for index in members]),
                torch.stack([moments[index].diagonal.to(device, dtype) for index in members]),
            )
            for place_in_stack, index in enumerate(members):
                moments[index].basis = stack.basis[place_in_stack]
                moments[index].diagonal = stack.diagonal[place_in_stack]
            self._stacks.append((members, stack))

    def forms(self, rows: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """`rows · C · rowsᵀ` for every matrix of rows.

        Args:
            rows: For each moment the matrices to take it with, (r, n) each, of any r.

        Returns:
            The forms in the same places, (r, r) each.
        """
        results: list[list[torch.Tensor]] = [[] for _ in rows]
        for members, stack in self._stacks:
            blocks = [_together([matrix.to(stack.basis.dtype) for matrix in rows[index]]) for index in members]
            height = max(block.shape[0] for block in blocks)
            # Blocks of fewer rows are filled up with zeros, which change no other row's products.
            equal = [
                block if len(block) == height else F.pad(block, (0, 0, 0, height - len(block))) for block in blocks
            ]
            forms = stack.form(torch.stack(equal))
            for index, form in zip(members, forms.unbind(), strict=True):
                end = 0
                for matrix in rows[index]:
                    start, end = end, end + matrix.shape[0]
                    results[index].append(form[start:end, start:end])
        return results


def _together(matrices: list[torch.Tensor]) -> torch.Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


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
        with torch.autocast(rows.device.type, enabled=False):  # the sums stay in float32
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
