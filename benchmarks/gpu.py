"""Training steps, host synchronisations, generation and compiled steps of Llama shapes on an accelerator.

python benchmarks/gpu.py step --shape 7B --batches 4x512,1x2048 --json step.json
python benchmarks/gpu.py host --shape 1B --json host.json
python benchmarks/gpu.py generate --shape 1B --json generate.json
python benchmarks/gpu.py compile --shape 1B --layers 4 --json compile.json

The weights are random and made on the device in bfloat16, from the shape alone; all methods share them. Adapters have
float32 weights, rank 16, on all linear layers, and train under autocast to bfloat16, as Trainer's `bf16=True` has it
(`--no-autocast` for none).

`step` takes turns: in every round each method makes `--steps` training steps (forward, backward, clipping, AdamW, and
what the method does there), between two events on the device's own clock. Reported are medians over the rounds, ratios
to PEFT's LoRA within a round, the time in which the processor had issued the steps, and peak memory. `fused` is a LoRA
written by hand for this model (`fused_lora.py`), `lora (again)` the noise. Methods that change ranks in training are
there twice: `pedyra (adjusts)` scores at every step and adjusts at every tenth, which a usual run does at one of fifty;
`dira (budget)` is on the line of a budget of ranks.

`host` counts operations that wait for the device, with the lines of code that asked for them, and what the profiler
says of a step.

DisLoRA starts at random orthonormal factors, since decomposing random weights says nothing about a step, and its
directions are never chosen.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from dynalora.methods import config_class

sys.path.insert(0, str(Path(__file__).parent))
from fused_lora import fuse

# Shapes of Llama 2 and 3: width, MLP, layers, heads, key and value heads, vocabulary.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 128),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "7B": (4096, 11008, 32, 32, 32, 32000),
}
RANK, ALPHA = 16, 32
WHOLE_RUN = 1000
"""Optimizer steps of the run that schedules are made for."""

METHODS = (
    "lora", "fused", "dora", "adalora", "dira", "dira (budget)", "disel", "pedyra", "pedyra (adjusts)", "dislora",
    "lora (again)",
)  # fmt: skip


def options_of(method: str, steps: int) -> dict[str, Any]:
    """Settings of one of dynalora's methods for a measurement of so many steps."""
    name, _, variant = method.partition(" ")
    options: dict[str, Any] = {} if name == "disel" else {"total_steps": WHOLE_RUN}
    if name == "dislora":
        options |= {"init_weights": False}
    if variant == "(adjusts)":
        options |= {"adjust_start": 4, "adjust_interval": 10, "adjust_end": 10**6, "adjust_size": 12}
    if variant == "(budget)":  # down to half a component less, over all of these steps
        options |= {"target_rank": RANK - 0.5, "total_steps": math.ceil(steps / 0.6)}
    return options


def base_model(shape: str, layers: int | None, device: torch.device) -> Any:
    """A Llama with random frozen weights in bfloat16."""
    width, mlp, count, heads, pairs, vocabulary = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers or count,
        num_attention_heads=heads, num_key_value_heads=pairs, tie_word_embeddings=shape == "1B",
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def adapted(method: str, base: Any, steps: int) -> Any:
    """A method's model on the shared base weights."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, shared)
    torch.manual_seed(0)
    name = method.partition(" ")[0]
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if name == "fused":
        return fuse(model, RANK, ALPHA)
    if name in ("lora", "dora"):
        config: Any = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=name == "dora", **common)
    elif name == "adalora":
        config = peft.AdaLoraConfig(
            init_r=3 * RANK // 2, target_r=RANK, lora_alpha=ALPHA, total_step=WHOLE_RUN, tinit=WHOLE_RUN // 10,
            tfinal=WHOLE_RUN * 3 // 10, deltaT=WHOLE_RUN * 3 // 100, **common,
        )  # fmt: skip
    else:
        config = config_class(name)(r=RANK, alpha=ALPHA, **options_of(method, steps), **common)
    return peft.get_peft_model(model, config)


class Contender:
    """One method's model and optimizer."""

    def __init__(self, method: str, base: Any, steps: int, autocast: bool, checkpointing: bool) -> None:
        self.method, self.device, self.autocast = method, next(base.parameters()).device, autocast
        self.model = adapted(method, base, steps).train()
        if checkpointing:
            inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0, fused=self.device.type == "cuda")
        self.done = 0
        self.seconds: list[float] = []
        self.issued: list[float] = []

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def step(self, tokens: torch.Tensor) -> None:
        """One training step as a trainer makes it."""
        with self.context():
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        if self.method == "adalora":
            self.model.base_model.update_and_allocate(self.done)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

    def turn(self, batches: list[torch.Tensor], record: bool) -> None:
        """Some steps between two marks on the device's clock."""
        synchronize(self.device)
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
        began = time.perf_counter()
        for tokens in batches:
            self.step(tokens)
        issued = time.perf_counter() - began
        if self.device.type == "cuda":
            last.record()
        synchronize(self.device)
        seconds = first.elapsed_time(last) / 1000 if self.device.type == "cuda" else issued
        if record:
            self.seconds.append(seconds / len(batches))
            self.issued.append(issued / len(batches))

    def memory(self, base: Any, tokens: torch.Tensor) -> dict[str, int]:
        """Bytes of the adapter, of the optimizer's state, and of a step's peak above what was held before."""
        shared = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
        tensors = [t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in shared]
        held = {
            "trained": sum(p.numel() for p in self.trained),
            "adapter_bytes": sum(t.nbytes for t in tensors),
            "gradient_bytes": sum(p.nbytes for p in self.trained),
            "state_bytes": sum(
                t.nbytes for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
            ),
        }
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(tokens)
            held["step_peak_bytes"] = torch.cuda.max_memory_allocated() - before
        return held


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def tokens_of(batch: int, length: int, number: int, base: Any, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, base.config.vocab_size, (batch, length), generator=generator).to(device)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, middle, high


def step(args: argparse.Namespace, base: Any, device: torch.device) -> list[dict[str, Any]]:
    """Time and memory of training steps, batch by batch."""
    rows = []
    for sizes in args.batches.split(","):
        batch, length = map(int, sizes.split("x"))
        steps = (args.warmup + args.rounds) * args.steps
        contenders = []
        for method in args.methods.split(","):
            began = time.perf_counter()
            contenders.append(Contender(method, base, steps, args.autocast, args.checkpointing))
            synchronize(device)
            print(f"{method}: made in {time.perf_counter() - began:.1f} s", flush=True)
        for number in range(args.warmup + args.rounds):
            batches = [tokens_of(batch, length, number * args.steps + i, base, device) for i in range(args.steps)]
            turned = number % len(contenders)
            for item in [*contenders[turned:], *contenders[:turned]]:
                item.turn(batches, number >= args.warmup)
        reference = contenders[0].seconds
        for item in contenders:
            ratio = quartiles([mine / lora for mine, lora in zip(item.seconds, reference, strict=True)])
            row = {
                "method": item.method, "batch": sizes, "step_ms": 1000 * statistics.median(item.seconds),
                "mean_ms": 1000 * statistics.fmean(item.seconds), "issued_ms": 1000 * statistics.median(item.issued),
                "ratio": ratio[1], "quartiles": [ratio[0], ratio[2]], **item.memory(base, batches[0]),
                "seconds": item.seconds,
            }  # fmt: skip
            rows.append(row)
            peak = row.get("step_peak_bytes", 0) / 2**20
            print(
                f"{sizes} {item.method:17} step {row['step_ms']:7.2f} ms, mean {row['mean_ms']:7.2f}, issued in "
                f"{row['issued_ms']:7.2f}, / {contenders[0].method} {ratio[1]:.3f} [{ratio[0]:.3f}, {ratio[2]:.3f}], "
                f"step peak {peak:.0f} MiB, adapter {row['adapter_bytes'] / 2**20:.0f} MiB",
                flush=True,
            )
        del contenders, item
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def waits(act: Callable[[], None], device: torch.device) -> Counter[str]:
    """Operations that waited for the device, by the innermost lines of Python that asked for them."""
    seen: Counter[str] = Counter()

    def note(message: Any, *rest: Any, **more: Any) -> None:
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack()[:-1] if "warnings.py" not in f.filename]
            seen[" < ".join(f"{'/'.join(f.filename.split('/')[-3:])}:{f.lineno}" for f in reversed(frames[-5:]))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return seen


def profile(contender: Contender, tokens: torch.Tensor, steps: int) -> dict[str, Any]:
    """Kernel launches, the device's and the processor's time, and the largest kernels, all per step."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (contender.device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            contender.step(tokens)
        synchronize(contender.device)
    averages = profiler.key_averages()
    kernels = [e for e in averages if e.self_device_time_total > 0 and e.self_cpu_time_total == 0]
    launches = [e for e in averages if e.key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))]
    operations = [e for e in averages if e.key.startswith("aten::")]
    largest = sorted(kernels, key=lambda e: -e.self_device_time_total)[:12]
    busiest = sorted(operations, key=lambda e: -e.self_cpu_time_total)[:12]
    return {
        "launches": sum(e.count for e in launches) / steps,
        "operations": sum(e.count for e in operations) / steps,
        "device_ms": sum(e.self_device_time_total for e in kernels) / 1000 / steps,
        "kernels": [[e.key[:90], e.count / steps, e.self_device_time_total / 1000 / steps] for e in largest],
        "processor": [[e.key, e.count / steps, e.self_cpu_time_total / 1000 / steps] for e in busiest],
    }


def host(args: argparse.Namespace, base: Any, device: torch.device) -> list[dict[str, Any]]:
    """What waits for the device, and what is launched, in the steps of every method."""
    rows = []
    batch, length = map(int, args.batches.split(",")[0].split("x"))
    tokens = tokens_of(batch, length, 0, base, device)
    for method in args.methods.split(","):
        contender = Contender(method, base, args.steps + 14, args.autocast, args.checkpointing)
        for _ in range(10):  # gates are measured at the first eight, and state is made
            contender.step(tokens)
        synchronize(device)
        seen = waits(lambda: [contender.step(tokens) for _ in range(args.steps)], device)  # type: ignore[arg-type] # noqa: B023
        row: dict[str, Any] = {"method": method, "steps": args.steps, "waits": dict(seen.most_common())}
        try:
            row |= profile(contender, tokens, 2)
        except Exception as error:  # the counts are worth having without it
            row["profile"] = repr(error)
        rows.append(row)
        print(
            f"{method:17} {sum(seen.values()) / args.steps:.2f} waits a step, {row.get('launches', 0):.0f} launches, "
            f"device {row.get('device_ms', 0):.1f} ms",
            *(f"\n    {count} × {where}" for where, count in seen.most_common(8)),
            flush=True,
        )
    return rows


@torch.no_grad()
def generate(args: argparse.Namespace, base: Any, device: torch.device) -> list[dict[str, Any]]:
    """Greedy generation with a key-value cache, in turns: the prompts, and each further token."""
    batch, length = map(int, args.batches.split(",")[0].split("x"))
    models = {method: adapted(method, base, 1).eval() for method in args.methods.split(",")}
    models["base"] = base.eval()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(args.warmup + args.rounds):
        prompt = tokens_of(batch, length, number, base, device)
        turned = number % len(models)
        for name in [*list(models)[turned:], *list(models)[:turned]]:
            synchronize(device)
            marks = [time.perf_counter()]
            tokens, cache = prompt, None
            for made in range(args.new_tokens):
                out = models[name](input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                tokens, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
                if made in (0, args.new_tokens - 1):
                    synchronize(device)
                    marks.append(time.perf_counter())
            if number >= args.warmup:
                times[name].append((marks[1] - marks[0], (marks[2] - marks[1]) / (args.new_tokens - 1)))
    rows = []
    for name, measured in times.items():
        pairs = list(zip(measured, times[next(iter(times))], strict=True))
        row: dict[str, Any] = {"method": name}
        for index, part in enumerate(("prefill", "token")):
            row[f"{part}_ms"] = 1000 * statistics.median(each[index] for each in measured)
            low, ratio, high = quartiles([mine[index] / lora[index] for mine, lora in pairs])
            row |= {f"{part}_ratio": ratio, f"{part}_quartiles": [low, high]}
        rows.append(row)
        print(
            f"{name:17} prefill {row['prefill_ms']:.2f} ms ({row['prefill_ratio']:.3f}), "
            f"token {row['token_ms']:.2f} ms ({row['token_ratio']:.3f} {row['token_quartiles']})",
            flush=True,
        )
    return rows


def compiled(args: argparse.Namespace, base: Any, device: torch.device) -> list[dict[str, Any]]:
    """Forward and backward of the model as it is, and of the one that `torch.compile` makes of it, in turns."""
    batch, length = map(int, args.batches.split(",")[0].split("x"))
    tokens = tokens_of(batch, length, 0, base, device)
    rows = []
    for method in args.methods.split(","):
        torch._dynamo.reset()
        contender = Contender(method, base, 1000, args.autocast, False)
        for _ in range(10):  # what a method measures at its first steps is over
            contender.step(tokens)
        model = contender.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        began = time.perf_counter()
        quick = torch.compile(inner, fullgraph=True, backend=args.backend)

        def passes(model: Any) -> float:
            synchronize(device)
            start = time.perf_counter()
            with contender.context():  # noqa: B023
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            synchronize(device)
            seconds = time.perf_counter() - start
            contender.optimizer.zero_grad(set_to_none=True)  # noqa: B023
            return seconds

        row: dict[str, Any] = {"method": method}
        try:
            passes(quick)
            row["compiled_in_s"] = time.perf_counter() - began
            times = [(passes(inner), passes(quick)) for _ in range(args.warmup + args.rounds)][args.warmup :]
            row["eager_ms"], row["compiled_ms"] = (1000 * statistics.median(c) for c in zip(*times, strict=True))
        except Exception as error:  # one method's failure is a finding
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        rows.append(row)
        print(row, flush=True)
    return rows


WHAT = {"step": step, "host": host, "generate": generate, "compile": compiled}


def main() -> None:
    """Measure, print, and write everything to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--shape", choices=list(SHAPES), default="1B")
    parser.add_argument("--layers", type=int, help="layers, if not the shape's own")
    parser.add_argument("--batches", default="1x2048", help="sequences x tokens, with commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas; ratios are to the first")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=4, help="rounds before those that count")
    parser.add_argument("--steps", type=int, default=3, help="steps per method and round, or steps that are watched")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--no-autocast", dest="autocast", action="store_false")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    base = base_model(args.shape, args.layers, device)
    rows = WHAT[args.what](args, base, device)
    if args.json is not None:
        on = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        settings = {name: str(value) for name, value in vars(args).items()}
        found = {"device": on, "versions": versions, "settings": settings, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
