"""Time of greedy generation, method against method, in one process and in turns, as in `dynalora.jobs.bench.training`.

Per round and method one batch: the prompts (prefill), then token after token with a key-value cache. Nothing ends
early, so that all methods do the same work, and what is timed is the model and the choice of the next token alone: no
tokenizer, no stopping criteria, no streaming.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel

from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError
from dynalora.jobs.bench.settings import BenchSpec
from dynalora.jobs.bench.setup import (
    adapted,
    entries,
    frozen_base,
    in_turns,
    now,
    ratio_text,
    ratios,
    start,
    tables_by_dtype,
    with_machine,
)
from dynalora.lab.baselines import BASELINES
from dynalora.lab.report import Cell, Table


@dataclass(frozen=True)
class Generated:
    """One method at one dtype.

    Attributes:
        method: Its name.
        dtype: Of the base weights.
        prefill_seconds: One time per round, from the prompts to the first new token of each.
        token_seconds: One time per round, of one further token for the whole batch: the mean over the round's.
        prefill_ratio: Median over the rounds of this method's time over the reference's in the same round.
        prefill_quartiles: Lower and upper quartile of the same.
        token_ratio: As `prefill_ratio`, of `token_seconds`.
        token_quartiles: Lower and upper quartile of the same.
        adapter_parameters: Numbers in the adapter's parameters.
    """

    method: str
    dtype: str
    prefill_seconds: list[float]
    token_seconds: list[float]
    prefill_ratio: float
    prefill_quartiles: tuple[float, float]
    token_ratio: float
    token_quartiles: tuple[float, float]
    adapter_parameters: int

    @property
    def prefill(self) -> float:
        """Median time of the prompts, in seconds."""
        return statistics.median(self.prefill_seconds)

    @property
    def token(self) -> float:
        """Median time of a further token for the whole batch, in seconds."""
        return statistics.median(self.token_seconds)


@torch.no_grad()
def generate_greedily(model: Any, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, float, float]:
    """Continue a batch by the likeliest token each, with a key-value cache, and time it.

    Args:
        model: A causal language model in evaluation mode.
        tokens: Prompts of one length, (batch, length).
        count: Tokens to generate per prompt, at least 2.

    Returns:
        The new tokens, (batch, count); seconds until the first; and seconds per further one.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # As transformers' generate does: no logits for the rest of the prompt.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
    began = now(tokens.device)
    out = model(input_ids=tokens, use_cache=True, **last)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    first = now(tokens.device)
    generated = [token]
    for _ in range(count - 1):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, **last)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        generated.append(token)
    done = now(tokens.device)
    return torch.cat(generated, dim=1), first - began, (done - first) / (count - 1)


def bench_generation(spec: BenchSpec, *, progress: Progress = silent) -> list[Generated]:
    """Measure generation: one result per dtype and method, in the order of the spec, the control last of its dtype.

    Raises:
        ConfigError: The model or the target modules.
    """
    for _, method in entries(spec):
        baseline = BASELINES.get(method)
        if baseline is not None and not baseline.adapts_modules:
            raise ConfigError(
                f"Method '{method}' lengthens every prompt, so its generation cannot be timed against others; leave "
                "it out."
            )
    name = start(spec, progress)
    return [result for dtype in spec.dtypes for result in _generate_dtype(spec, name, dtype, progress)]


def _generate_dtype(spec: BenchSpec, name: str, dtype: str, progress: Progress) -> list[Generated]:
    base = frozen_base(spec, name, dtype)
    steps = spec.warmup + spec.rounds
    models: dict[str, PeftModel] = {label: adapted(method, base, spec, steps).eval() for label, method in entries(spec)}
    prefill: dict[str, list[float]] = {label: [] for label in models}
    further: dict[str, list[float]] = {label: [] for label in models}
    for label, tokens, counts in in_turns(spec, base, [*models], f"Generation, {dtype}", progress):
        _, first, each = generate_greedily(models[label], tokens, spec.new_tokens)
        if counts:
            prefill[label].append(first)
            further[label].append(each)
    results = []
    for label, model in models.items():
        prefill_ratio, prefill_quartiles = ratios(prefill[label], prefill[spec.reference])
        token_ratio, token_quartiles = ratios(further[label], further[spec.reference])
        results.append(
            Generated(
                method=label,
                dtype=dtype,
                prefill_seconds=prefill[label],
                token_seconds=further[label],
                prefill_ratio=prefill_ratio,
                prefill_quartiles=prefill_quartiles,
                token_ratio=token_ratio,
                token_quartiles=token_quartiles,
                adapter_parameters=model.get_nb_trainable_parameters()[0],
            )
        )
    return results


def generation_tables(spec: BenchSpec, results: Sequence[Generated]) -> list[Table]:
    """The results, a table per dtype."""
    columns = [
        "method", "prefill (ms)", f"prefill / {spec.reference}", "per token (ms)", f"token / {spec.reference}",
        "tokens/s", "parameters",
    ]  # fmt: skip

    def cells(item: Generated) -> list[Cell]:
        return [
            item.method, f"{1000 * item.prefill:.1f}", ratio_text(item.prefill_ratio, item.prefill_quartiles),
            f"{1000 * item.token:.2f}", ratio_text(item.token_ratio, item.token_quartiles),
            f"{spec.batch_size / item.token:.1f}", item.adapter_parameters,
        ]  # fmt: skip

    return tables_by_dtype(
        spec, results, columns, cells,
        f"Generation: {{}}, {spec.batch_size} prompts of {spec.length} tokens, {spec.new_tokens} new tokens each",
        "Greedy, with a key-value cache; per token: one further token for the whole batch; tokens/s: of the whole "
        "batch.",
    )  # fmt: skip


def generation_json(spec: BenchSpec, results: Sequence[Generated]) -> str:
    """Everything measured, round by round, with the settings and the machine."""
    rows = [{**asdict(item), "median_seconds": {"prefill": item.prefill, "token": item.token}} for item in results]
    return with_machine(spec, rows)
