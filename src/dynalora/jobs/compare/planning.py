"""Checks of a comparison before anything runs: tasks, target modules, and ranks that match parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dynalora.errors import ConfigError
from dynalora.evaluation.heads import CAUSAL_LM, LANGUAGE_MODELS, MASKED_LM, Head, common_heads, head_of
from dynalora.evaluation.kinds.base import Prepared
from dynalora.evaluation.run import check_harness, prepare, task_list
from dynalora.jobs.compare.contestants import Contestant
from dynalora.jobs.compare.settings import CompareSpec
from dynalora.lab.baselines import prompt_only
from dynalora.lab.budgets import match_parameters, trainable_parameters
from dynalora.lab.configs import check_targets
from dynalora.lab.models import empty_model, local_model_name
from dynalora.lab.tasks.task import ExperimentTask

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


def plan(spec: CompareSpec, tasks: Mapping[str, ExperimentTask], *, model: nn.Module | None = None) -> list[Contestant]:
    """The contestants with their ranks and numbers of parameters.

    Args:
        spec: What is compared.
        tasks: By their source; all with the same head.
        model: The base model, on the meta device; None: made from the settings.

    Raises:
        ConfigError: Target modules that do not exist, or tasks of both kinds.
    """
    common = common_heads([task.heads for task in tasks.values()])
    if not common:
        raise ConfigError(
            "Some tasks take another kind of model (classification, the marking of answers, and all others each have "
            "one); compare them one after the other, each with its model."
        )
    # Both kinds of language models, so that an encoder-decoder is refused by the name of the task it cannot do.
    heads = LANGUAGE_MODELS if CAUSAL_LM in common else common
    if model is None:
        labels = next(iter(tasks.values())).labels
        model = empty_model(local_model_name(spec.model), heads=heads, labels=labels)
    head = head_of(model.config, heads)
    assert head is not None  # it was made as one of them
    task_type = head.task_type
    contestants = spec.contestants()
    if head.encoder_decoder:
        _check_encoder_decoder(spec, head, tasks.values())
    if not head.learns_prompts:
        _check_prompts(contestants, head)
    _check_kept(spec, head)
    for contestant in contestants:
        config = contestant.config(task_type)
        if config is not None and getattr(config, "target_modules", None) is not None:
            check_targets(model, config)
    target = trainable_parameters(model, contestants[0].config(task_type))
    return [_sized(contestant, model, target, task_type) for contestant in contestants]


def _sized(contestant: Contestant, model: nn.Module, target: int, task_type: str) -> Contestant:
    """A contestant with its number of parameters, and where it is matched with the rank at which it trains `target`."""
    config = contestant.config(task_type)
    parameters = trainable_parameters(model, config)
    # Virtual tokens enough to match would be thousands; the reference itself has the target already.
    resizable = config is not None and not prompt_only(config)
    if contestant.matches and resizable and parameters != target:

        def make(r: int, pattern: dict[str, int] | None) -> PeftConfig:
            options = {**contestant.options, **({"rank_pattern": pattern} if pattern else {})}
            config = replace(contestant, r=r, options=options).config(task_type)
            assert config is not None
            return config

        matched = match_parameters(make, model, target)
        patterns = {
            name: dict(pattern)
            for name in ("rank_pattern", "alpha_pattern")
            if matched.mixed and (pattern := getattr(matched.config, name, None))
        }
        contestant = replace(contestant, r=matched.r, options={**contestant.options, **patterns})
        parameters = matched.parameters
    return replace(contestant, parameters=parameters, off=parameters / target - 1)


def _check_encoder_decoder(spec: CompareSpec, head: Head, tasks: Iterable[ExperimentTask]) -> None:
    """Refuse what an encoder-decoder cannot do."""
    for task in tasks:
        if head not in task.heads:
            raise ConfigError(
                f"The model '{spec.model}' is an encoder-decoder, and {task.name} needs a causal language model "
                "(options are compared by likelihood, or code is continued); take another model, or for multiple "
                "choice by_generation (--by-generation)."
            )
    if spec.template != "chat":
        raise ConfigError(
            f"The model '{spec.model}' is an encoder-decoder, which has no prompt template; leave out `template` "
            f"'{spec.template}'."
        )


def _check_prompts(contestants: Sequence[Contestant], head: Head) -> None:
    """Refuse virtual tokens where they cannot be measured."""
    for contestant in contestants:
        config = contestant.config(head.task_type)
        if config is not None and prompt_only(config):
            raise ConfigError(
                f"{contestant.label} learns virtual tokens, which are not measured with {head.plural} here; leave it "
                "out."
            )


def _check_kept(spec: CompareSpec, head: Head) -> None:
    """Make sure that the tasks that show what was kept are there, and fit the models."""
    measured = MASKED_LM if head.new else head  # a new head is taken off again
    for prepared in kept_tasks(spec):
        if measured not in prepared.task.kind.heads:
            raise ConfigError(
                f"{'further' if prepared.task.name in spec.further_tasks else 'retention'}_tasks names "
                f"{prepared.task.name}, which the models of this comparison cannot do; name "
                f"{head.retained}."
            )


def kept_tasks(spec: CompareSpec) -> list[Prepared]:
    """The tasks that show what was kept, and the further ones, with their items; none where the settings name none.

    Raises:
        ConfigError: There is no such task, or it would execute code that may not be.
        DataError: Its rows are missing or malformed.
        UnsupportedError: A package is missing, or generated code cannot be contained.
    """
    names, further = (task_list(named) if named else [] for named in (spec.retention_tasks, spec.further_tasks))
    twice = sorted(set(names).intersection(further))
    if twice:
        raise ConfigError(f"retention_tasks and further_tasks both name {', '.join(twice)}; name it once.")
    check_harness([*names, *further])
    return [
        prepare(
            name,
            data=spec.data,
            limit=spec.retention_items,
            seed=spec.data_seed,
            run_code=spec.run_code,
            shots=spec.retention_shots if name in names else None,
            max_length=spec.retention_max_length,
        )
        for name in [*names, *further]
    ]


def task_places(tasks: Mapping[str, ExperimentTask]) -> dict[str, str]:
    """Each task's name in file names: its own, made fit for a file and unique."""
    places: dict[str, str] = {}
    for source, task in tasks.items():
        plain = re.sub(r"[^\w.\-]+", "-", task.name).strip("-") or "task"
        place, number = plain, 2
        while place in places.values():
            place, number = f"{plain}-{number}", number + 1
        places[source] = place
    return places
