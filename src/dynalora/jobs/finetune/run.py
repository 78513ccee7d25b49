"""Fine-tune a user's own model on the user's own data: the job behind `dynalora finetune`.

Everything that can be wrong with the settings, the data, the run folder or the target modules is found before the
model's weights are loaded.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from rich.console import Console

from dynalora.common.processes import process_count
from dynalora.common.progress import counted, rich_progress
from dynalora.errors import ConfigError, DataError, UnsupportedError
from dynalora.forgetting.monitor import RetentionMonitor
from dynalora.forgetting.retention import Retention, retention
from dynalora.forgetting.texts import own_text
from dynalora.forgetting.trim import TrimPoint, trim_curve, update_scaled
from dynalora.jobs.finetune.dry_run import dry_run
from dynalora.jobs.finetune.prepare import Prepared, prepare
from dynalora.jobs.finetune.report import write_results
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.answers import answers_to
from dynalora.lab.baselines import edits_base
from dynalora.lab.choices import label_of
from dynalora.lab.configs import title_of
from dynalora.lab.distance import Continued, continued, openings
from dynalora.lab.models import load_model
from dynalora.lab.report import say
from dynalora.lab.run_folder import RETENTION, RunFolder
from dynalora.lab.settings import defaults_of
from dynalora.lab.training.best import KeepBest
from dynalora.lab.training.checkpoints import save_adapter
from dynalora.lab.training.train import TrainResult, held_out_loss, train_adapter

_SAMPLE_TOKENS = 64
"""Longest sample answer."""

_OFTEN = 20
"""Passes over the training data that are told beforehand: few runs want as many."""

_FACTORS = (0.7, 0.5, 0.35, 0.25)
"""Factors of the update in the report, besides 1: few, since each costs a measurement of the held-out data."""


def run_finetune(spec: FinetuneSpec, *, console: Console | None = None) -> None:
    """Do the whole job, or with `dry_run` say what it takes."""
    if spec.dry_run:
        dry_run(spec, console=console)
    else:
        finetune(spec, console=console)


def finetune(spec: FinetuneSpec, *, console: Console | None = None) -> TrainResult:
    """Do the whole job: check, load, train, measure, write the run folder.

    Returns:
        The trained model with its measurements; everything is also in the run folder.

    Raises:
        DynaloraError: As [`prepare`][dynalora.jobs.finetune.prepare.prepare], before any weights are loaded.
    """
    # Set by torchrun, accelerate and deepspeed before the first line of Python runs.
    main = int(os.environ.get("RANK", "0")) == 0
    console = console if main else None
    ready = prepare(spec, main_process=main)
    spec = ready.spec
    with RunFolder.create(
        spec.output, spec.settings(), resume=spec.resume, defaults=defaults_of(type(spec)), main_process=main
    ) as run:
        if ready.rate:
            say(console, ready.rate)
        say(
            console,
            f"{len(ready.training):,} training and {len(ready.held_out):,} held-out conversations, "
            f"{ready.training.response_tokens:,} tokens to learn from{_passes(spec, ready)}. Loading {spec.model} …",
        )
        model = load_model(
            ready.model, dtype=spec.dtype, quantization=spec.quantization, trust_remote_code=spec.trust_remote_code
        )  # fmt: skip
        monitor = _monitor(spec, ready, run)
        training = _with_as_many_rows(spec, run, console)
        result = train_adapter(
            model, ready.tokenizer, ready.config, ready.training, ready.held_out, settings=training,
            run=run,
            label=label_of(spec.method), console=console, monitor=monitor,
            best=KeepBest(by_held_out=True) if spec.keep_best and spec.max_forgetting is None else None,
        )  # fmt: skip
        if main:
            save_adapter(result.model, ready.tokenizer, run)
        # By all processes: what is measured is shared among them.
        measured = _measured_retention(ready, result, run, console)
        curve = _scaled_down(ready, result, measured, run, console)
        samples = _samples(ready, result, run, console)
        begun, distances = _continued(ready, result, measured, curve, run, console)
        if main:
            write_results(ready, result, measured, run, console, monitor, curve, samples, begun, distances)
            run.finish()
            # The adapter is saved; optimizer states are of no more use and larger than everything else.
            shutil.rmtree(run.checkpoints, ignore_errors=True)
    return result


def _passes(spec: FinetuneSpec, ready: Prepared) -> str:
    """How often so many steps come past each row, where that is often and was not asked for in so many words."""
    if spec.steps is None:
        return ""
    rows = spec.steps * spec.batch_size * spec.gradient_accumulation * process_count()
    passes = rows / max(len(ready.training), 1)
    return f", {passes:,.0f} times in {spec.steps:,} steps" if passes >= _OFTEN else ""


def _with_as_many_rows(spec: FinetuneSpec, run: RunFolder, console: Console | None) -> FinetuneSpec:
    """A resumed run's settings with which another number of processes makes the same steps of the same rows.

    Raises:
        ConfigError: That number of processes cannot.
    """
    now, before = process_count(), run.status().get("processes") if run.resumed else None
    if not isinstance(before, int) or before == now:
        return spec
    micro = spec.gradient_accumulation * before
    if micro % now:
        raise ConfigError(
            f"The run in '{run.path}' was begun by {before} processes, which took {micro} batches of {spec.batch_size} "
            f"rows at a step; {now} cannot share them evenly, so resume it with a number that divides {micro}."
        )
    say(
        console,
        f"Begun by {before} processes, and now {now}: each takes {micro // now} batches of {spec.batch_size} rows at a "
        "step, so that steps stay what they were.",
    )
    return replace(spec, gradient_accumulation=micro // now)


def _monitor(spec: FinetuneSpec, ready: Prepared, run: RunFolder) -> RetentionMonitor | None:
    if not spec.monitored or edits_base(spec.method, ready.config):
        return None
    return RetentionMonitor(
        ready.texts,
        tokenizer=ready.tokenizer,
        every=spec.monitor_every or 0.1,
        max_forgetting=spec.max_forgetting,
        keep_best=spec.keep_best and spec.max_forgetting is not None,
        name=label_of(spec.method),
        path=run.path / RETENTION,
    )


def _measured_retention(
    ready: Prepared, result: TrainResult, run: RunFolder, console: Console | None
) -> Retention | None:
    """KL from the base model and loss shift, on text that the base model itself writes; None: not measured."""
    spec = ready.spec
    if not spec.retention:
        return None
    if edits_base(spec.method, ready.config):
        say(
            console,
            f"{title_of(label_of(spec.method))} changes the base weights, so disabling it does not tell what was "
            "forgotten; retention is left out.",
        )
        return None
    with rich_progress(console) as progress:
        text = own_text(result.model, ready.tokenizer, progress=progress)
        measured = retention(result.model, text, progress=progress)
    run.log({"run": result.label, "step": result.steps, "retention": asdict(measured)})
    return measured


def _samples(ready: Prepared, result: TrainResult, run: RunFolder, console: Console | None) -> list[dict[str, Any]]:
    """Held-out prompts with their right answers and what the model says before and after training."""
    if not ready.samples:
        return []
    ask: dict[str, Any] = {"max_new_tokens": _SAMPLE_TOKENS, "batch_size": ready.spec.batch_size}
    try:
        with rich_progress(console) as progress:
            after = answers_to(ready.samples, result.model, ready.tokenizer, progress=progress, **ask)
            before: list[str] | None = None
            if not edits_base(ready.spec.method, ready.config):
                before = answers_to(ready.samples, result.model, ready.tokenizer, base=True, progress=progress, **ask)
    except DataError:
        return []  # the model has no room for an answer after its question
    shown = []
    for index, prompt in enumerate(ready.samples):
        asked = "\n\n".join(turn["content"] for turn in prompt.conversation)
        said = {"before": before[index]} if before is not None else {}
        shown.append({"prompt": asked, "response": prompt.response, **said, "after": after[index]})
    run.log({"run": result.label, "step": result.steps, "samples": shown})
    return shown


def _scaled_down(
    ready: Prepared, result: TrainResult, measured: Retention | None, run: RunFolder, console: Console | None
) -> list[TrimPoint]:
    """Held-out loss and KL over factors of the update, as trained first; empty: not measured."""
    after = result.held_out_after
    if not ready.spec.scaled or measured is None or after is None:
        return []
    loss = partial(held_out_loss, result.model, ready.held_out, batch_size=ready.spec.batch_size)
    try:
        with rich_progress(console) as progress:
            text = own_text(result.model, ready.tokenizer, progress=progress)
            points = trim_curve(result.model, text, loss=loss, factors=_FACTORS, progress=progress)
    except UnsupportedError:
        return []  # virtual tokens, and updates of PEFT's that cannot be scaled
    curve = [TrimPoint(1.0, measured.kl, measured.kl_error, after), *points]
    run.log({"run": result.label, "step": result.steps, "scaled": [asdict(point) for point in curve]})
    return curve


def _continued(
    ready: Prepared,
    result: TrainResult,
    measured: Retention | None,
    curve: list[TrimPoint],
    run: RunFolder,
    console: Console | None,
) -> tuple[list[str], list[Continued]]:
    """Openings, and how the base model and the adapter go on with them at every factor that was measured."""
    if measured is None or not ready.samples:
        return [], []
    with rich_progress(console) as progress:
        text = own_text(result.model, ready.tokenizer, progress=progress)
        go_on = partial(continued, result.model, ready.tokenizer, text)
        shown = [Continued("base model", 0.0, go_on(base=True)), Continued("as trained", measured.kl, go_on())]
        factors = [point for point in curve if point.factor != 1]
        for point in counted(factors, "Going on with openings", progress):
            with update_scaled(result.model, point.factor):
                shown.append(Continued(f"{point.factor:g} of the update", point.kl, go_on()))
    run.log({"run": result.label, "step": result.steps, "continued": [asdict(each) for each in shown]})
    return openings(text, ready.tokenizer), shown
