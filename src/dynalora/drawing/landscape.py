"""The rank landscape, drawn over the layers (DiRA Figures 1, 2, 4–10)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynalora.drawing.style import panels, save, style
from dynalora.errors import ConfigError
from dynalora.forgetting.landscape import QUANTITIES, LandscapeRow, Quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LARGEST_CEILING = 512  # ranks of whole weights would press the curves onto the axis

_LABELS: dict[Quantity, str] = {
    "effective_rank": "effective rank",
    "nuclear_norm": "nuclear norm",
    "energy": "energy above τ",
}


def plot_rank_landscape(
    landscape: Sequence[LandscapeRow] | Mapping[str, Sequence[LandscapeRow]],
    path: str | os.PathLike[str] | None = None,
    quantity: Quantity = "effective_rank",
    title: str = "",
) -> Figure:
    """Draw the landscape over the layers, one panel per module kind, runs overlaid (DiRA Figures 1, 2, 4–10).

    Args:
        landscape: Result of `rank_landscape`, or several by name.
        path: PNG file to write, and beside it the SVG; None only returns the figure.
        quantity: What to draw: `effective_rank`, `nuclear_norm` or `energy`. A dotted line in the first is the
            rank that the adapters have.
        title: Of the figure; by default it says what is drawn.

    Returns:
        The matplotlib figure.

    Raises:
        ConfigError: The quantity is unknown, or there is nothing to draw.
    """
    if quantity not in QUANTITIES:
        raise ConfigError(f"quantity is {quantity!r}; choose one of {', '.join(QUANTITIES)}.")
    from matplotlib.ticker import MaxNLocator

    runs = landscape if isinstance(landscape, Mapping) else {"": landscape}
    kinds = list(dict.fromkeys(row.kind for rows in runs.values() for row in rows))
    if not kinds:
        raise ConfigError("There are no matrices to draw; take a landscape first.")
    figure, axes = panels(len(kinds), share_y=quantity != "nuclear_norm")
    ranked = quantity == "effective_rank"
    for axis, kind in zip(axes, kinds, strict=True):
        ceiling = 0
        for index, (name, rows) in enumerate(runs.items()):
            chosen = [row for row in rows if row.kind == kind]
            x = [row.layer if row.layer is not None else i for i, row in enumerate(chosen)]
            axis.plot(x, [getattr(row, quantity) for row in chosen], label=name, **style(index))
            ceiling = max(ceiling, *(row.rank for row in chosen), 0)
        if ranked and ceiling <= _LARGEST_CEILING:
            axis.axhline(ceiling, color="0.6", linestyle=":", linewidth=1)
        axis.set_title(kind, fontsize=9)
        axis.set_ylim(bottom=-0.5 if ranked else 0)
        axis.set_xlabel("layer", fontsize=8)
        axis.set_ylabel(_LABELS[quantity], fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # half layers there are none
    figure.suptitle(title or f"{_LABELS[quantity].capitalize()} of the weight updates, by layer", fontsize=10)
    if any(runs):
        axes[0].legend(fontsize=7, frameon=False)
    save(figure, path)
    return figure
