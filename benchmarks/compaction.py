"""Train DiRA on a model, then compact the adapter at several thresholds: what becomes smaller and faster, what is lost.

    python benchmarks/compaction.py --data FOLDER --output FOLDER --penalty-weight 1e-4,1e-2 --seeds 0,1,2
    python benchmarks/compaction.py --output FOLDER --table

FOLDER of --data holds commonsense/ARC-Easy.{train,dev}.jsonl.gz (as in LLM-Adapters); the model is
SmolLM2-135M-Instruct unless --model names another. A cell is one training, with one penalty weight and one seed, and
leaves OUTPUT/compaction_weight<weight>_seed<seed>.json with all thresholds. A finished cell is not run again.

Every threshold starts from the same saved adapter. Held-out loss is per token of the right answer, KL(base ‖ tuned) on
text that the base model wrote, both in nats per token. Steps are timed in turns, one per adapter and round, on shared
base weights, and ratios are taken within a round; the first row of each cell is the adapter as it was trained.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dynalora.common.files import write_file
from dynalora.common.progress import rich_progress
from dynalora.errors import ConfigError, DataError, DynaloraError
from dynalora.lab.machine import machine

WARMUP = 2  # steps per adapter before those that are timed


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its compactions: everything that the numbers depend on."""

    model: str | None
    penalty_weight: float
    penalty_schedule: str
    seed: int
    lr: float
    r: int
    steps: int
    batch_size: int
    thresholds: list[float]
    questions: int
    texts: int
    rounds: int
    length: int

    @property
    def file(self) -> str:
        return f"compaction_weight{self.penalty_weight:g}_seed{self.seed}.json"


class Timed:
    """An adapter in training, stepped and timed in turns with the others."""

    def __init__(self, model: Any) -> None:
        import torch

        self.model = model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A rate of almost nothing: what is timed is the step, and the adapter shall stay as it is.
        self.optimizer = torch.optim.AdamW(trained, lr=1e-12, weight_decay=0.0)
        self.seconds: list[float] = []

    def step(self, tokens: Any, *, record: bool) -> None:
        from dynalora.jobs.bench.setup import now

        began = now(tokens.device)
        self.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if record:
            self.seconds.append(now(tokens.device) - began)

    def state_bytes(self) -> int:
        import torch

        return sum(
            value.numel() * value.element_size()
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )


def run_cell(cell: Cell, data_folder: Path, threads: int | None, console: Console) -> dict[str, Any]:
    """Train, compact at every threshold, and measure."""
    import torch
    from peft import PeftModel

    import dynalora
    from dynalora.evaluation.run import prepare
    from dynalora.evaluation.tokens import ensure_chat_template, ensure_pad_token, tokenize
    from dynalora.forgetting.retention import base_predictions, retention
    from dynalora.forgetting.texts import own_text
    from dynalora.jobs.bench.setup import ratios, sharing_copy
    from dynalora.lab.configs import adapter_config
    from dynalora.lab.models import load_model, load_tokenizer
    from dynalora.lab.packaged_models import demo_model
    from dynalora.lab.training.settings import TrainSettings
    from dynalora.lab.training.train import held_out_loss, take_off, train_adapter

    began = time.perf_counter()
    if threads is not None:
        torch.set_num_threads(threads)
    train, dev = (
        [item.choice for item in prepare("arc_easy", data=data_folder, split=split).items if item.choice]
        for split in ("train", "dev")
    )
    held_out = {" ".join(choice.question.split()).casefold() for choice in dev}
    # A few dev questions stand among the training ones, too.
    train = [choice for choice in train if " ".join(choice.question.split()).casefold() not in held_out]
    with rich_progress(console) as progress:
        path, origin = cell.model, cell.model
        if path is None:
            source = demo_model(progress=progress)
            path, origin = source.path, source.origin
    tokenizer = load_tokenizer(path)
    ensure_chat_template(tokenizer)
    ensure_pad_token(tokenizer)
    base: Any = load_model(path, dtype="float32")
    if torch.cuda.is_available():
        base = base.to("cuda")
    rows, questions = (
        tokenize([choice.item.conversation() for choice in part], tokenizer) for part in (train, dev[: cell.questions])
    )
    config = adapter_config(
        "dira", r=cell.r,
        options={
            "penalty_weight": cell.penalty_weight, "penalty_schedule": cell.penalty_schedule, "total_steps": cell.steps,
        },
    )  # fmt: skip
    settings = TrainSettings(
        steps=cell.steps, learning_rate=cell.lr, batch_size=cell.batch_size, seed=cell.seed, log_every=1, eval_every=0,
        save_every=0,
    )  # fmt: skip
    label = f"DiRA, λ = {cell.penalty_weight:g}"
    trained = train_adapter(base, tokenizer, config, rows, settings=settings, label=label, console=console)
    variants: list[dict[str, Any]] = []
    timed: list[Timed] = []
    with tempfile.TemporaryDirectory(prefix="dynalora-") as scratch, rich_progress(console) as progress:
        whole = Path(scratch, "whole")
        trained.model.save_pretrained(str(whole))
        base = take_off(trained.model)
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        base.eval()
        text = own_text(base, tokenizer, texts=cell.texts, seed=0, cache=False, progress=progress)
        predictions = base_predictions(base, text, progress=progress)
        for number, threshold in enumerate([None, *cell.thresholds]):
            model = PeftModel.from_pretrained(sharing_copy(base), str(whole), is_trainable=True)
            found: dict[str, Any] = {"threshold": threshold}
            if threshold is not None:
                done = dynalora.compact(model, threshold)
                found |= {"removed": done.removed, "rewritten": sum(one.rewritten for one in done.matrices)}
                found |= {"lost": done.lost}
            model.eval()
            folder = Path(scratch, str(number))
            model.save_pretrained(str(folder))
            kept = retention(model, text, base=predictions, name=f"threshold {threshold}", progress=progress)
            found |= {
                "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "rank": sum(row.rank for row in dynalora.rank_landscape(model)),
                "file_bytes": (folder / "adapter_model.safetensors").stat().st_size,
                "held_out_loss": held_out_loss(model, questions, batch_size=cell.batch_size),
                "kl": kept.kl,
                "kl_error": kept.kl_error,
            }
            variants.append(found)
            # A run of its own for the timed steps, so that the penalty acts in them.
            dynalora.restart_schedule(model, WARMUP + cell.rounds)
            timed.append(Timed(model))
        _take_turns(cell, timed, int(base.config.vocab_size), progress)
    for found, one in zip(variants, timed, strict=True):
        ratio, quartiles = ratios(one.seconds, timed[0].seconds)
        found |= {
            "step_seconds": one.seconds,
            "step_ratio": ratio,
            "step_ratio_quartiles": quartiles,
            "optimizer_bytes": one.state_bytes(),
        }
    return {
        "cell": asdict(cell),
        "model": origin,
        "machine": machine(),
        "loss": [record["loss"] for record in trained.records if "loss" in record],
        "matrices": len(dynalora.rank_landscape(timed[0].model)),
        "held_out_tokens": questions.response_tokens,
        "kl_tokens": text.tokens,
        "variants": variants,
        "seconds": time.perf_counter() - began,
    }


def _take_turns(cell: Cell, timed: Sequence[Timed], vocabulary: int, progress: Any) -> None:
    import torch

    device = next(timed[0].model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    progress("Steps in turns", 0, WARMUP + cell.rounds)
    for number in range(WARMUP + cell.rounds):
        tokens = torch.randint(0, vocabulary, (cell.batch_size, cell.length), generator=generator).to(device)
        # Each round another one goes first: whoever follows finds caches as its predecessor left them.
        shift = number % len(timed)
        for one in [*timed[shift:], *timed[:shift]]:
            one.step(tokens, record=number >= WARMUP)
        progress("Steps in turns", number + 1, WARMUP + cell.rounds)


# --- all cells --------------------------------------------------------------------------------------------


def run_cells(cells: Sequence[Cell], arguments: argparse.Namespace, console: Console) -> int:
    """Run what is not there yet; returns how many failed."""
    failed = 0
    for number, cell in enumerate(cells, start=1):
        target = arguments.output / cell.file
        head = f"[{number}/{len(cells)}] {cell.file}"
        if target.exists():
            there = _read(target)["cell"]
            differ = [name for name, value in asdict(cell).items() if there.get(name) != value]
            if not differ:
                console.print(f"{head}: there already", highlight=False, markup=False)
                continue
            told = f"{head}: was made with another {', '.join(differ)}; choose another --output"
            console.print(told, highlight=False, markup=False, style="red")
            failed += 1
            continue
        console.print(head, highlight=False, markup=False, style="bold")
        try:
            result = run_cell(cell, arguments.data, arguments.threads, console)
        except DynaloraError as error:
            console.print(f"{head}: {error}", highlight=False, markup=False, style="red")
            failed += 1
            continue
        write_file(target, json.dumps(result, indent=1) + "\n")
        console.print(f"{head}: done in {result['seconds']:.0f} s", highlight=False, markup=False)
    return failed


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = content["cell"], content["variants"], content["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{file}' is no result of this script ({type(error).__name__}); move it away.") from error
    return content


def table(folder: Path) -> str:
    """All results of a folder as one Markdown table, a row per cell and threshold."""
    results = [_read(file) for file in sorted(folder.glob("compaction_weight*.json"))]
    if not results:
        raise DataError(f"'{folder}' holds no results; run some cells first.")
    results.sort(key=lambda result: (result["cell"]["penalty_weight"], result["cell"]["seed"]))
    heads = [
        "λ", "seed", "threshold", "components", "parameters", "file (MiB)", "held-out loss", "KL from base",
        "step (ms)", "step / uncompacted", "optimizer state (MiB)",
    ]  # fmt: skip
    rows = [_row(result["cell"], found) for result in results for found in result["variants"]]
    lines = [heads, ["---:"] * len(heads), *rows]
    note = " ".join(dict.fromkeys(_note(result) for result in results))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}\n"


def _row(cell: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    low, high = found["step_ratio_quartiles"]
    return [
        f"{cell['penalty_weight']:g}",
        str(cell["seed"]),
        "–" if found["threshold"] is None else f"{found['threshold']:g}",
        f"{found['rank']:,}",
        f"{found['parameters']:,}",
        f"{found['file_bytes'] / 2**20:.2f}",
        f"{found['held_out_loss']:.4f}",
        f"{found['kl']:.4f} ± {found['kl_error']:.4f}",
        f"{1000 * statistics.median(found['step_seconds']):.1f}",
        f"{found['step_ratio']:.3f} [{low:.3f}, {high:.3f}]",
        f"{found['optimizer_bytes'] / 2**20:.2f}",
    ]


def _note(result: Mapping[str, Any]) -> str:
    cell, ran_on = result["cell"], result["machine"]
    return (
        f"{result['model']}, float32, r = {cell['r']}, {result['matrices']} matrices, {cell['steps']} steps of batch "
        f"{cell['batch_size']} at {cell['lr']:g}, λ {cell['penalty_schedule']}; {result['held_out_tokens']} held-out "
        f"tokens, KL on {result['kl_tokens']} tokens of the base model's own text, ± its standard error over texts. "
        f"Steps: medians of {cell['rounds']} rounds in turns, {cell['batch_size']} × {cell['length']} tokens; ratio "
        f"with quartiles. {ran_on['device']}, {ran_on['threads']} threads, torch {ran_on['torch']}."
    )


# --- the command line -------------------------------------------------------------------------------------


def _numbers(given: str, flag: str, kind: type) -> list[Any]:
    try:
        return [kind(one) for one in given.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} is '{given}'; give numbers, separated by commas.") from None


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    thresholds = _numbers(arguments.thresholds, "--thresholds", float)
    for threshold in thresholds:
        if not 0 <= threshold < 1:
            raise ConfigError(f"--thresholds has {threshold:g}; give shares of the largest singular value in [0, 1).")
    for name in ("steps", "rounds", "texts", "questions", "r", "batch_size"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {getattr(arguments, name)}; give a whole number of at least 1.")
    return [
        Cell(
            model=arguments.model, penalty_weight=weight, penalty_schedule=arguments.penalty_schedule, seed=seed,
            lr=arguments.lr, r=arguments.r, steps=arguments.steps, batch_size=arguments.batch_size,
            thresholds=thresholds, questions=arguments.questions, texts=arguments.texts, rounds=arguments.rounds,
            length=arguments.length,
        )
        for weight in _numbers(arguments.penalty_weight, "--penalty-weight", float)
        for seed in _numbers(arguments.seeds, "--seeds", int)
    ]  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with commonsense/")
    add("--output", type=Path, required=True, help="folder of the results")
    add("--table", action="store_true", help="print the results as a Markdown table and run nothing")
    add("--model", help="folder or Hub id of a causal language model (default: SmolLM2-135M-Instruct)")
    add("--penalty-weight", default="1e-4", help="λ at the first step, several separated by commas")
    add("--penalty-schedule", default="linear", help="linear, cosine or constant")
    add("--seeds", default="0", help="of data order and adapter start, separated by commas")
    add("--thresholds", default="0,1e-4,1e-3,1e-2", help="shares of the largest singular value")
    add("--lr", type=float, default=5e-4)
    add("--steps", type=int, default=200)
    add("--batch-size", type=int, default=8)
    add("--r", type=int, default=16)
    add("--questions", type=int, default=500, help="dev questions to measure the loss on")
    add("--texts", type=int, default=32, help="texts that the base model writes, to measure KL on")
    add("--rounds", type=int, default=20, help="timed steps per adapter")
    add("--length", type=int, default=64, help="tokens per sequence of a timed step")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    return parser.parse_args()


def main() -> int:
    arguments, console = _arguments(), Console(soft_wrap=True)
    try:
        if arguments.table:
            print(table(arguments.output))
            return 0
        if arguments.data is None:
            raise ConfigError("--data is missing; give the folder with commonsense/.")
        return 1 if run_cells(_cells(arguments), arguments, console) else 0
    except DynaloraError as error:
        console.print(f"Error: {error}", style="red", highlight=False, markup=False)
        return 2


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
