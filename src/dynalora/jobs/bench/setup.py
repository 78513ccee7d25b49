"""What both benchmarks share: one base model for all methods, tokens, clocks and ratios."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import peft
import torch
from peft import PeftModel
from torch import nn

from dynalora.common.progress import Progress, counted
from dynalora.jobs.bench.settings import BenchSpec
from dynalora.lab.baselines import BASELINES
from dynalora.lab.configs import adapter_config, check_targets
from dynalora.lab.machine import machine
from dynalora.lab.models import empty_model, load_model, local_model_name
from dynalora.lab.report import Cell, Table

CONTROL = "lora (again)"

T = TypeVar("T")


class _Result(Protocol):
    @property
    def dtype(self) -> str: ...


R = TypeVar("R", bound=_Result)


def now(device: torch.device) -> float:
    """The time in seconds once a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with modules of its own but the very same weights: it costs next to no memory."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def random_tokens(vocabulary: int, spec: BenchSpec, round_number: int) -> torch.Tensor:
    """Tokens of one round, (batch_size, length), the same whatever the method and device."""
    generator = torch.Generator().manual_seed(spec.seed * 100_003 + round_number)
    return torch.randint(0, vocabulary, (spec.batch_size, spec.length), generator=generator)


def start(spec: BenchSpec, progress: Progress) -> str:
    """Set the threads, and check the model and the target modules before weights are loaded.

    Returns:
        What to load the model from.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    name = local_model_name(spec.model, progress=progress)
    skeleton = empty_model(name)
    check_targets(skeleton, adapter_config(spec.reference, r=spec.r, target_modules=spec.target_modules))
    return name


def frozen_base(spec: BenchSpec, name: str, dtype: str) -> Any:
    """The base model that all methods share."""
    base: Any = load_model(name, dtype=dtype).to(spec.torch_device)  # type: ignore[arg-type]
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base


def entries(spec: BenchSpec) -> list[tuple[str, str]]:
    """Label and method of every contender; with `control` the reference stands last once more."""
    control = [(CONTROL, spec.reference)] if spec.control else []
    return [(method, method) for method in spec.methods] + control


def adapted(method: str, base: nn.Module, spec: BenchSpec, total_steps: int) -> PeftModel:
    """A method's model on the shared base weights."""
    torch.manual_seed(spec.seed)
    baseline = BASELINES.get(method)
    options = {} if baseline is not None else {"total_steps": total_steps}
    alpha = None if baseline is not None and baseline.alpha is None else 2.0 * spec.r
    config = adapter_config(method, r=spec.r, alpha=alpha, target_modules=spec.target_modules, options=options)
    return cast("PeftModel", peft.get_peft_model(cast(Any, sharing_copy(base)), config))


def in_turns(
    spec: BenchSpec, base: Any, methods: Sequence[T], what: str, progress: Progress
) -> Iterator[tuple[T, torch.Tensor, bool]]:
    """Let every method take its turn in every round.

    Yields:
        A method, the round's tokens (batch_size, length), and whether this turn counts, which those of the warm-up
        do not.
    """
    for number in counted(range(spec.warmup + spec.rounds), what, progress):
        tokens = random_tokens(int(base.config.vocab_size), spec, number).to(spec.torch_device)
        # Each round begins with another method: whoever follows finds caches as its predecessor left them.
        first = number % len(methods)
        for method in [*methods[first:], *methods[:first]]:
            yield method, tokens, number >= spec.warmup


def ratios(times: Sequence[float], reference: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles over the rounds of one time over another, within each round."""
    values = [time / other for time, other in zip(times, reference, strict=True)]
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return statistics.median(values), (low, high)


def ratio_text(median: float, quartiles: tuple[float, float]) -> str:
    """A ratio with its quartiles, for tables."""
    low, high = quartiles
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


def tables_by_dtype(
    spec: BenchSpec,
    results: Sequence[R],
    columns: Sequence[str],
    cells: Callable[[R], list[Cell]],
    title: str,
    note: str,
) -> list[Table]:
    """A table per dtype with a row per result; model, dtype, rank and target modules stand for `{}` in the title."""
    targets = spec.target_modules if isinstance(spec.target_modules, str) else ", ".join(spec.target_modules)
    return [
        Table(
            columns,
            [cells(item) for item in results if item.dtype == dtype],
            title=title.format(f"{spec.model}, {dtype}, r = {spec.r}, {targets}"),
            note=f"Medians of {spec.rounds} rounds in turns on shared base weights; ratio: median of the rounds' "
            f"ratios, with quartiles. {note}",
        )
        for dtype in spec.dtypes
    ]


def with_machine(spec: BenchSpec, rows: list[dict[str, Any]]) -> str:
    """Results as JSON, with the settings and the machine."""
    measured_on = machine()
    if spec.torch_device.type != "cuda":
        measured_on["device"] = "cpu"
    return json.dumps({"settings": spec.settings(), "machine": measured_on, "results": rows}, indent=2) + "\n"
