"""Fine-tune SmolLM2-135M-Instruct on ARC-Easy with one adapter after another: what it learns and what it forgets.

    python benchmarks/arc_easy.py --data FOLDER --output FOLDER --method lora --lr 5e-4 --seeds 0,1,2
    python benchmarks/arc_easy.py --data FOLDER --output FOLDER --method disel --set gate_bias_init=-2 --label disel-b2
    python benchmarks/arc_easy.py --output FOLDER --table

FOLDER of --data holds commonsense/ARC-Easy.{train,dev}.jsonl.gz (as in LLM-Adapters) and text/wikitext2.valid.txt.gz.
A cell is one method with one seed and one learning rate. It runs in a process of its own, so that the peak memory is
its own, and leaves OUTPUT/<label>_seed<seed>_lr<lr>.json. A finished cell is not run again, and one that fails does not
stop the others.

The model learns to answer the bare question with the right option's text (loss on the answer and its end-of-turn token)
and is measured by option likelihood on the dev split. There is no system message, and training questions of more than
64 tokens are left out, since padding to them would cost as much as all others. Forgetting is measured on WikiText
against the untouched base model, loaded afresh: some methods (PiSSA) change the base weights, which switching the
adapter off does not undo.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from dynalora.common.files import write_file
from dynalora.common.progress import Progress, rich_progress
from dynalora.common.statistics import standard_error
from dynalora.errors import ConfigError, DataError, DynaloraError
from dynalora.lab.machine import machine, peak
from dynalora.lab.settings import named_values

BASE = "base"  # no adapter and no training: what the others are compared with
# ChatML without the model's default system message, which would be a third of all tokens.
PLAIN_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LONGEST = 64  # tokens; the few longer training questions would pad all others of their batch
COMMON = ("r", "alpha", "dropout", "target_modules")  # settings of adapter_config itself


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: everything that its numbers depend on."""

    label: str
    method: str
    seed: int
    lr: float
    r: int
    alpha: float | None
    options: dict[str, Any] = field(default_factory=dict)
    steps: int
    batch_size: int
    schedule: str
    warmup: float
    weight_decay: float
    questions: int
    wikitext_tokens: int
    window: int

    @property
    def file(self) -> str:
        return f"{self.label}_seed{self.seed}_lr{self.lr:g}.json"


# --- one cell, in a process of its own --------------------------------------------------------------------


def run_cell(cell: Cell, data_folder: Path, threads: int, console: Console) -> dict[str, Any]:
    """Train and measure one cell."""
    import torch

    from dynalora.evaluation.commonsense import load_choices
    from dynalora.evaluation.multiple_choice import option_scores
    from dynalora.evaluation.tokens import tokenize
    from dynalora.lab.models import load_model, load_tokenizer
    from dynalora.lab.packaged_models import demo_model
    from dynalora.lab.training.settings import TrainSettings
    from dynalora.lab.training.train import train_adapter

    began = time.perf_counter()
    torch.set_num_threads(threads)
    dev = load_choices(data_folder / "commonsense" / "ARC-Easy.dev.jsonl.gz")
    held_out = {_key(choice.question) for choice in dev}
    train = load_choices(data_folder / "commonsense" / "ARC-Easy.train.jsonl.gz")
    # A few dev questions stand among the training ones, too.
    train = [choice for choice in train if _key(choice.question) not in held_out]
    dev = dev[: cell.questions]
    with rich_progress(console) as progress:
        source = demo_model(progress=progress)
    tokenizer = load_tokenizer(source.path)
    tokenizer.chat_template = PLAIN_CHAT
    model: Any = load_model(source.path, dtype="float32")
    result: dict[str, Any] = {
        "cell": asdict(cell),
        "model": source.origin,
        "machine": {**machine(), "load_at_start": os.getloadavg()[0]},
    }
    if cell.method != BASE:
        config = _config(cell)
        result["adapter"] = _plain(config.to_dict())
        settings = TrainSettings(
            steps=cell.steps, learning_rate=cell.lr, schedule=cell.schedule, warmup=cell.warmup,
            weight_decay=cell.weight_decay, batch_size=cell.batch_size, seed=cell.seed, log_every=1, eval_every=0,
            save_every=0,
        )  # fmt: skip
        rows = tokenize([choice.item.conversation() for choice in train], tokenizer)
        rows.rows = [row for row in rows.rows if len(row["input_ids"]) <= LONGEST]
        computed = time.process_time()
        trained = train_adapter(
            model, tokenizer, config, rows, settings=settings, label=cell.label, console=console
        )
        model = trained.model
        result |= {
            "loss": [record["loss"] for record in trained.records if "loss" in record],
            "step_seconds": trained.step_seconds,
            "step_seconds_quartiles": trained.step_seconds_quartiles,
            "train_seconds": trained.seconds,
            # Of all threads, the adapter's start included: what other work on the machine hardly changes.
            "train_cpu_seconds": time.process_time() - computed,
            "trainable_parameters": trained.trainable_parameters,
            "training_peak_bytes": peak(),
            "training_rows": len(rows),
        }
    with rich_progress(console) as progress:
        scores = option_scores(model, tokenizer, dev, name=cell.label, progress=progress)
        result |= {
            "accuracy": asdict(scores.accuracy()),
            "accuracy_raw": asdict(scores.accuracy(normalised=False)),
            "right_loss": asdict(scores.right_loss),
            "right_loss_per_token": asdict(scores.right_loss_per_token),
            "correct": [int(own) for own in scores.correct()],
            "correct_raw": [int(own) for own in scores.correct(normalised=False)],
            "right_losses": [round(own, 5) for own in scores.right_losses],
            "right_counts": scores.right_counts,
        }
        base = load_model(source.path, dtype="float32") if cell.method != BASE else model
        text = data_folder / "text" / "wikitext2.valid.txt.gz"
        result["wikitext"] = wikitext(base, model, tokenizer, text, cell, progress)
    return {**result, "peak_bytes": peak(), "seconds": time.perf_counter() - began}


def wikitext(
    base: Any, model: Any, tokenizer: Any, path: Path, cell: Cell, progress: Progress
) -> dict[str, float | None]:
    """KL(base ‖ tuned) and both losses in nats per token, on the first tokens of a text, in windows of equal length.

    The first token of a window is context only.
    """
    from dynalora.forgetting.base_model import fingerprint
    from dynalora.forgetting.retention import BasePredictions, base_predictions, retention
    from dynalora.forgetting.texts import OwnText

    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            # More characters than the tokens can have, and not all of the text.
            content = file.read(20 * cell.wikitext_tokens)
    except (OSError, EOFError) as error:
        raise DataError(f"'{path}' cannot be read ({error}); give its folder with --data.") from error
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][: cell.wikitext_tokens]
    windows = [
        tuple(ids[start : start + cell.window]) for start in range(0, len(ids) - cell.window + 1, cell.window)
    ]
    if not windows:
        raise DataError(f"'{path}' has {len(ids)} tokens and a window is {cell.window}; give a longer text.")
    marks = fingerprint(base), fingerprint(model)
    what, found = f"WikiText: {cell.label}", []
    progress(what, 0, len(windows))
    for number, window in enumerate(windows, start=1):
        texts = [OwnText((window,), (1,), mark, 0) for mark in marks]
        # A model whose base weights were changed has another fingerprint; the text is the same.
        reference = BasePredictions(texts[1], base_predictions(base, texts[0]).log_probs)
        found.append(retention(model, texts[1], base=reference))
        progress(what, number, len(windows))
    return {
        "kl": statistics.fmean(one.kl for one in found),
        "kl_error": standard_error([one.kl for one in found]),
        "base_loss": statistics.fmean(one.base_loss for one in found),
        "tuned_loss": statistics.fmean(one.tuned_loss for one in found),
        "loss_change": statistics.fmean(one.loss_shift for one in found),
        "loss_change_error": standard_error([one.loss_shift for one in found]),
        "tokens": sum(one.tokens for one in found),
    }


def _config(cell: Cell) -> Any:
    from dynalora.lab.configs import adapter_config

    options = dict(cell.options)
    common: dict[str, Any] = {"r": cell.r, "alpha": cell.alpha}
    common |= {name: options.pop(name) for name in COMMON if name in options}
    return adapter_config(cell.method, **common, options=options)


def _key(question: str) -> str:
    return " ".join(question.split()).casefold()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(one) for one in value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


# --- all cells --------------------------------------------------------------------------------------------


def run_cells(cells: Sequence[Cell], arguments: argparse.Namespace, console: Console) -> int:
    """Run what is not there yet, each in its own process; returns how many failed."""
    failed = 0
    for number, cell in enumerate(cells, start=1):
        target = arguments.output / cell.file
        head = f"[{number}/{len(cells)}] {cell.file}"
        if target.exists():
            there = _read(target)["cell"]
            if there == _plain(asdict(cell)):
                console.print(f"{head}: there already", highlight=False, markup=False)
                continue
            differ = [name for name, value in _plain(asdict(cell)).items() if there.get(name) != value]
            console.print(
                f"{head}: was made with another {', '.join(differ)}; choose another --label or --output",
                highlight=False, markup=False, style="red",
            )  # fmt: skip
            failed += 1
            continue
        console.print(head, highlight=False, markup=False, style="bold")
        began = time.perf_counter()
        command = [
            sys.executable, str(Path(__file__).resolve()), "--data", str(arguments.data), "--output",
            str(arguments.output), "--threads", str(arguments.threads), "--cell", json.dumps(asdict(cell)),
        ]  # fmt: skip
        code = subprocess.run(command, check=False).returncode
        if code:
            failed += 1
            console.print(f"{head}: failed (code {code})", highlight=False, markup=False, style="red")
        else:
            told = f"{head}: done in {time.perf_counter() - began:.0f} s, {_line(_read(target))}"
            console.print(told, highlight=False, markup=False)
    return failed


def _line(result: Mapping[str, Any]) -> str:
    return (
        f"accuracy {result['accuracy']['value']:.3f} (raw {result['accuracy_raw']['value']:.3f}), "
        f"loss of the right option {result['right_loss']['value']:.3f}, KL {result['wikitext']['kl']:.4f}"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = content["cell"], content["accuracy"], content["wikitext"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{file}' is no result of this script ({type(error).__name__}); move it away."
        ) from error
    return content


# --- the table --------------------------------------------------------------------------------------------


def table(folder: Path) -> str:
    """All results of a folder as one Markdown table, a row per label and learning rate."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*_seed*.json")):
        result = _read(file)
        groups.setdefault((result["cell"]["label"], result["cell"]["lr"]), []).append(result)
    if not groups:
        raise DataError(f"'{folder}' holds no results; run some cells first.")
    # What the others are compared with: of the LoRA rows the one with most seeds, then the most accurate.
    lora = [group for (label, _), group in groups.items() if label == "lora"]
    reference = max(lora, key=lambda group: (len(group), _mean(group, "accuracy", "value")), default=None)
    heads = [
        "method", "lr", "seeds", "accuracy (± s.e. over seeds)", "95 % interval", "− lora (95 %, paired)",
        "raw accuracy", "loss of the right option", "per token", "KL, WikiText", "loss change, WikiText",
        "step (s)", "/ lora", "CPU time per step (s)", "training peak (GiB)", "trained parameters",
    ]  # fmt: skip
    order = sorted(groups, key=lambda key: (key[0] != BASE, key[0] != "lora", key))
    rows = [_row(*key, groups[key], reference) for key in order]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    note = _note([result for group in groups.values() for result in group], reference)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}\n"


def _row(
    label: str, lr: float, group: list[dict[str, Any]], reference: list[dict[str, Any]] | None
) -> list[str]:
    base = group[0]["cell"]["method"] == BASE
    correct = _per_question(group, "correct")
    value = statistics.fmean(correct)
    if len(group) == 1:
        low, high = group[0]["accuracy"]["low"], group[0]["accuracy"]["high"]
    else:
        half = 1.96 * (standard_error(correct) or 0.0)
        low, high = max(0.0, value - half), min(1.0, value + half)
    difference, ratio = "–", "–"
    if reference is not None and group is not reference:
        other = _per_question(reference, "correct")
        if len(other) == len(correct):
            apart = [own - their for own, their in zip(correct, other, strict=True)]
            difference = f"{100 * statistics.fmean(apart):+.1f} ± {196 * (standard_error(apart) or 0.0):.1f}"
    steps = [result["step_seconds"] for result in group if result.get("step_seconds")]
    cpu = [
        result["train_cpu_seconds"] / result["cell"]["steps"]
        for result in group
        if "train_cpu_seconds" in result
    ]
    if reference is not None and steps:
        ratio = f"{statistics.median(steps) / statistics.median(r['step_seconds'] for r in reference):.2f}"
    accuracies = [100 * result["accuracy"]["value"] for result in group]
    return [
        label,
        "–" if base else f"{lr:g}",
        str(len(group)),
        _spread(accuracies, "{:.1f}", " %"),
        f"{100 * low:.1f}–{100 * high:.1f}",
        difference,
        f"{100 * _mean(group, 'accuracy_raw', 'value'):.1f} %",
        _spread([result["right_loss"]["value"] for result in group], "{:.2f}"),
        f"{_mean(group, 'right_loss_per_token', 'value'):.3f}",
        "–" if base else _spread([result["wikitext"]["kl"] for result in group], "{:.4f}"),
        "–" if base else _spread([result["wikitext"]["loss_change"] for result in group], "{:+.4f}"),
        f"{statistics.median(steps):.2f}" if steps else "–",
        ratio,
        f"{statistics.median(cpu):.2f}" if cpu else "–",
        "–" if base else f"{max(result['training_peak_bytes'] for result in group) / 2**30:.2f}",
        "–" if base else f"{group[0]['trainable_parameters']:,}",
    ]


def _note(results: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None) -> str:
    some = results[-1]
    base = {round(result["wikitext"]["base_loss"], 4) for result in results}
    steps = sorted({result["cell"]["steps"] for result in results if result["cell"]["method"] != BASE})
    compared = f" lora is the row with lr {reference[0]['cell']['lr']:g}." if reference else ""
    return (
        f"{some['model']}, float32, {', '.join(map(str, steps))} steps; {len(some['correct'])} dev questions by option "
        "likelihood per token (raw: their sum). Losses and KL in nats; loss of the right option per question. "
        "± is one standard error over seeds. The 95 % interval is over questions (Wilson for one seed, else normal "
        "over the questions' means), and so is the paired difference, in points."
        f"{compared} WikiText: {some['wikitext']['tokens']} tokens, loss of the base model "
        f"{', '.join(f'{one:.4f}' for one in sorted(base))}. Step: median over steps, then over seeds, measured in "
        "separate processes; the ratios carry whatever else the machine did. CPU time: of all threads, start included."
    )


def _per_question(group: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [statistics.fmean(own) for own in zip(*(result[name] for result in group), strict=True)]


def _mean(group: Sequence[Mapping[str, Any]], *path: str) -> float:
    values = []
    for result in group:
        found: Any = result
        for name in path:
            found = found[name]
        values.append(float(found))
    return statistics.fmean(values)


def _spread(values: Sequence[float], shape: str, unit: str = "") -> str:
    error = standard_error(values)
    told = shape.format(statistics.fmean(values))
    return told + (f" ± {shape.replace('+', '').format(error)}" if error is not None else "") + unit


# --- the command line -------------------------------------------------------------------------------------


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    if arguments.label and len(arguments.method) > 1:
        raise ConfigError("--label names one variant; give one --method with it.")
    options = named_values(arguments.set)
    if options and not arguments.label:
        raise ConfigError("--set makes a variant of a method; name it with --label.")
    rates = [float(rate) for rate in arguments.lr.split(",")]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    cells = []
    for method in arguments.method:
        # Nothing is random in the base model, and nothing is learned.
        base = method == BASE
        for rate in [0.0] if base else rates:
            for seed in [0] if base else seeds:
                cells.append(
                    Cell(
                        label=arguments.label or method, method=method, seed=seed, lr=rate, r=arguments.r,
                        alpha=arguments.alpha, options=copy.deepcopy(options), steps=arguments.steps,
                        batch_size=arguments.batch_size, schedule=arguments.schedule, warmup=arguments.warmup,
                        weight_decay=arguments.weight_decay, questions=arguments.questions,
                        wikitext_tokens=arguments.wikitext_tokens, window=arguments.window,
                    )
                )  # fmt: skip
    for cell in cells:
        if "_seed" in cell.label or "/" in cell.label:
            raise ConfigError(f"The label '{cell.label}' becomes a file's name; leave out '/' and '_seed'.")
        if cell.method != BASE:
            _config(cell)  # a wrong setting is told before anything runs
    return cells


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder with commonsense/ and text/")
    add("--output", type=Path, required=True, help="folder of the results")
    add("--table", action="store_true", help="print the results as a Markdown table and run nothing")
    add(
        "--method",
        action="append",
        default=[],
        help="base, a method of dynalora, or one of PEFT's (lora, adalora, pissa, …); repeatable",
    )
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the configuration")
    add("--label", help="name of the variant (default: the method)")
    add("--lr", default="5e-4", help="learning rates, separated by commas")
    add("--seeds", default="0", help="of data order and adapter start, separated by commas")
    add("--steps", type=int, default=100)
    add("--batch-size", type=int, default=8)
    add("--schedule", default="linear", help="linear, cosine or constant_with_warmup")
    add("--warmup", type=float, default=0.05, help="part of the steps")
    add("--weight-decay", type=float, default=0.0)
    add("--r", type=int, default=16)
    add("--alpha", type=float, help="default: the method's own")
    add("--questions", type=int, default=500, help="dev questions to measure on")
    add("--wikitext-tokens", type=int, default=8192)
    add("--window", type=int, default=256, help="tokens of WikiText seen at once")
    add("--threads", type=int, default=2)
    add("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments, console = _arguments(), Console(soft_wrap=True)
    try:
        if arguments.table:
            print(table(arguments.output))
            return 0
        if arguments.data is None:
            raise ConfigError("--data is missing; give the folder with commonsense/ and text/.")
        if arguments.cell:
            cell = Cell(**json.loads(arguments.cell))
            result = run_cell(cell, arguments.data, arguments.threads, console)
            write_file(arguments.output / cell.file, json.dumps(result, indent=1) + "\n")
            return 0
        if not arguments.method:
            raise ConfigError("--method is missing; give base, lora, adalora, pissa or a method of dynalora.")
        return 1 if run_cells(_cells(arguments), arguments, console) else 0
    except DynaloraError as error:
        console.print(f"Error: {error}", style="red", highlight=False, markup=False)
        return 2


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
