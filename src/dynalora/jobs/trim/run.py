"""`dynalora trim`: a trained adapter's update scaled down until it forgets no more than is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from dynalora.common.files import folder_beside, records_csv, write_file
from dynalora.common.progress import Progress, rich_progress
from dynalora.drawing.retention import plot_scaled_update
from dynalora.drawing.style import rendered
from dynalora.errors import DataError
from dynalora.evaluation.tokens import TokenizedSet, tokenize
from dynalora.evaluation.windows import within_window
from dynalora.forgetting.defaults import OWN_TEXT
from dynalora.forgetting.texts import MeasuredText, own_text
from dynalora.forgetting.trim import TrimPoint, scale_update, trim, trim_curve
from dynalora.jobs.finetune.prepare import training_and_held_out
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.jobs.finetune.trained import run_of
from dynalora.jobs.trim.settings import TrimSpec
from dynalora.lab.adapters import load_adapter, read_config
from dynalora.lab.data.conversations import load_named_text, measured_text
from dynalora.lab.models import load_tokenizer
from dynalora.lab.report import say
from dynalora.lab.scaling import curve_table
from dynalora.lab.training.train import held_out_loss


def run_trim(spec: TrimSpec, *, console: Console) -> None:
    """Write the scaled adapter with its curve, and show the curve.

    Raises:
        DynaloraError: The adapter, its base model, a text, or an output folder that holds something.
    """
    output = Path(spec.output)
    passages = dict(load_named_text(text, "texts") for text in spec.texts)
    run = run_of(spec.adapter)
    base = spec.model or str(read_config(spec.adapter).base_model_name_or_path)
    model = load_adapter(
        spec.adapter,
        spec.model,
        dtype=spec.dtype or (run.dtype if run is not None else "auto"),
        quantization=spec.quantization or (run.quantization if run is not None else None),
    )
    tokenizer = load_tokenizer(base, template="chat" if run is None else run.template)
    loss = _loss(spec, run, model, tokenizer, console)
    with rich_progress(console) as progress:
        texts: dict[str, MeasuredText] = {OWN_TEXT: own_text(model, tokenizer, progress=progress)}
        texts |= {name: measured_text(content, tokenizer) for name, content in passages.items()}
        factor, curves = _scale_down(spec, model, texts, loss, progress)
    with folder_beside(output, replace=False) as folder:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        _write_curves(folder, spec, factor, curves)
    say(
        console,
        curve_table(curves, factor),
        f"{output}: the adapter with {factor:.3g} of its update"
        + ("." if spec.max_kl is None else f", at most {spec.max_kl:g} nats per token from the base model."),
        f"Measure it: dynalora evaluate {output} --task TASK",
    )


def _scale_down(
    spec: TrimSpec,
    model: PeftModel,
    texts: Mapping[str, MeasuredText],
    loss: Callable[[], float] | None,
    progress: Progress,
) -> tuple[float, dict[str, list[TrimPoint]]]:
    """Scale an adapter's update to the factor, or until no text's KL is above the bound; the model is changed.

    Returns:
        The factor, and each text's curve over factors of the update as it was; the first one has the loss.
    """
    curves: dict[str, list[TrimPoint]] = {}
    if spec.factor is not None:
        factors = sorted({1.0, spec.factor, *spec.factors}, reverse=True)
        for name, text in texts.items():
            curves[name] = trim_curve(model, text, loss=None if curves else loss, factors=factors, progress=progress)
        scale_update(model, spec.factor)
        return spec.factor, curves
    assert spec.max_kl is not None  # checked with the settings
    factor = 1.0
    for name, text in texts.items():
        # Each text goes on from the factor that the texts before it have left.
        result = trim(
            model, text, max_kl=spec.max_kl, loss=None if curves else loss, factors=spec.factors, progress=progress
        )
        curves[name] = [replace(point, factor=factor * point.factor) for point in result.points]
        factor *= result.factor
    return factor, curves


def _loss(
    spec: TrimSpec, run: FinetuneSpec | None, model: PeftModel, tokenizer: PreTrainedTokenizerBase, console: Console
) -> Callable[[], float] | None:
    """What measures the loss on the run's held-out data; None where there are none."""
    if not spec.loss or run is None:
        return None
    try:
        _, conversations = training_and_held_out(run)
    except DataError as error:
        say(console, f"The held-out loss is not measured, because the run's data cannot be read: {error}")
        return None
    if not conversations:
        return None
    longest = within_window(run.max_length, model, tokenizer)
    rows: TokenizedSet = tokenize(conversations, tokenizer, max_length=longest)
    return partial(held_out_loss, model, rows, batch_size=run.batch_size)


def _write_curves(folder: Path, spec: TrimSpec, factor: float, curves: Mapping[str, list[TrimPoint]]) -> None:
    """The curve as `trim.json`, `trim.csv` and `trim.png` beside the adapter."""
    records: list[dict[str, Any]] = [
        {"text": name, **asdict(point)} for name, points in curves.items() for point in points
    ]
    content = {"adapter": spec.adapter, "max_kl": spec.max_kl, "factor": factor, "points": records}
    write_file(folder / "trim.json", json.dumps(content, indent=1) + "\n")
    write_file(folder / "trim.csv", records_csv(records))
    write_file(folder / "trim.png", rendered(plot_scaled_update(curves, taken=factor, max_kl=spec.max_kl)))
