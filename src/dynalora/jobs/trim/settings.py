"""Settings of `dynalora trim`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from dynalora.errors import ConfigError
from dynalora.forgetting.defaults import OWN_TEXT, TRIM_FACTORS
from dynalora.lab.choices import DTYPES, QUANTIZATIONS
from dynalora.lab.settings import Setting, Settings, named_source


@dataclass(frozen=True, kw_only=True)
class TrimSpec(Settings):
    """Which adapter to scale down, how far, and where to write it.

    Attributes:
        adapter: Scale this adapter down: a run folder, an adapter folder, or an id on the Hugging Face Hub.
        output: Write the new adapter into this folder, which must be new or empty.
        max_kl: Allow at most so much forgetting on each text: KL(base ‖ tuned) in nats per token. Give this or factor.
        factor: Multiply the update by this factor, instead of taking the largest within a bound.
        texts: Keep this text within the bound, too, besides the base model's own; give the flag again for more.
        factors: Measure the curve at these factors.
        model: Load this base model; None: the one the adapter names.
        dtype: Load the base model's weights with this data type; None: as the run had them, else auto.
        quantization: Hold the base weights in fewer bits; None: as the run had them.
        loss: Measure the held-out loss along the curve, of a run of `dynalora finetune`.
    """

    adapter: Annotated[str, Setting(positional=True, metavar="RUN", home=True)]
    output: Annotated[str, Setting(positional=True, metavar="OUTPUT", writes="folder")]
    max_kl: Annotated[float | None, Setting(above=0)] = None
    factor: Annotated[float | None, Setting(above=0, most=1)] = None
    texts: Annotated[list[str], Setting(name="--text", metavar="NAME=SOURCE")] = field(default_factory=list)
    factors: Annotated[list[float], Setting(commas=True, above=0, most=1)] = field(
        default_factory=lambda: list(TRIM_FACTORS)
    )
    model: Annotated[str | None, Setting("-m", home=True)] = None
    dtype: Annotated[str | None, Setting(choices=DTYPES)] = None
    quantization: Annotated[str | None, Setting(choices=tuple(QUANTIZATIONS))] = None
    loss: bool = True

    def _check(self) -> None:
        super()._check()
        if (self.max_kl is None) == (self.factor is None):
            raise ConfigError(
                "An update is scaled down to a bound or to a factor; give one of max_kl (such as 0.05) and `factor`."
            )
        names = [named_source(text, "texts")[0] for text in self.texts]
        if len({OWN_TEXT, *names}) < len(names) + 1:
            raise ConfigError(f"texts uses a name twice: {', '.join([OWN_TEXT, *names])}.")
