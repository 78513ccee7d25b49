"""Time and memory of training steps, method against method, in one process and in turns.

A machine's speed drifts: with its temperature, its neighbours and its memory. So the methods take turns, one step each
per round, and every ratio is taken within a round; its median and quartiles over the rounds are reported. All methods
share one copy of the base weights and differ in their adapters only. There is no pass or fail here: numbers only.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dynalora.common.progress import Progress, counted, silent
from dynalora.jobs.bench.settings import BenchSpec
from dynalora.jobs.bench.setup import (
    adapted,
    entries,
    frozen_base,
    in_turns,
    now,
    random_tokens,
    ratio_text,
    ratios,
    start,
    tables_by_dtype,
    with_machine,
)
from dynalora.lab.baselines import driver_of, optimizer_of
from dynalora.lab.machine import forget_peak, peak, resident
from dynalora.lab.report import Cell, Table
from dynalora.lab.settings import settings_from

logger = logging.getLogger(__name__)


PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Measured:
    """One method at one dtype.

    Attributes:
        method: Its name.
        dtype: Of the base weights.
        seconds: Per phase (`forward` with the loss; `backward`; `optimizer`: step, driver and clearing of the
            gradients) one time per round.
        ratio: Median over the rounds of this method's step time over the reference's in the same round.
        ratio_quartiles: Lower and upper quartile of the same.
        trainable_parameters: Number of trained parameters.
        saved_bytes: What the forward pass keeps for the backward pass, weights left out, each storage counted once.
        step_bytes: Peak memory of a step above what was held before it; None where it was not measured.
        peak_bytes: Peak memory of the process over the steps (CPU: resident set; CUDA: allocated), None likewise.
    """

    method: str
    dtype: str
    seconds: dict[str, list[float]]
    ratio: float
    ratio_quartiles: tuple[float, float]
    trainable_parameters: int
    saved_bytes: int
    step_bytes: int | None
    peak_bytes: int | None

    @property
    def steps(self) -> list[float]:
        """Whole step time of each round, in seconds."""
        return _whole_steps(self.seconds)

    def median(self, phase: str | None = None) -> float:
        """Median time of a phase, or of the whole step, in seconds."""
        return statistics.median(self.steps if phase is None else self.seconds[phase])


def _whole_steps(seconds: dict[str, list[float]]) -> list[float]:
    return [sum(times) for times in zip(*seconds.values(), strict=True)]


class _Contestant:
    """One method: its model on the shared base weights, and its optimizer."""

    def __init__(self, name: str, method: str, base: nn.Module, spec: BenchSpec) -> None:
        self.name = name
        steps = spec.run_steps or spec.measured_steps
        self.model = adapted(method, base, spec, steps)
        self.model.train()
        self.driver, self.steps_done = driver_of(self.model, steps), 0
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trainable = sum(parameter.numel() for parameter in trained)
        options: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0}
        self.optimizer = optimizer_of(self.model, torch.optim.AdamW, options) or torch.optim.AdamW(trained, **options)
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    @property
    def step_seconds(self) -> list[float]:
        """Time of each whole step."""
        return _whole_steps(self.seconds)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of a batch (batch_size, length)."""
        loss: torch.Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    def step(self, tokens: torch.Tensor, *, record: bool = True) -> None:
        """One training step, timed phase by phase."""
        marks = [now(tokens.device)]
        loss = self.loss(tokens)
        marks.append(now(tokens.device))
        loss.backward()
        marks.append(now(tokens.device))
        self.optimizer.step()
        if self.driver is not None:
            self.driver(self.steps_done)
        self.steps_done += 1
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(now(tokens.device))
        if record:
            for phase, begin, end in zip(PHASES, marks, marks[1:], strict=False):
                self.seconds[phase].append(end - begin)


def saved_for_backward(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass.

    Args:
        model: Its weights and buffers are not counted, since they are held anyway.
        forward: Runs the pass and returns what would be differentiated.

    Returns:
        Bytes, each storage counted once, however many tensors view it.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    # The tensors are kept until the end: a storage freed in between could give its address to another.
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    del result
    return sum(size for address, size in storages.items() if address not in held)


def bench(spec: BenchSpec, *, progress: Progress = silent) -> list[Measured]:
    """Measure training steps: one result per dtype and method, in the order of the spec, the control last of its dtype.

    Raises:
        ConfigError: The model or the target modules.
    """
    name = start(spec, progress)
    return [result for dtype in spec.dtypes for result in _bench_dtype(spec, name, dtype, progress)]


def _bench_dtype(spec: BenchSpec, name: str, dtype: str, progress: Progress) -> list[Measured]:
    device, base = spec.torch_device, frozen_base(spec, name, dtype)
    contestants = [_Contestant(label, method, base, spec) for label, method in entries(spec)]
    for contestant, tokens, counts in in_turns(spec, base, contestants, f"Training steps, {dtype}", progress):
        contestant.step(tokens, record=counts)
    reference = next(item.step_seconds for item in contestants if item.name == spec.reference)
    tokens = random_tokens(int(base.config.vocab_size), spec, spec.warmup + spec.rounds).to(device)
    results = []
    for item in contestants:
        ratio, quartiles = ratios(item.step_seconds, reference)
        memory = _cuda_memory(item, tokens) if spec.memory and device.type == "cuda" else (None, None)
        results.append(
            Measured(
                method=item.name,
                dtype=dtype,
                seconds=item.seconds,
                ratio=ratio,
                ratio_quartiles=quartiles,
                trainable_parameters=item.trainable,
                saved_bytes=saved_for_backward(item.model, partial(item.loss, tokens)),
                step_bytes=memory[0],
                peak_bytes=memory[1],
            )
        )
    if spec.memory and device.type == "cpu":
        del contestants, contestant, item, base  # the processes that follow need the room
        memory_of = _cpu_memory(spec, name, dtype, progress)
        for index, result in enumerate(results):
            step_bytes, peak_bytes = memory_of.get(result.method, (None, None))
            results[index] = replace(result, step_bytes=step_bytes, peak_bytes=peak_bytes)
    return results


def _cuda_memory(contestant: _Contestant, tokens: torch.Tensor) -> tuple[int, int]:
    """Peak of one step above what all methods hold together, and the peak itself, in bytes."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contestant.step(tokens, record=False)
    peak = torch.cuda.max_memory_allocated()
    return peak - before, peak


def _cpu_memory(spec: BenchSpec, name: str, dtype: str, progress: Progress) -> dict[str, tuple[int, int]]:
    """Peak of a step and of the process by method, in bytes; on a CPU only a fresh process tells them."""
    memory: dict[str, tuple[int, int]] = {}
    for method in counted(spec.methods, f"Memory, {dtype}, a fresh process per method", progress):
        job = {**spec.settings(), "model": name, "methods": [method], "dtypes": [dtype], "control": False}
        if job["threads"] is None:
            job["threads"] = torch.get_num_threads()
        done = subprocess.run(
            [sys.executable, "-m", "dynalora.jobs.bench.training", json.dumps(job)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            # The times are measured already and must not be lost with this.
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            logger.warning("The memory of '%s' (%s) could not be measured: %s", method, dtype, last)
        else:
            step_bytes, peak_bytes = json.loads(done.stdout.strip().splitlines()[-1])
            memory[method] = (step_bytes, peak_bytes)
    return memory


def _memory_of_one(job: dict[str, Any]) -> tuple[int, int]:
    """Peak resident memory over a few steps, above that before them and as it is, in bytes."""
    spec = settings_from(BenchSpec, job)
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    base = frozen_base(spec, spec.model, spec.dtypes[0])
    contestant = _Contestant(spec.methods[0], spec.methods[0], base, spec)
    for parameter in base.parameters():
        # Weights are mapped from the file and come into memory when first read: have that behind us.
        parameter.sum()
    tokens = [random_tokens(int(base.config.vocab_size), spec, number) for number in range(3)]
    before = resident()
    forget_peak()
    for batch in tokens:
        contestant.step(batch, record=False)
    most = peak() or 0
    return most - before, most


def tables(spec: BenchSpec, results: Sequence[Measured]) -> list[Table]:
    """The results, a table per dtype."""
    columns = [
        "method", "forward (ms)", "backward", "optimizer", "step", f"step / {spec.reference}",
        "parameters", "saved (MiB)", "step peak (MiB)", "peak (MiB)",
    ]  # fmt: skip

    def cells(item: Measured) -> list[Cell]:
        times = (item.median(phase) for phase in (*PHASES, None))
        peaks = (item.step_bytes, item.peak_bytes)
        return [
            item.method, *(f"{1000 * time:.1f}" for time in times), ratio_text(item.ratio, item.ratio_quartiles),
            item.trainable_parameters, f"{item.saved_bytes / 2**20:.1f}",
            *(None if size is None else f"{size / 2**20:.0f}" for size in peaks),
        ]  # fmt: skip

    return tables_by_dtype(
        spec, results, columns, cells, f"{{}}, {spec.batch_size} × {spec.length} tokens",
        "optimizer: step, driver and clearing the gradients. saved: kept from forward for backward. step peak: above "
        "what was held before the steps.",
    )  # fmt: skip


def as_json(spec: BenchSpec, results: Sequence[Measured]) -> str:
    """Everything measured, round by round, with the settings and the machine."""
    rows = []
    for item in results:
        medians = {phase: item.median(phase) for phase in PHASES}
        rows.append({**asdict(item), "median_seconds": {**medians, "step": item.median()}})
    return with_machine(spec, rows)


if __name__ == "__main__":
    print(json.dumps(_memory_of_one(json.loads(sys.argv[1]))))
