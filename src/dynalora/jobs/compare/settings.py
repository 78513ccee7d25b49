"""The settings of a comparison."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from dynalora.common.names import did_you_mean
from dynalora.errors import ConfigError
from dynalora.jobs.compare.contestants import BASE, Contestant
from dynalora.lab.choices import KEEP_BEST, QUANTIZATIONS, check_quantization, compared_names, label_of, own_methods
from dynalora.lab.lab_settings import MEASURING, MODEL_AND_DATA, RUN, AdapterSettings, LabSettings
from dynalora.lab.settings import Setting, coerce, named_source, named_values
from dynalora.lab.training.settings import BestSettings, OptimizerSettings

_COMPARED = "What is compared"
_OF_A_VARIANT = (
    "method", "r", "alpha", "dropout", "target_modules", "learning_rates", "match", "quantization",
    "weight_decay",
)  # fmt: skip
CHOICES = ("as-trained", "best-factor")
FURTHER = "further-task"
"""Choose the best weights by the first of the further tasks."""


def _variants(texts: list[str]) -> dict[str, dict[str, Any]]:
    return dict(variant_from(text) for text in texts)


@dataclass(frozen=True, kw_only=True)
class CompareSpec(AdapterSettings, LabSettings, OptimizerSettings, BestSettings, panel=_COMPARED):
    """What is compared, how it is trained, and what is measured.

    Attributes:
        tasks: Train and measure on these tasks, with commas: benchmarks by name, or files of prompts and responses,
            such as rows.jsonl. All of them take the same kind of model. See [`tasks`][dynalora.lab.tasks].
        output: Write the comparison into this folder, which is new or holds cells of the same comparison.
        methods: Compare these methods: dynalora's and PEFT's by name, full fine-tuning as full, or files with PEFT
            configurations.
        variants: Compare a method with settings of its own, too; give the flag again for more. Label → settings with
            `method` and any of `r`, `alpha`, `dropout`, `target_modules`, `learning_rates`, `match` (whether its
            parameters are matched), `quantization`, `weight_decay` and fields of the method's configuration.
        reference: Compare all others with the method or variant of this label.
        r: Give the reference this rank, and all others, too, where parameters are not matched.
        quantization: Hold the base weights in fewer bits, with bitsandbytes (4bit is NF4) or torchao (int8); None: as
            they are. What was forgotten is measured against a base model with these weights, also of variants with
            others.
        match_parameters: Choose each method's rank so that it trains as many parameters as the reference does.
        learning_rates: Try each of these learning rates, and choose the best for every method and task; empty:
            `--learning-rate` alone.
        epochs: Go through the training data this many times, where steps is null, which a settings file can say.
        seeds: Run every method with this many seeds: `seed`, `seed` + 1 and so on.
        all_rates: Run every seed at every learning rate, and not only at the chosen one.
        validation: Set this many training questions aside, on which the learning rate, and with keep_best the weights,
            are chosen.
        keep_best: End with the best of the weights that are measured during training, instead of the last: those of the
            lowest loss or the highest accuracy on the training questions set aside (`validation`), of the highest
            accuracy on the held-out ones, or of the best number on the first of further_tasks; the last two then no
            longer judge alone. None: the last.
        factors: Measure loss and KL of each run with its update multiplied by these factors, too; empty: only as
            trained. For causal models with retention.
        choose: Choose a learning rate by the loss as-trained, or by the lowest loss over the factors, at the
            best-factor; both are measured on the questions set aside.
        retention: Measure what was forgotten, on text that the base model writes itself. Causal models only.
        texts: Measure what was forgotten on this text, too; give the flag again for more.
        retention_tasks: Measure all models on these benchmarks, too, which no model is trained for, to see what was
            kept. Groups stand for their members. For classification `wikitext2_masked` is the perplexity of the encoder
            under its original masked-LM head.
        retention_items: Use only this many items of each retention task, from the first; None: all.
        retention_shots: Show this many examples before each question, for retention tasks of lm-evaluation-harness;
            None: each task's own number.
        retention_max_length: Cut the input of lm-evaluation-harness's tasks to this many tokens; None: what the model
            takes.
        further_tasks: Measure all models on these benchmarks besides the retention tasks; they do not count as what was
            kept. An example is `lm_eval:gsm8k`, the trained task asked with examples. Each has its own number of
            examples.
        over_time: Measure the held-out questions, the retention tasks and the further ones during training, too, every
            `measure_every` steps (under bf16 in bfloat16), for a plot over the steps.
        mask_layers: Measure the held-out questions also with the ranks of one layer masked to zero, layer by layer
            (PE-DyRA, Figure 1b).
        jobs: Run this many cells at the same time; None: one per GPU, or one.
        report: Run nothing, and write tables, plots and the report of the cells that are there; with `--output` alone
            the settings are those in the folder. Neither data nor model are needed.
    """

    unused: ClassVar[Mapping[str, Any]] = {"eval_every": None, "save_every": None, "log_every": None}

    tasks: Annotated[list[str], Setting(commas=True)]
    output: Annotated[str, Setting("-o", home=True)]
    methods: Annotated[list[str], Setting(commas=True, suggested=compared_names)] = field(
        default_factory=lambda: ["lora", *own_methods()]
    )
    variants: Annotated[
        dict[str, Any], Setting(name="--variant", metavar="LABEL=METHOD,NAME=VALUE,…", parse=_variants, merge=True)
    ] = field(default_factory=dict)
    reference: str = "lora"
    quantization: Annotated[str | None, Setting(choices=tuple(QUANTIZATIONS), panel=MODEL_AND_DATA)] = None
    match_parameters: Annotated[bool, Setting(negative="--same-rank")] = True
    learning_rates: Annotated[list[float], Setting("--lrs", commas=True, above=0)] = field(default_factory=list)
    steps: int | None = 100
    epochs: Annotated[float, Setting(above=0, panel="Training", instead_of="steps")] = 1.0
    seeds: Annotated[int, Setting(least=1)] = 3
    all_rates: Annotated[bool, Setting(negative="--chosen-rate")] = False
    validation: Annotated[int, Setting(least=0, panel=MEASURING)] = 100
    keep_best: Annotated[str | None, Setting(choices=(*KEEP_BEST, FURTHER))] = None
    factors: Annotated[list[float], Setting(commas=True, panel=MEASURING)] = field(
        default_factory=lambda: [1.0, 0.7, 0.5, 0.35, 0.25]
    )
    choose: Annotated[str, Setting(choices=CHOICES, panel=MEASURING)] = "as-trained"
    retention: Annotated[bool, Setting(panel=MEASURING)] = True
    texts: Annotated[list[str], Setting(name="--text", metavar="NAME=SOURCE", panel=MEASURING)] = field(
        default_factory=list
    )
    retention_tasks: Annotated[list[str], Setting(commas=True, panel=MEASURING)] = field(default_factory=list)
    retention_items: Annotated[int | None, Setting(least=1, panel=MEASURING)] = None
    retention_shots: Annotated[int | None, Setting(least=0, panel=MEASURING)] = None
    retention_max_length: Annotated[int | None, Setting(least=1, panel=MEASURING)] = None
    further_tasks: Annotated[list[str], Setting(commas=True, panel=MEASURING)] = field(default_factory=list)
    over_time: Annotated[bool, Setting(panel=MEASURING)] = False
    mask_layers: Annotated[bool, Setting(panel=MEASURING)] = False
    jobs: Annotated[int | None, Setting("-j", least=1, panel=RUN)] = None
    report: Annotated[bool, Setting(panel=RUN, recorded=False, of_folder=True)] = False

    def _check(self) -> None:
        super()._check()
        if self.steps is not None and self.epochs != CompareSpec.epochs:
            raise ConfigError(
                f"steps is {self.steps} and epochs is {self.epochs:g}; give one of them, and steps as null to train "
                "for epochs."
            )
        for name in ("tasks", "methods"):
            listed = getattr(self, name)
            if not listed and not (name == "methods" and self.variants):
                raise ConfigError(f"{name} is empty; name at least one.")
        if self.validation < 1 and self.chooses:
            raise ConfigError(
                f"validation is {self.validation}, and there are several learning rates to choose from; set some "
                "training questions aside, or run them all with all_rates."
            )
        if len({named_source(text, "texts")[0] for text in self.texts}) < len(self.texts):
            raise ConfigError(f"texts uses a name twice: {', '.join(self.texts)}.")
        if self.keep_best == FURTHER and not self.further_tasks:
            raise ConfigError(f"keep_best is '{FURTHER}', and further_tasks names none; name one.")
        if any(not 0 < factor <= 1 for factor in self.factors):
            raise ConfigError(f"factors is {self.factors}; give numbers above 0 (the base model) up to 1 (as trained).")
        self.contestants()

    @property
    def chooses(self) -> bool:
        """Whether some learning rate is chosen on the questions set aside."""
        counts = [len(values.get("learning_rates") or self.rates) for values in self._variants().values()]
        return not self.all_rates and max([len(self.rates), *counts]) > 1

    @property
    def rates(self) -> list[float]:
        """The grid of learning rates."""
        return self.learning_rates or [self.learning_rate]

    @property
    def run_seeds(self) -> list[int]:
        """The seeds of the runs."""
        return list(range(self.seed, self.seed + self.seeds))

    def _variants(self) -> dict[str, dict[str, Any]]:
        for label, values in self.variants.items():
            if not isinstance(values, Mapping) or "method" not in values:
                raise ConfigError(f"The variant '{label}' does not say its method; give it as method: NAME.")
        return {str(label): dict(values) for label, values in self.variants.items()}

    def contestants(self) -> list[Contestant]:
        """What is compared, the reference first.

        Raises:
            ConfigError: An unknown method or setting, a label that is used twice or is no file name, or a reference
                that is not among them.
        """
        compared: dict[str, dict[str, Any]] = {label_of(name): {"method": name} for name in self.methods}
        for label, values in self._variants().items():
            if label in compared:
                raise ConfigError(f"'{label}' is the name of a method and of a variant; call the variant otherwise.")
            compared[label] = values
        contestants = [self._contestant(label, values) for label, values in compared.items()]
        if self.reference not in compared:
            raise ConfigError(
                f"The reference '{self.reference}' is not among what is compared; "
                f"{did_you_mean(self.reference, compared)}."
            )
        return sorted(contestants, key=lambda contestant: contestant.label != self.reference)

    def _contestant(self, label: str, values: Mapping[str, Any]) -> Contestant:
        """What is compared under one label, checked.

        Args:
            label: For tables, plots and file names.
            values: The method, and what it has other than the settings say.
        """
        if label == BASE or not re.fullmatch(r"[\w.+\-]+", label) or re.search(r"_(r|lr|seed)\d", label):
            raise ConfigError(
                f"The label '{label}' becomes a file name; use letters, digits, '-', '+' and '.', and not '{BASE}'."
            )
        rates = coerce(values.get("learning_rates") or self.rates, list[float], f"learning_rates of '{label}'")
        if any(not (math.isfinite(rate) and rate > 0) for rate in rates):
            raise ConfigError(f"The learning rates of '{label}' are {rates}; give numbers above 0.")
        contestant = Contestant(
            label=label,
            method=str(values["method"]),
            r=int(values.get("r", self.r)),
            alpha=values.get("alpha", self.alpha),
            dropout=float(values.get("dropout", self.dropout)),
            target_modules=values.get("target_modules", self.target_modules),
            quantization=values.get("quantization", self.quantization),
            weight_decay=float(values.get("weight_decay", self.weight_decay)),
            options={name: value for name, value in values.items() if name not in _OF_A_VARIANT},
            learning_rates=tuple(sorted(set(rates))),
            # A variant that names its rank has that rank.
            matches=bool(values.get("match", self.match_parameters and "r" not in values)),
        )
        check_quantization(contestant.quantization)
        # Making the configuration checks the method and its options before anything runs.
        if contestant.config("CAUSAL_LM") is None and contestant.quantization is not None:
            raise ConfigError(
                f"'{label}' trains all weights, and quantised ones cannot be trained; give it quantization: null."
            )
        return contestant


def variant_from(text: str) -> tuple[str, dict[str, Any]]:
    """`LABEL=METHOD,NAME=VALUE,…` as label and settings; several learning rates are parted by `/`.

    Raises:
        ConfigError: It is not of that form.
    """
    label, sign, rest = text.partition("=")
    method, *pairs = [part.strip() for part in rest.split(",")]
    if not (sign and label.strip() and method) or "=" in method:
        raise ConfigError(f"The variant '{text}' is not of the form LABEL=METHOD,NAME=VALUE,….")
    values = named_values(pair for pair in pairs if pair)
    if "learning_rates" in values:
        values["learning_rates"] = str(values["learning_rates"]).split("/")
    return label.strip(), {"method": method, **values}
