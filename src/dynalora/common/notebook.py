"""Results that a notebook shows as tables and pictures."""

from __future__ import annotations

import importlib


class Shown:
    """What a notebook shows of a result when a cell ends with it.

    How it looks is the affair of `dynalora.drawing.notebook`, which is loaded when a notebook asks for it, so that
    measuring needs nothing that draws.
    """

    def _repr_html_(self) -> str:
        """The result in HTML, for IPython, Jupyter and what is built on them."""
        page: str = importlib.import_module("dynalora.drawing.notebook").html_of(self)
        return page
