"""What is compared and what is run: methods with their settings, and the cells of the grid."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig


BASE = "base"
"""The label of the untouched model."""
_OF_A_SAVED_ADAPTER = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A method with the settings of its adapter.

    Attributes:
        label: Name in tables, plots and file names.
        method: Name of the method, or `base` where nothing is trained.
        r: Rank.
        alpha: The update is scaled by alpha / r; None: the method's default.
        dropout: Dropout on the adapter's input, in [0, 1).
        target_modules: Modules that are adapted.
        quantization: How the base weights are held; None: as they are.
        weight_decay: Weight decay of AdamW.
        options: Further fields of the method's configuration.
    """

    label: str
    method: str
    r: int = 0
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    quantization: str | None = None
    weight_decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, task_type: str) -> PeftConfig | None:
        """The adapter's configuration; None for full fine-tuning.

        Raises:
            ConfigError: The method or one of its settings.
        """
        from dynalora.lab.configs import compared_config  # loads PEFT, which `--help` does without

        return compared_config(
            self.method, r=self.r, alpha=self.alpha, dropout=self.dropout, target_modules=self.target_modules,
            options=self.options, task_type=task_type,
        )  # fmt: skip

    def configuration(self) -> dict[str, Any] | None:
        """All fields of the adapter's configuration, defaults included, as JSON holds them.

        What belongs to a saved adapter and not to the method is left out. None: nothing is adapted.
        """
        config = None if self.method == BASE else self.config("CAUSAL_LM")
        if config is None:
            return None
        values = {name: value for name, value in config.to_dict().items() if name not in _OF_A_SAVED_ADAPTER}
        plain: dict[str, Any] = json.loads(json.dumps(values, default=_jsonable))
        return plain


@dataclass(frozen=True, kw_only=True)
class Contestant(Setup):
    """One method that is compared.

    Attributes:
        learning_rates: Learning rates to choose from, in rising order.
        matches: Whether the rank is chosen so that it trains as many parameters as the reference.
        parameters: Number of trained parameters; None: not counted yet.
        off: Number of trained parameters divided by the reference's, minus 1.
    """

    learning_rates: tuple[float, ...]
    matches: bool
    parameters: int | None = None
    off: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cell(Setup):
    """One run: what its numbers depend on, besides the settings that all cells share.

    Attributes:
        task: Source of the task, as the settings name it.
        place: Name of the task in file names.
        learning_rate: Peak of the learning rate.
        seed: Seed of the adapter's start, of the data's order and of dropout.
    """

    task: str
    place: str
    learning_rate: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        """The cell's place in the folder, without its ending."""
        if self.method == BASE:
            return f"{self.place}/{BASE}"
        return f"{self.place}/{self.label}_r{self.r}_lr{self.learning_rate:g}_seed{self.seed}"

    @property
    def title(self) -> str:
        """The cell in words."""
        if self.method == BASE:
            return f"{self.place}: base model"
        return f"{self.place}: {self.label}, lr {self.learning_rate:g}, seed {self.seed}"


def _jsonable(value: Any) -> Any:
    """What JSON does not know, in its terms: sets as sorted lists, all else as text."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
