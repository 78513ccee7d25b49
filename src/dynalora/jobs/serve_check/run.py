"""`dynalora serve-check`: which servers take an adapter as it is, why others do not, and what to type for them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftType
from rich.console import Console

from dynalora.adapter.config import AdapterConfig
from dynalora.errors import UnsupportedError, first_line
from dynalora.export.lora import export_adapter_folder
from dynalora.export.serving import Serving, check_serving
from dynalora.jobs.serve_check.settings import ServeCheckSpec
from dynalora.lab.adapters import adapter_folder, read_config
from dynalora.lab.baselines import prompt_only
from dynalora.lab.report import Cell, Table, say

SERVERS = ("vLLM", "SGLang", "llama.cpp")


@dataclass(frozen=True)
class Verdict:
    """What a server makes of an adapter.

    Attributes:
        server: The server's name.
        takes: Whether it takes the files as they are.
        reason: What it has to be told, or what keeps it from taking them; may be empty.
        remedy: What to type so that it takes them; empty where it does, or where nothing helps.
    """

    server: str
    takes: bool
    reason: str = ""
    remedy: str = ""


def run_serve_check(spec: ServeCheckSpec, *, console: Console) -> None:
    """Show a row for every server."""
    rows: list[list[Cell]] = [
        [verdict.server, "yes" if verdict.takes else "no", verdict.reason or "–", verdict.remedy or "–"]
        for verdict in serve_check(spec.adapter)
    ]
    say(
        console,
        Table(
            ["server", "takes it as it is", "what it needs, or why not", "what to type"], rows,
            title=f"Who can serve {spec.adapter}",
            note="Checked by the servers' own rules on the files; nothing was started. Whether a server knows the base "
            "model is not checked.",
        ),
    )  # fmt: skip


def serve_check(source: str) -> list[Verdict]:
    """Who can serve a saved adapter: PEFT itself, vLLM, SGLang and llama.cpp.

    Adapters of dynalora's methods are exported to a temporary folder, and the servers' rules are applied to that.

    Args:
        source: Run folder, adapter folder or Hub id of an adapter.

    Raises:
        CheckpointError: There is no adapter, it is damaged, or its method is unknown here.
    """
    folder = adapter_folder(source)
    config = read_config(source)
    own = isinstance(config, AdapterConfig)
    verdicts = [Verdict("PEFT", True, "import dynalora before the adapter is loaded" if own else "")]
    merging = f"dynalora merge {source} --output FOLDER, and serve the whole model"
    if config.peft_type == PeftType.LORA:
        return verdicts + [_of_lora(serving, merging) for serving in check_serving(folder)]
    if isinstance(config, AdapterConfig):
        return verdicts + _of_exports(folder, source, config, merging)
    kind = "learned virtual tokens" if prompt_only(config) else f"is a {str(config.peft_type).rpartition('.')[2]}"
    remedy = "" if prompt_only(config) else merging
    return verdicts + [Verdict(name, False, f"it knows LoRA alone, and this {kind}", remedy) for name in SERVERS]


def _of_lora(serving: Serving, merging: str) -> Verdict:
    if not serving.problems:
        return Verdict(serving.server, True, "; ".join(serving.needs))
    return Verdict(serving.server, False, "; ".join(serving.problems), merging)


def _of_exports(folder: str, source: str, config: AdapterConfig, merging: str) -> list[Verdict]:
    """What servers make of an adapter of dynalora, by what they make of its exports."""
    unknown = f"it knows LoRA alone, and this is {config.method.upper()}"
    commands = {None: f"dynalora export {source} OUTPUT", 0: f"dynalora export {source} OUTPUT --uniform-rank 0"}
    checked: list[tuple[str, Sequence[Serving]]] = []
    with tempfile.TemporaryDirectory(prefix="dynalora-export-") as place:
        for number, (uniform, command) in enumerate(commands.items()):
            try:
                report = export_adapter_folder(folder, str(Path(place) / str(number)), uniform_rank=uniform)
            except UnsupportedError as error:
                remedy = merging
                if config.gated:
                    remedy = f"dynalora export {source} OUTPUT --calibrate DATA, a snapshot of the gates"
                return [Verdict(name, False, f"{unknown}; {first_line(error)}", remedy) for name in SERVERS]
            checked.append((command, report.serving))
    verdicts = []
    for index, name in enumerate(SERVERS):
        exported = [(command, servings[index]) for command, servings in checked]
        taken = next(((command, serving) for command, serving in exported if not serving.problems), None)
        if taken is None:
            verdicts.append(Verdict(name, False, f"{unknown}; {'; '.join(exported[-1][1].problems)}", merging))
            continue
        command, serving = taken
        needs = f", then {'; '.join(serving.needs)}" if serving.needs else ""
        verdicts.append(Verdict(name, False, unknown, command + needs))
    return verdicts
