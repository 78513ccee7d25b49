"""Time and memory of training steps, method against method, in one process and in turns.

A machine's speed drifts: with its temperature, its neighbours and its memory. So the methods take turns, one step each
per round, and every ratio is taken within a round; its median and quartiles over the rounds are reported. All methods
share one copy of the base weights and differ in their adapters only. There is no pass or fail here: numbers only.
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError
from dynalora.jobs.finetune import (
    adapter_config,
    check_targets,
    empty_model,
    load_model,
    local_model_name,
    method_names,
)
from dynalora.lab.baselines import BASELINES, driver_of, optimizer_of
from dynalora.lab.machine import forget_peak, machine, peak, resident
from dynalora.lab.report import Table
from dynalora.lab.settings import settings_from

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

PHASES = ("forward", "backward", "optimizer")
REFERENCE = "lora"
CONTROL = "lora (again)"


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """What to measure.

    Attributes:
        model: Hub id or folder of a causal language model; `smollm2`: the demo's.
        methods: Methods to compare; the ratios are to `lora` if it is among them, else to the first.
        dtypes: Of the base weights; each is measured apart. Adapter weights are float32 in all of them.
        r: Rank, the same for all.
        target_modules: The same for all.
        batch_size: Sequences per step.
        length: Tokens per sequence.
        rounds: Measured steps per method.
        warmup: Steps per method before measuring.
        seed: Of the tokens, which are random and the same for all methods.
        threads: Of the CPU; None: torch's choice.
        device: `cpu`, `cuda`, or `auto`.
        control: Run the reference twice, as if it were two methods: their ratio shows the noise of the measurement.
        memory: Measure memory too (training steps only).
        generate: Measure greedy generation instead of training steps; `length` is then the prompt's.
        new_tokens: Tokens generated per sequence and round, at least 2: the first comes with the prompt.
    """

    model: str = "smollm2"
    methods: list[str] = field(default_factory=lambda: ["lora", "dira", "disel"])
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    r: int = 16
    target_modules: list[str] | str = "all-linear"
    batch_size: int = 4
    length: int = 128
    rounds: int = 20
    warmup: int = 3
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    control: bool = False
    memory: bool = True
    generate: bool = False
    new_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("r", "batch_size", "rounds", "warmup"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a whole number of at least 1.")
        if self.length < 2:
            raise ConfigError(f"length is {self.length}; give at least 2 tokens.")
        if self.new_tokens < 2:
            raise ConfigError(f"new_tokens is {self.new_tokens}; give at least 2.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; give a whole number of at least 1.")
        if not self.methods:
            raise ConfigError("methods is empty; name at least one.")
        for name in self.methods:
            if name not in method_names():
                raise ConfigError(f"Unknown method '{name}'; choose from {', '.join(method_names())}.")
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError("A method is named twice; --control measures the reference twice.")
        known = ("float32", "bfloat16", "float16")
        for name in self.dtypes:
            if name not in known:
                raise ConfigError(f"dtype is '{name}'; choose from {', '.join(known)}.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device is '{self.device}'; choose one of auto, cpu, cuda.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda', but torch finds no CUDA device; choose cpu.")

    @property
    def torch_device(self) -> torch.device:
        """Where to run."""
        return torch.device(
            "cuda"
            if self.device == "auto" and torch.cuda.is_available()
            else self.device.replace("auto", "cpu")
        )

    @property
    def reference(self) -> str:
        """The method that ratios are to."""
        return REFERENCE if REFERENCE in self.methods else self.methods[0]


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
        return [sum(times) for times in zip(*self.seconds.values(), strict=True)]

    def median(self, phase: str | None = None) -> float:
        """Median time of a phase, or of the whole step, in seconds."""
        return statistics.median(self.steps if phase is None else self.seconds[phase])


class _Contestant:
    """One method: its model on the shared base weights, and its optimizer."""

    def __init__(self, name: str, method: str, base: nn.Module, spec: BenchSpec) -> None:
        self.name, self.method = name, method
        steps = spec.warmup + spec.rounds + 2
        self.model = adapted(method, base, spec, steps)
        self.model.train()
        self.driver, self.taken = driver_of(self.model, steps), 0
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trainable = sum(parameter.numel() for parameter in trained)
        own = optimizer_of(self.model, torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 0.0})
        self.optimizer = own or torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def step(self, tokens: torch.Tensor, *, record: bool = True) -> None:
        """One training step, timed phase by phase."""
        marks = [now(tokens.device)]
        loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        marks.append(now(tokens.device))
        loss.backward()
        marks.append(now(tokens.device))
        self.optimizer.step()
        if self.driver is not None:
            self.driver(self.taken)
        self.taken += 1
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(now(tokens.device))
        if record:
            for phase, begin, end in zip(PHASES, marks, marks[1:], strict=False):
                self.seconds[phase].append(end - begin)


def now(device: torch.device) -> float:
    """The time in seconds once a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with modules of its own but the very same weights: it costs next to no memory."""
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


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


def random_tokens(vocabulary: int, spec: BenchSpec, round_number: int) -> torch.Tensor:
    """Tokens of one round, (batch_size, length), the same whatever the method and device."""
    generator = torch.Generator().manual_seed(spec.seed * 100_003 + round_number)
    return torch.randint(0, vocabulary, (spec.batch_size, spec.length), generator=generator)


def bench(spec: BenchSpec, *, progress: Progress = silent) -> list[Measured]:
    """Measure training steps.

    Args:
        spec: What to measure.
        progress: Told of rounds and memory runs done.

    Returns:
        One result per dtype and method, in the order of the spec; with `control`, the second run of the reference
        stands last of its dtype.

    Raises:
        ConfigError: The model or the target modules.
    """
    name = start(spec, progress)
    results: list[Measured] = []
    for dtype in spec.dtypes:
        results += _bench_dtype(spec, name, dtype, progress)
    return results


def start(spec: BenchSpec, progress: Progress) -> str:
    """Set the threads, and find the model and check the target modules before weights are loaded; the model's name."""
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
    import peft

    torch.manual_seed(spec.seed)
    known = BASELINES.get(method)
    options = {} if known is not None else {"total_steps": total_steps}
    alpha = None if known is not None and known.alpha is None else 2.0 * spec.r
    config = adapter_config(
        method, r=spec.r, alpha=alpha, target_modules=spec.target_modules, options=options
    )
    shared: Any = sharing_copy(base)
    return cast("PeftModel", peft.get_peft_model(shared, config))


def ratios(own: Sequence[float], reference: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles over the rounds of one time over another, within each round."""
    found = [one / other for one, other in zip(own, reference, strict=True)]
    low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else (found[0],) * 3
    return statistics.median(found), (low, high)


def _bench_dtype(spec: BenchSpec, name: str, dtype: str, progress: Progress) -> list[Measured]:
    device, base = spec.torch_device, frozen_base(spec, name, dtype)
    contestants = [_Contestant(label, method, base, spec) for label, method in entries(spec)]
    vocabulary = int(base.config.vocab_size)
    what = f"Training steps, {dtype}"
    total = spec.warmup + spec.rounds
    progress(what, 0, total)
    for number in range(total):
        tokens = random_tokens(vocabulary, spec, number).to(device)
        # Each round another one goes first: whoever follows finds caches as its predecessor left them.
        shift = number % len(contestants)
        for contestant in contestants[shift:] + contestants[:shift]:
            contestant.step(tokens, record=number >= spec.warmup)
        progress(what, number + 1, total)
    reference = next(item for item in contestants if item.name == spec.reference)
    reference_steps = [sum(times) for times in zip(*reference.seconds.values(), strict=True)]
    tokens = random_tokens(vocabulary, spec, total).to(device)
    saved = {item.name: _saved(item, tokens) for item in contestants}
    memory: dict[str, tuple[int, int]] = {}
    if spec.memory and device.type == "cuda":
        memory = {item.name: _cuda_memory(item, tokens) for item in contestants}
    results = []
    measured = [(item.name, item.method, item.seconds, item.trainable) for item in contestants]
    del contestants, reference, base
    if spec.memory and device.type == "cpu":
        memory = _cpu_memory(spec, name, dtype, [item[1] for item in measured[: len(spec.methods)]], progress)
    for label, _, seconds, trainable in measured:
        steps = [sum(times) for times in zip(*seconds.values(), strict=True)]
        ratio, quartiles = ratios(steps, reference_steps)
        step_bytes, peak_bytes = memory.get(label, (None, None))
        results.append(
            Measured(
                method=label,
                dtype=dtype,
                seconds=seconds,
                ratio=ratio,
                ratio_quartiles=quartiles,
                trainable_parameters=trainable,
                saved_bytes=saved[label],
                step_bytes=step_bytes,
                peak_bytes=peak_bytes,
            )
        )
    return results


def _saved(contestant: _Contestant, tokens: torch.Tensor) -> int:
    def forward() -> torch.Tensor:
        loss: torch.Tensor = contestant.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    return saved_for_backward(contestant.model, forward)


def _cuda_memory(contestant: _Contestant, tokens: torch.Tensor) -> tuple[int, int]:
    """Peak of one step above what all methods hold together, and the peak itself, in bytes."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contestant.step(tokens, record=False)
    peak = torch.cuda.max_memory_allocated()
    return peak - before, peak


# --- memory on the CPU: one fresh process per method ------------------------------------------------------


def _cpu_memory(
    spec: BenchSpec, name: str, dtype: str, methods: Sequence[str], progress: Progress
) -> dict[str, tuple[int, int]]:
    what = f"Memory, {dtype}, a fresh process per method"
    found: dict[str, tuple[int, int]] = {}
    progress(what, 0, len(methods))
    for number, method in enumerate(methods, start=1):
        job = {**asdict(spec), "model": name, "methods": [method], "dtypes": [dtype], "control": False}
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
            found[method] = (step_bytes, peak_bytes)
        progress(what, number, len(methods))
    return found


def _memory_of_one(job: dict[str, Any]) -> tuple[int, int]:
    """Peak resident memory over a few steps, above that before them and as it is, in bytes."""
    spec = settings_from(BenchSpec, job)
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    base = load_model(spec.model, dtype=spec.dtypes[0])
    for parameter in base.parameters():
        parameter.requires_grad_(False)
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


# --- results ----------------------------------------------------------------------------------------------


def tables(spec: BenchSpec, results: Sequence[Measured]) -> list[Table]:
    """The results, a table per dtype."""
    made = []
    for dtype in spec.dtypes:
        rows: list[list[str | int | float | None]] = []
        for item in results:
            if item.dtype != dtype:
                continue
            low, high = item.ratio_quartiles
            rows.append(
                [
                    item.method,
                    *(f"{1000 * item.median(phase):.1f}" for phase in PHASES),
                    f"{1000 * item.median():.1f}",
                    f"{item.ratio:.3f} [{low:.3f}, {high:.3f}]",
                    item.trainable_parameters,
                    f"{item.saved_bytes / 2**20:.1f}",
                    None if item.step_bytes is None else f"{item.step_bytes / 2**20:.0f}",
                    None if item.peak_bytes is None else f"{item.peak_bytes / 2**20:.0f}",
                ]
            )
        columns = [
            "method", "forward (ms)", "backward", "optimizer", "step", f"step / {spec.reference}",
            "parameters", "saved (MiB)", "step peak (MiB)", "peak (MiB)",
        ]  # fmt: skip
        made.append(
            Table(
                columns,
                rows,
                title=f"{setting(spec, dtype)}, {spec.batch_size} × {spec.length} tokens",
                note=(
                    f"Medians of {spec.rounds} rounds in turns on shared base weights; ratio: median of the rounds' "
                    "ratios, with quartiles. optimizer: step, driver and clearing the gradients. saved: kept from "
                    "forward for backward. step peak: above what was held before the steps."
                ),
            )
        )
    return made


def setting(spec: BenchSpec, dtype: str) -> str:
    """Model, dtype, rank and target modules, for titles."""
    targets = spec.target_modules if isinstance(spec.target_modules, str) else ", ".join(spec.target_modules)
    return f"{spec.model}, {dtype}, r = {spec.r}, {targets}"


def as_json(spec: BenchSpec, results: Sequence[Measured]) -> str:
    """Everything measured, round by round, with the settings and the machine."""
    return with_machine(
        spec,
        [
            {
                **asdict(item),
                "median_seconds": {**{phase: item.median(phase) for phase in PHASES}, "step": item.median()},
            }
            for item in results
        ],
    )


def with_machine(spec: BenchSpec, rows: list[dict[str, Any]]) -> str:
    """Results as JSON, with the settings and the machine."""
    found = machine()
    if spec.torch_device.type != "cuda":
        found["device"] = "cpu"
    return json.dumps({"settings": asdict(spec), "machine": found, "results": rows}, indent=2) + "\n"


if __name__ == "__main__":
    print(json.dumps(_memory_of_one(json.loads(sys.argv[1]))))
