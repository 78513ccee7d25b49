"""The settings of a comparison."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dynalora.errors import ConfigError
from dynalora.jobs.compare.contestants import BASE, Contestant
from dynalora.lab.baselines import label_of
from dynalora.lab.lab_settings import LabSettings
from dynalora.lab.precision import check_quantization
from dynalora.lab.settings import coerce, did_you_mean, named_source, named_values
from dynalora.lab.training.settings import TrainSettings
from dynalora.methods import method_names as own_methods

_OF_A_VARIANT = (
    "method", "r", "alpha", "dropout", "target_modules", "learning_rates", "match", "quantization",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompareSpec(LabSettings, TrainSettings):
    """What `dynalora compare` does.

    Attributes:
        tasks: What to train on and to measure; see [`tasks`][dynalora.lab.tasks]. All of them take the same
            kind of model.
        output: The folder: new, or with cells of the same comparison.
        methods: Names of methods, PEFT's and `full` included, or files with PEFT configurations.
        variants: More to compare: label → settings with `method` and any of `r`, `alpha`, `dropout`,
            `target_modules`, `learning_rates`, `match` (whether its parameters are matched), `quantization` and fields
            of the method's configuration.
        reference: The label that all others are compared with.
        r: Rank of the reference, and of all where parameters are not matched.
        alpha: Updates are scaled by alpha / r; None: each method's default.
        dropout: On the adapter's input.
        target_modules: Names of the modules to adapt, a regular expression, or `all-linear`.
        quantization: `4bit` (NF4) or `8bit` base weights, with bitsandbytes, or `int8` ones, with torchao; None: as
            they are. What was forgotten is measured against a base model with these weights, also of variants with
            others.
        match_parameters: Choose each method's rank so that it trains as many parameters as the reference does.
        learning_rates: The grid; empty: `learning_rate` alone.
        steps: Optimizer steps of every run; None: as many as `epochs` needs.
        seeds: Number of runs per method; their seeds are `seed`, `seed` + 1, …
        all_rates: Run every seed at every learning rate, and not only at the chosen one.
        validation: Number of training questions that the learning rate is chosen on.
        retention: Measure what was forgotten, on text that the base model writes itself; causal models only.
        texts: Further text to measure that on, each as `NAME=SOURCE`.
        retention_tasks: Benchmarks that no model is trained for, measured on all models as `dynalora evaluate` does,
            to see what was kept; groups stand for their members. For classification `wikitext2_masked`: perplexity of
            the encoder under its original masked-LM head.
        retention_items: The first items of each of those; None: all.
        retention_shots: Examples before each question of those of lm-evaluation-harness; None: each task's own number.
        jobs: Cells at the same time; None: one per GPU, or one.
    """

    tasks: list[str]
    output: str
    methods: list[str] = field(default_factory=lambda: ["lora", *own_methods()])
    variants: dict[str, Any] = field(default_factory=dict)
    reference: str = "lora"
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    quantization: str | None = None
    match_parameters: bool = True
    learning_rates: list[float] = field(default_factory=list)
    steps: int | None = 100
    seeds: int = 3
    all_rates: bool = False
    validation: int = 100
    retention: bool = True
    texts: list[str] = field(default_factory=list)
    retention_tasks: list[str] = field(default_factory=list)
    retention_items: int | None = None
    retention_shots: int | None = None
    jobs: int | None = None

    def _check(self) -> None:
        super()._check()
        self._check_lab()
        if self.steps is not None and self.epochs != TrainSettings.epochs:
            raise ConfigError(
                f"steps is {self.steps} and epochs is {self.epochs:g}; give one of them, and steps as null to train "
                "for epochs."
            )
        for name in ("r", "seeds", "jobs", "retention_items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a whole number of at least 1.")
        for name in ("tasks", "methods"):
            listed = getattr(self, name)
            if not listed and not (name == "methods" and self.variants):
                raise ConfigError(f"{name} is empty; name at least one.")
            if len(set(listed)) < len(listed):
                raise ConfigError(f"{name} names one twice: {', '.join(listed)}.")
        if self.validation < 1 and self.chooses:
            raise ConfigError(
                f"validation is {self.validation}, and there are several learning rates to choose from; set some "
                "training questions aside, or run them all with all_rates."
            )
        check_quantization(self.quantization)
        if len({named_source(text, "texts")[0] for text in self.texts}) < len(self.texts):
            raise ConfigError(f"texts uses a name twice: {', '.join(self.texts)}.")
        self.contestants()

    @property
    def chooses(self) -> bool:
        """Whether some learning rate is chosen on the questions set aside."""
        given = [len(own.get("learning_rates") or self.rates) for own in self._variants().values()]
        return not self.all_rates and max([len(self.rates), *given]) > 1

    @property
    def rates(self) -> list[float]:
        """The grid of learning rates."""
        return self.learning_rates or [self.learning_rate]

    @property
    def run_seeds(self) -> list[int]:
        """The seeds of the runs."""
        return list(range(self.seed, self.seed + self.seeds))

    def settings(self) -> dict[str, Any]:
        """What `config.yaml` holds."""
        own = list(CompareSpec.__annotations__)
        names = [item.name for item in fields(self)]
        return {name: getattr(self, name) for name in [*own, *(name for name in names if name not in own)]}

    def _variants(self) -> dict[str, dict[str, Any]]:
        found = {}
        for label, told in self.variants.items():
            if not isinstance(told, Mapping) or "method" not in told:
                raise ConfigError(f"The variant '{label}' does not say its method; give it as method: NAME.")
            found[str(label)] = dict(told)
        return found

    def contestants(self) -> list[Contestant]:
        """What is compared, the reference first.

        Raises:
            ConfigError: An unknown method or setting, a label that is used twice or is no file name, or a reference
                that is not among them.
        """
        given = {label_of(name): {"method": name} for name in self.methods}
        for label, values in self._variants().items():
            if label in given:
                raise ConfigError(
                    f"'{label}' is the name of a method and of a variant; call the variant otherwise."
                )
            given[label] = values
        found = []
        for label, values in given.items():
            told: dict[str, Any] = dict(values)
            if label == BASE or not re.fullmatch(r"[\w.+\-]+", label) or re.search(r"_(r|lr|seed)\d", label):
                raise ConfigError(
                    f"The label '{label}' becomes a file name; use letters, digits, '-', '+' and '.', and not '{BASE}'."
                )
            options = {name: value for name, value in told.items() if name not in _OF_A_VARIANT}
            rates = coerce(
                told.get("learning_rates") or self.rates, list[float], f"learning_rates of '{label}'"
            )
            if any(not (math.isfinite(rate) and rate > 0) for rate in rates):
                raise ConfigError(f"The learning rates of '{label}' are {rates}; give numbers above 0.")
            own = Contestant(
                label=label,
                method=str(told["method"]),
                r=int(told.get("r", self.r)),
                alpha=told.get("alpha", self.alpha),
                dropout=float(told.get("dropout", self.dropout)),
                target_modules=told.get("target_modules", self.target_modules),
                quantization=told.get("quantization", self.quantization),
                options=options,
                learning_rates=tuple(sorted(set(rates))),
                # A rank that is given is meant.
                matches=bool(told.get("match", self.match_parameters and "r" not in told)),
            )
            # A wrong setting is told at once.
            check_quantization(own.quantization)
            if own.config("CAUSAL_LM") is None and own.quantization is not None:
                raise ConfigError(
                    f"'{label}' trains all weights, and quantised ones cannot be trained; give it quantization: null."
                )
            found.append(own)
        labels = [own.label for own in found]
        if self.reference not in labels:
            raise ConfigError(
                f"The reference '{self.reference}' is not among what is compared; "
                f"{did_you_mean(self.reference, labels)}."
            )
        return sorted(found, key=lambda own: own.label != self.reference)


def variant_from(text: str) -> tuple[str, dict[str, Any]]:
    """`LABEL=METHOD,NAME=VALUE,…` as label and settings; several learning rates are parted by `/`.

    Raises:
        ConfigError: It is not of that form.
    """
    label, sign, rest = text.partition("=")
    method, *pairs = [part.strip() for part in rest.split(",")]
    if not (sign and label.strip() and method) or "=" in method:
        raise ConfigError(f"The variant '{text}' is not of the form LABEL=METHOD,NAME=VALUE,….")
    told = named_values(pair for pair in pairs if pair)
    if "learning_rates" in told:
        told["learning_rates"] = str(told["learning_rates"]).split("/")
    return label.strip(), {"method": method, **told}
