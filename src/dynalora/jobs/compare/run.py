"""Methods against each other: methods × learning rates × seeds × tasks, as cells that are run once each.

A cell is one training run with its measurements. It runs in a process of its own, so that its peak memory is its own
and a crash is its own, and leaves one file, all at once. Any number of `dynalora compare` may work on the same folder
at the same time, on one machine or on several that share it: each takes cells that no other has taken.

The learning rate is chosen for each method and task from the same grid: the first seed runs at all rates, the lowest
loss on questions that were set aside of the training ones wins, and the other seeds run at that rate only. Held-out
questions are never chosen on.

Layout of the folder::

    config.yaml                                the settings of whoever came last
    cells/arc_easy/dira_r16_lr0.0005_seed42.json   everything that was measured
    cells/….json.lock                          taken by a process that lives
    logs/….log                                 what the cell said
    cells.csv, results.csv, results.json, results.md, results.tex, report.html, plots/
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import yaml

from dynalora.common.files import write_file
from dynalora.common.progress import rich_progress
from dynalora.errors import ConfigError, DynaloraError, RunFolderError
from dynalora.evaluation.run import Prepared, model_kind, prepare, task_list
from dynalora.evaluation.seq2seq import is_encoder_decoder
from dynalora.jobs.finetune import (
    check_quantization,
    check_targets,
    compared_config,
    empty_model,
    local_model_name,
    quantization_config,
    resolve_dtype,
)
from dynalora.lab.baselines import label_of, prompt_only
from dynalora.lab.lab import LabSettings, read_result
from dynalora.lab.run_folder import CONFIG
from dynalora.lab.settings import (
    coerce,
    defaults_of,
    did_you_mean,
    named_source,
    named_values,
    read_yaml,
)
from dynalora.lab.tasks import ExperimentTask
from dynalora.lab.training import TrainSettings
from dynalora.methods import method_names as own_methods

if TYPE_CHECKING:
    from peft import PeftConfig
    from rich.console import Console
    from torch import nn

BASE = "base"
"""The label of the untouched model."""

CELLS = "cells"
_OF_A_VARIANT = (
    "method", "r", "alpha", "dropout", "target_modules", "learning_rates", "match", "quantization",
)  # fmt: skip
_GROWS = (
    "tasks", "output", "methods", "variants", "reference", "learning_rates", "learning_rate", "seeds", "all_rates",
    "jobs", "threads",
)  # fmt: skip
"""Settings that may differ between calls on the same folder: what more to run, and how many at once."""
SEQ2SEQ = "SEQ_2_SEQ_LM"
QUESTION_ANSWERING = "QUESTION_ANS"
TAKEN = 75
"""Exit status of a cell that another process has taken."""


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


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A method with the settings of its adapter.

    Attributes:
        label: For tables, plots and file names.
        method: Its name; `base`: nothing is trained.
        r: Its rank.
        alpha: None: the method's default.
        dropout: On the adapter's input.
        target_modules: Which modules it adapts.
        quantization: How the base weights are held; None: as they are.
        options: Further fields of its configuration.
    """

    label: str
    method: str
    r: int = 0
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    quantization: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, task_type: str) -> PeftConfig | None:
        """The adapter's configuration; None for full fine-tuning.

        Raises:
            ConfigError: The method or one of its settings.
        """
        return compared_config(
            self.method, r=self.r, alpha=self.alpha, dropout=self.dropout, target_modules=self.target_modules,
            options=self.options, task_type=task_type,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Contestant(Setup):
    """One method that is compared.

    Attributes:
        learning_rates: Rising.
        matches: Whether its rank is chosen by the number of parameters.
        parameters: Number of parameters that it trains; None: not counted yet.
        off: Their number relative to the reference's, minus 1.
    """

    learning_rates: tuple[float, ...]
    matches: bool
    parameters: int | None = None
    off: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cell(Setup):
    """One run: what its numbers depend on, besides the settings that all cells share.

    Attributes:
        task: As the settings name it.
        place: The task's name in file names.
        learning_rate: The peak.
        seed: Of the adapter's start, the order of the data and dropout.
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


def shared_settings(spec: CompareSpec) -> dict[str, Any]:
    """The settings that all cells of a folder have in common, as JSON holds them."""
    kept = {name: value for name, value in spec.settings().items() if name not in _GROWS}
    for name in ("r", "alpha", "dropout", "target_modules", "quantization", "match_parameters"):
        kept.pop(name)  # each cell says its own
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


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


# --- the folder -------------------------------------------------------------------------------------------------


class CellStore:
    """Where cells are kept and taken.

    Args:
        folder: The comparison's folder.
        shared: What all cells have in common.
    """

    def __init__(self, folder: str | os.PathLike[str], shared: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.shared = dict(shared)

    def file(self, cell: Cell) -> Path:
        """Where a cell's result is, or will be."""
        return self.folder / CELLS / f"{cell.name}.json"

    def log(self, cell: Cell) -> Path:
        """Where a cell says what it does."""
        return self.folder / "logs" / f"{cell.name}.log"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's result; None if it has not been run.

        Raises:
            RunFolderError: The file is damaged, or the cell was run with other settings.
        """
        file = self.file(cell)
        found = read_result(file)
        if found is None:
            return None
        wanted = {**self.shared, **json.loads(json.dumps(asdict(cell)))}
        there = {**defaults_of(CompareSpec), **found.get("settings", {}), **found.get("cell", {})}
        # The same files may lie elsewhere, as on another machine.
        differing = [
            f"{name} was {there.get(name)!r}, now {value!r}"
            for name, value in wanted.items()
            if there.get(name) != value and name not in ("task", "data", "model", "texts")
        ]
        if differing:
            raise RunFolderError(
                f"The cell '{file}' was run with other settings ({'; '.join(differing)}); take the same ones, choose "
                "another output folder, or delete the cell to run it anew."
            )
        return found

    def write(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Keep a cell's result, all of it or nothing."""
        content = {"settings": self.shared, "cell": asdict(cell), **result}
        write_file(self.file(cell), json.dumps(content) + "\n")

    def lock(self, cell: Cell) -> filelock.BaseFileLock:
        """A lock that belongs to whoever runs the cell, and to nobody once that process is dead."""
        file = self.file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(f"{file}.lock", timeout=0)

    def taken(self, cell: Cell) -> bool:
        """Whether a live process runs the cell."""
        lock = self.lock(cell)
        try:
            lock.acquire()
        except filelock.Timeout:
            return True
        lock.release()
        return False

    def check(self) -> None:
        """Make sure that the folder is new or holds cells of a comparison; changes nothing.

        Raises:
            RunFolderError: It is a file or holds something else.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise RunFolderError(f"The output '{self.folder}' is a file; choose another folder.")
        there = sorted(entry.name for entry in self.folder.iterdir()) if self.folder.exists() else []
        there = [name for name in there if not name.endswith((".tmp", ".lock"))]
        if there and not {CONFIG, CELLS} & set(there):
            raise RunFolderError(
                f"The folder '{self.folder}' is not empty and holds no comparison (found {', '.join(there[:3])}); "
                "choose another output folder."
            )
        if there and "tasks" not in (read_yaml(self.folder / CONFIG) if CONFIG in there else {"tasks": []}):
            raise RunFolderError(
                f"The folder '{self.folder}' holds another kind of run; choose another output folder."
            )

    def open(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, and write the settings of whoever came last.

        Raises:
            RunFolderError: As `check`, or it cannot be written.
        """
        self.check()
        try:
            (self.folder / CELLS).mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(json.loads(json.dumps(dict(settings))), sort_keys=False, allow_unicode=True)
            write_file(self.folder / CONFIG, text)
        except OSError as error:
            raise RunFolderError(
                f"The folder '{self.folder}' cannot be written ({error.strerror or error}); choose another."
            ) from error


# --- the grid ---------------------------------------------------------------------------------------------------


class Grid:
    """Which cells there are, and which are to be run next.

    Args:
        spec: What is compared.
        contestants: With their ranks.
        places: Each task's name in file names.
        store: The cells' results.
    """

    def __init__(
        self,
        spec: CompareSpec,
        contestants: Sequence[Contestant],
        places: Mapping[str, str],
        store: CellStore,
    ) -> None:
        self.spec, self.contestants, self.places, self.store = spec, list(contestants), dict(places), store
        self._found: dict[str, dict[str, Any]] = {}

    @property
    def total(self) -> int:
        """Number of cells in all."""
        runs = 0
        for own in self.contestants:
            rates, seeds = len(own.learning_rates), self.spec.seeds
            runs += rates * seeds if self.spec.all_rates else rates + seeds - 1
        return len(self.places) * (1 + runs)

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's result, read once."""
        if cell.name not in self._found:
            found = self.store.read(cell)
            if found is None:
                return None
            self._found[cell.name] = found
        return self._found[cell.name]

    def cell(self, task: str, own: Contestant, rate: float, seed: int) -> Cell:
        """One cell of a contestant."""
        setup = {item.name: getattr(own, item.name) for item in fields(Setup)}
        return Cell(task=task, place=self.places[task], learning_rate=rate, seed=seed, **setup)

    def base(self, task: str) -> Cell:
        """The untouched model on a task."""
        return Cell(
            task=task, place=self.places[task], label=BASE, method=BASE, quantization=self.spec.quantization
        )

    def tried(self, task: str, own: Contestant) -> list[Cell]:
        """The cells that the learning rate is chosen from."""
        return [self.cell(task, own, rate, self.spec.seed) for rate in own.learning_rates]

    def chosen_rate(self, task: str, own: Contestant) -> float | None:
        """The learning rate of the lowest loss on the questions set aside; None: not all have been tried."""
        if len(own.learning_rates) == 1:
            return own.learning_rates[0]
        losses = {}
        for cell in self.tried(task, own):
            found = self.result(cell)
            if found is None:
                return None
            loss = (found.get("validation") or {}).get("loss")
            losses[cell.learning_rate] = math.inf if loss is None else float(loss)
        return min(losses, key=lambda rate: (losses[rate], rate))

    def known(self) -> Iterator[Cell]:
        """All cells that can be named now; more come to be known as learning rates are chosen.

        Ordered so that what others wait for comes first, and one seed of everything before the next.
        """
        spec = self.spec
        for task in self.places:
            yield self.base(task)
        for task in self.places:
            for own in self.contestants:
                yield from self.tried(task, own)
        for seed in spec.run_seeds[1:]:
            for task in self.places:
                for own in self.contestants:
                    if spec.all_rates:
                        yield from (self.cell(task, own, rate, seed) for rate in own.learning_rates)
                    elif (rate := self.chosen_rate(task, own)) is not None:
                        yield self.cell(task, own, rate, seed)

    def open_cells(self) -> list[Cell]:
        """Known cells without a result."""
        return [cell for cell in self.known() if self.result(cell) is None]

    def done(self) -> int:
        """Number of cells with a result."""
        return sum(self.result(cell) is not None for cell in self.known())


# --- planning ---------------------------------------------------------------------------------------------------


def plan(
    spec: CompareSpec, tasks: Mapping[str, ExperimentTask], *, model: nn.Module | None = None
) -> list[Contestant]:
    """The contestants with their ranks and numbers of parameters.

    Args:
        spec: What is compared.
        tasks: By their source; all with the same head.
        model: The base model, on the meta device; None: made from the settings.

    Raises:
        ConfigError: Target modules that do not exist, or tasks of both kinds.
    """
    from dynalora.lab.budgets import match_parameters, trainable_parameters

    heads = {task.head for task in tasks.values()}
    if len(heads) > 1:
        raise ConfigError(
            "Some tasks take another kind of model (classification, the marking of answers, and all others each have "
            "one); compare them one after the other, each with its model."
        )
    first = next(iter(tasks.values()))
    if model is None:
        model = empty_model(local_model_name(spec.model), head=first.head, labels=first.labels)
    task_type = task_type_of(model, first.head)
    contestants = spec.contestants()
    if task_type == SEQ2SEQ:
        _check_seq2seq(spec, tasks.values())
    if task_type in (SEQ2SEQ, QUESTION_ANSWERING):
        _check_prompts(contestants, task_type)
    _check_kept(spec, task_type)
    for own in contestants:
        config = own.config(task_type)
        if getattr(config, "target_modules", None) is not None:
            assert config is not None
            check_targets(model, config)
    counted: list[Contestant] = []
    aim = trainable_parameters(model, contestants[0].config(task_type))
    for own in contestants:
        config = own.config(task_type)
        found = trainable_parameters(model, config)
        # Virtual tokens enough to match would be thousands.
        fixed = config is None or prompt_only(config) or own.label == spec.reference
        if own.matches and not fixed and found != aim:

            def make(r: int, pattern: dict[str, int] | None, own: Contestant = own) -> PeftConfig:
                options = {**own.options, **({"rank_pattern": pattern} if pattern else {})}
                made = replace(own, r=r, options=options).config(task_type)
                assert made is not None
                return made

            matched = match_parameters(make, model, aim)
            patterns = {
                name: dict(pattern)
                for name in ("rank_pattern", "alpha_pattern")
                if matched.mixed and (pattern := getattr(matched.config, name, None))
            }
            own = replace(own, r=matched.r, options={**own.options, **patterns})
            found = matched.parameters
        counted.append(replace(own, parameters=found, off=found / aim - 1))
    return counted


def task_type_of(model: nn.Module, head: str) -> str:
    """PEFT's name for what a model does, with the head that a task asks for."""
    if head == "text":
        return SEQ2SEQ if is_encoder_decoder(model) else "CAUSAL_LM"
    return {"classes": "SEQ_CLS", "spans": QUESTION_ANSWERING}[head]


def _check_seq2seq(spec: CompareSpec, tasks: Iterable[ExperimentTask]) -> None:
    """Refuse what an encoder-decoder cannot do."""
    for task in tasks:
        if task.causal:
            raise ConfigError(
                f"The model '{spec.model}' is an encoder-decoder, and {task.name} needs a causal language model "
                "(options are compared by likelihood, or code is continued); take another model, or for multiple "
                "choice by_generation (--by-generation)."
            )
    if spec.template != "chat":
        raise ConfigError(
            f"The model '{spec.model}' is an encoder-decoder, which has no prompt template; leave out template "
            f"'{spec.template}'."
        )


def _check_prompts(contestants: Sequence[Contestant], task_type: str) -> None:
    """Refuse virtual tokens where they cannot be measured."""
    kind = {SEQ2SEQ: "encoder-decoders", QUESTION_ANSWERING: "models that mark answers"}[task_type]
    for own in contestants:
        config = own.config(task_type)
        if config is not None and prompt_only(config):
            raise ConfigError(
                f"{own.label} learns virtual tokens, which are not measured with {kind} here; leave it out."
            )


def task_places(tasks: Mapping[str, ExperimentTask]) -> dict[str, str]:
    """Each task's name in file names: its own, made fit for a file and unique."""
    found: dict[str, str] = {}
    for source, task in tasks.items():
        plain = re.sub(r"[^\w.\-]+", "-", task.name).strip("-") or "task"
        place, number = plain, 2
        while place in found.values():
            place, number = f"{plain}-{number}", number + 1
        found[source] = place
    return found


# --- running ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to.

    Attributes:
        grid: The cells with their results.
        tasks: By their source.
        failed: Cells that failed in this call, each with the last line it said.
    """

    grid: Grid
    tasks: Mapping[str, ExperimentTask]
    failed: tuple[tuple[Cell, str], ...]


def run_compare(
    spec: CompareSpec, *, console: Console | None = None, apart: bool = True, run: bool = True
) -> Comparison:
    """Run all cells that are missing, and write tables, plots and the report.

    Args:
        spec: What is compared.
        console: Where progress and the closing tables are shown; None: nowhere.
        apart: Run every cell in a process of its own. False: in this one, one after another; their peak memory is then
            this process's.
        run: False: run nothing, and write tables, plots and the report of the cells that are there.

    Returns:
        The cells with their results. One that failed does not stop the others.

    Raises:
        DynaloraError: Whatever is wrong with the settings, the tasks, the folder or the target modules, before
            anything is run; or nothing is to be run, and no cell is there.
    """
    from dynalora.jobs.compare.report import show_tables, write_results

    store = CellStore(spec.output, shared_settings(spec))
    store.check()
    tasks = {source: spec.load_task(source) for source in spec.tasks}
    for name in spec.texts:
        load_text(name)
    with rich_progress(console) as progress:
        local_model_name(spec.model, progress=progress)
    contestants = plan(spec, tasks)
    for held in {own.quantization for own in contestants} | {spec.quantization} if run else ():
        if held is not None:
            quantization_config(held, resolve_dtype(spec.dtype))  # its library is there
    grid = Grid(spec, contestants, task_places(tasks), store)
    # Cells with other settings are refused before anything is written.
    if not grid.done() and not run:
        raise ConfigError(f"No cell of '{spec.output}' has been run yet; call the command without --report.")
    store.open(spec.settings())
    if console is not None:
        from dynalora.jobs.compare.report import plan_table
        from dynalora.lab.report import rich_table

        console.print(rich_table(plan_table(contestants)))
    failed = (_Runner if apart else _Here)(grid, console).run() if run else []
    comparison = Comparison(grid, tasks, tuple(failed))
    report = write_results(comparison)
    if console is not None:
        show_tables(comparison, console)
        console.print(f"Report: {report}", highlight=False, markup=False)
    return comparison


def _check_kept(spec: CompareSpec, task_type: str) -> None:
    """Make sure that the tasks that show what was kept are there, and fit the models."""
    kinds, wanted = {
        "SEQ_CLS": (("masked",), "masked-LM perplexity (wikitext2_masked)"),
        QUESTION_ANSWERING: (("masked",), "masked-LM perplexity (wikitext2_masked)"),
        SEQ2SEQ: (("text",), "benchmarks that are answered by generation"),
    }.get(task_type, (("lm", "text"), "tasks of language models"))
    for prepared in kept_tasks(spec):
        if model_kind(prepared)[0] not in kinds:
            raise ConfigError(
                f"retention_tasks names {prepared.task.name}, which the models of this comparison cannot do; name "
                f"{wanted}."
            )


def kept_tasks(spec: CompareSpec) -> list[Prepared]:
    """The tasks that show what was kept, with their items; none where the settings name none.

    Raises:
        ConfigError: There is no such task, or it would execute code that may not be.
        DataError: Its rows are missing or malformed.
        UnsupportedError: A package is missing, or generated code cannot be contained.
    """
    names = task_list(spec.retention_tasks) if spec.retention_tasks else []
    return [
        prepare(
            name,
            data=spec.data,
            limit=spec.retention_items,
            seed=spec.data_seed,
            run_code=spec.run_code,
            shots=spec.retention_shots,
        )
        for name in names
    ]


def load_text(text: str) -> tuple[str, list[str]]:
    """The name and the texts of `NAME=SOURCE`."""
    from dynalora.jobs.finetune import MONITORED_TEXTS
    from dynalora.lab import data

    name, source = named_source(text, "texts")
    return name, data.load_texts(source, limit=MONITORED_TEXTS)


class _Runner:
    """Runs the grid's open cells, each in a process of its own, several at a time."""

    def __init__(self, grid: Grid, console: Console | None) -> None:
        self.grid, self.console = grid, console
        self.jobs = grid.spec.jobs or max(1, len(_devices()))
        self.failed: list[tuple[Cell, str]] = []
        self._running: dict[str, tuple[Cell, subprocess.Popen[bytes], int]] = {}
        self._seconds: list[float] = []

    def run(self) -> list[tuple[Cell, str]]:
        """Run until nothing is left; returns the cells that failed, each with why."""
        live = self.console is not None and self.console.is_terminal
        with (
            self.console.status("Starting …")
            if self.console is not None and live
            else nullcontext() as status
        ):
            try:
                while self._go_on():
                    if status is not None:
                        status.update(self._now())
                    # Without a cell of its own, all that is left is run by others.
                    time.sleep(1.0 if self._running else 2.0)
            finally:
                for _, process, _ in self._running.values():
                    process.terminate()
                for _, process, _ in self._running.values():
                    process.wait()
        return self.failed

    def _go_on(self) -> bool:
        """Take what has ended, start what there is room for; returns whether anything is left."""
        self._collect()
        self._start()
        return bool(self._running or self._wanted())

    def _now(self) -> str:
        """What the running cells say at this moment."""
        from rich.markup import escape

        if not self._running:
            return "Other processes run what is left …"
        said = [
            f"{cell.title}: {_last_line(self.grid.store.log(cell))}" for cell, _, _ in self._running.values()
        ]
        return escape("\n".join(said))

    def _wanted(self) -> list[Cell]:
        gone = {cell.name for cell, _ in self.failed} | set(self._running)
        return [cell for cell in self.grid.open_cells() if cell.name not in gone]

    def _start(self) -> None:
        for cell in self._wanted() if len(self._running) < self.jobs else ():
            if len(self._running) >= self.jobs:
                break
            if self.grid.store.taken(cell):
                continue
            slot = min(set(range(self.jobs)) - {slot for _, _, slot in self._running.values()})
            self._running[cell.name] = (cell, self._process(cell, slot), slot)
            self._say(f"{cell.title}: started")

    def _process(self, cell: Cell, slot: int) -> subprocess.Popen[bytes]:
        log = self.grid.store.log(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "dynalora.cli.cell", json.dumps(self.grid.spec.settings()),
            json.dumps(asdict(cell)),
        ]  # fmt: skip
        environment = dict(os.environ)
        if devices := _devices():
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        with open(log, "wb") as said:
            return subprocess.Popen(
                command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )

    def _collect(self) -> None:
        for name, (cell, process, _) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[name]
            found = self.grid.result(cell)
            if found is not None:
                self._finished(cell, found)
            elif code != TAKEN:
                log = self.grid.store.log(cell)
                self._failed(cell, f"{_last_line(log) or f'exit status {code}'} (all of it: {log})")

    def _finished(self, cell: Cell, found: Mapping[str, Any]) -> None:
        self._seconds.append(found.get("seconds", 0.0))
        self._say(f"{cell.title}: {told(found)}{self._left()}")

    def _failed(self, cell: Cell, why: str) -> None:
        self.failed.append((cell, why))
        self._say(f"{cell.title}: failed: {why}", style="red")

    def _left(self) -> str:
        """How long the rest will take, from the cells so far."""
        left = self.grid.total - self.grid.done() - len(self.failed)
        if left <= 0 or not self._seconds:
            return ""
        seconds = left * sum(self._seconds) / len(self._seconds) / self.jobs
        return f" (about {duration(seconds)} left)"

    def _say(self, line: str, style: str | None = None) -> None:
        if self.console is not None:
            head = f"[{self.grid.done()}/{self.grid.total}] "
            self.console.print(head + line, highlight=False, markup=False, style=style, soft_wrap=True)


class _Here(_Runner):
    """Runs the cells in this process."""

    def run(self) -> list[tuple[Cell, str]]:
        from dynalora.jobs.compare.cell import run_cell

        while waiting := self._wanted():
            cell = waiting[0]
            self._say(f"{cell.title}: started")
            try:
                found = run_cell(self.grid.spec, cell, console=self.console)
            except filelock.Timeout:
                time.sleep(2.0)
            except DynaloraError as error:
                self._failed(cell, str(error))
            except Exception as error:  # no cell may take the others with it
                self._failed(cell, f"{type(error).__name__}: {error}")
            else:
                self._finished(cell, found)
        return self.failed


def duration(seconds: float) -> str:
    """A time in words, in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def told(found: Mapping[str, Any]) -> str:
    """A cell's result in a line."""
    score = found["test"]
    parts = [] if score["accuracy"] is None else [f"accuracy {100 * score['accuracy']:.1f} %"]
    parts.append(f"loss {score['loss']:.4f}")
    parts += [f"KL {name} {kept['kl']:.4f}" for name, kept in (found.get("retention") or {}).items()]
    return f"{', '.join(parts)}, {duration(found.get('seconds', 0.0))}"


def _devices() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named and count else [str(index) for index in range(count)]


def _last_line(log: Path) -> str:
    """What a log says last; only its end is read, since a live display asks again and again."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""
