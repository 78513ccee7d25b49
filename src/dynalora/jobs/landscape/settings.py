"""Settings of `dynalora landscape`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from dynalora.errors import ConfigError
from dynalora.forgetting.defaults import QUANTITIES
from dynalora.lab.settings import PICTURES, Setting, Settings


def plot_files(plot: str) -> list[Path]:
    """All files that are drawn for one name, which is that of the first quantity's."""
    place = Path(plot)
    stems = [place, *(place.with_name(f"{place.stem}-{quantity}{place.suffix}") for quantity in QUANTITIES[1:])]
    return [stem.with_suffix(kind) for stem in stems for kind in (".png", ".svg")]


@dataclass(frozen=True, kw_only=True)
class LandscapeSpec(Settings):
    """Which adapters or models to look at, and what to make of them.

    Attributes:
        adapter: Show these adapters: run folders, adapter folders or Hub ids. With `--against` they are full models.
        model: Use this base model; None: the one the adapter names.
        against: Compare full models with this one, by the difference of their weights.
        modules: Take only the matrices of full models whose names match this regular expression; None: all.
        data: Measure the effect of the updates, and average the gates of gated adapters, on the responses of these
            conversations; None: the adapters' factors alone count, and all gates as open.
        split: Read this split of the data.
        limit: Use only this many rows of the data, from the first.
        max_length: Cut sequences after this many tokens.
        tau: Count singular values of the update that are above this threshold as effective rank.
        taus: Show the table of energy at these thresholds; empty: 0.01, 0.005, 0.001, 0.0005, 0.0001.
        plot: Draw a plot, layer by layer, into this file, and beside it an SVG.
        csv: Write a table with a line per matrix into this file.
        json: Write the same table with all singular values into this file.
    """

    adapter: Annotated[list[str] | str, Setting(positional=True, metavar="ADAPTER...", home=True)]
    model: Annotated[str | None, Setting("-m", home=True)] = None
    against: Annotated[str | None, Setting(metavar="MODEL", home=True)] = None
    modules: Annotated[str | None, Setting(metavar="REGEX")] = None
    data: Annotated[str | None, Setting("-d")] = None
    split: Annotated[str, Setting(only_with="data")] = "train"
    limit: Annotated[int, Setting(least=1, only_with="data")] = 64
    max_length: Annotated[int, Setting(least=2, only_with="data")] = 512
    tau: Annotated[float, Setting(least=0)] = 1e-3
    taus: Annotated[list[str], Setting(commas=True)] = field(default_factory=list)
    plot: Annotated[str | None, Setting(metavar="FILE.png", writes=plot_files, endings=PICTURES)] = None
    csv: Annotated[str | None, Setting(metavar="FILE", writes="file")] = None
    json: Annotated[str | None, Setting(metavar="FILE", writes="file")] = None

    def _check(self) -> None:
        super()._check()
        if self.against is not None and (self.data is not None or self.model is not None):
            raise ConfigError(
                "--against compares full models; --data and --model belong to adapters, so leave them out."
            )
        if self.against is None and self.modules is not None:
            raise ConfigError("--modules chooses matrices of full models; give --against, or leave it out.")
        _ = self.thresholds

    @property
    def sources(self) -> list[str]:
        """The adapters or models."""
        return [self.adapter] if isinstance(self.adapter, str) else list(self.adapter)

    @property
    def thresholds(self) -> list[float]:
        """The thresholds that were given for the energy table.

        Raises:
            ConfigError: One of them is no number.
        """
        try:
            return [float(text) for text in self.taus]
        except ValueError as error:
            raise ConfigError(f"taus must be numbers ({error}); write them with commas, such as 0.01,0.001.") from None
