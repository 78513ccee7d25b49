"""Checkpoints that a killed run continues from, and the saved adapter."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dynalora.adapter.saved import check_adapter_folder
from dynalora.common.cards import tidy_card
from dynalora.common.files import file_beside
from dynalora.errors import CheckpointError
from dynalora.lab.run_folder import RunFolder


def last_checkpoint(folder: Path, *, needs: str | None = None, say: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint in a folder that is whole and has the file it `needs`; else None.

    A run may be killed while it writes a checkpoint, and disks may lose a part of one. Going on without a part would
    end elsewhere: transformers leaves out optimizer and schedule, without a word, if one of the two is missing.

    Args:
        folder: Where the checkpoints are.
        needs: A further file that each must have.
        say: Called with a sentence for each newer checkpoint that is passed over.
    """
    if not folder.is_dir():
        return None
    numbered = [
        (int(match[1]), entry)
        for entry in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", entry.name)) and entry.is_dir()
    ]
    for step, entry in sorted(numbered, reverse=True):
        reason = _what_is_wrong(entry, step, needs)
        if reason is None:
            return entry
        if say is not None:
            say(f"The checkpoint '{entry}' is not whole ({reason}), so it is passed over for an older one.")
    return None


def _what_is_wrong(checkpoint: Path, step: int, needs: str | None) -> str | None:
    """Why a run cannot go on from a checkpoint exactly; None if it can."""
    try:
        check_adapter_folder(str(checkpoint))
        for part in checkpoint.glob("model*.safetensors"):
            with safe_open(part, framework="pt"):
                pass
    except (CheckpointError, SafetensorError, OSError):
        return "its weights are damaged"
    # A full model's weights may lie in several files; their index is written last.
    weights = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
    if not any((checkpoint / name).exists() for name in weights):
        return "it has no weights"
    for name in ("optimizer.pt", "scheduler.pt", needs):
        if name is not None and not (checkpoint / name).is_file():
            return f"it has no {name}"
    random = sorted(checkpoint.glob("rng_state*.pth"))
    if not random:
        return "it has no rng_state.pth"
    for file in (*checkpoint.glob("*.pt"), *random):
        if not _is_sound(file):
            return f"{file.name} is damaged"
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return None if state["global_step"] == step else "its trainer_state.json is of another step"
    except (OSError, ValueError, KeyError, TypeError):
        return "its trainer_state.json is missing or damaged"


def _is_sound(file: Path) -> bool:
    """Whether what `torch.save` wrote is there to the last byte: a ZIP file with a check sum of every part."""
    try:
        with zipfile.ZipFile(file) as parts:
            return parts.testzip() is None
    except Exception:  # of a damaged directory, zipfile raises whatever its values lead to
        return False


class NothingLeft(Exception):
    """Raised by [`StopAtEnd`][dynalora.lab.training.checkpoints.StopAtEnd]."""


class StopAtEnd(TrainerCallback):
    """Ends a training that goes on from a checkpoint of its last step, of which the trainer would make one more.

    Such a run was killed later, while it was measured. It must be the last callback, so that all others have begun.

    Args:
        stopped: Whether the run had ended at the step of its checkpoint, before the steps that it was asked for.
    """

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if 0 < state.max_steps <= state.global_step or (state.global_step > 0 and self._stopped()):
            raise NothingLeft


class KeepPrompt(TrainerCallback):
    """Checkpoints of prompt learning that a run can go on from.

    PEFT saves the virtual tokens that come out of the prompt's encoder, which is all that inference needs; what trains
    are the encoder and its inputs.
    """

    FILE = "prompt_encoder.safetensors"

    def __init__(self, model: PeftModel, checkpoint: Path | None) -> None:
        self._model, self._checkpoint = model, checkpoint

    def _trained(self) -> dict[str, torch.Tensor]:
        named = self._model.named_parameters()
        return {name: parameter.data for name, parameter in named if parameter.requires_grad}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        target = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE
        with file_beside(target) as beside:
            save_file({name: tensor.contiguous() for name, tensor in self._trained().items()}, beside)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._checkpoint is not None:  # the trainer has loaded its part by now
            saved = load_file(self._checkpoint / self.FILE)
            for name, tensor in self._trained().items():
                tensor.copy_(saved[name])


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, run: RunFolder, *, name: str = "adapter"
) -> Path:
    """Save an adapter with its tokenizer into a run folder, all or nothing; returns the folder."""
    with run.replacing(name) as folder:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        tidy_card(folder)
    return run.path / name
