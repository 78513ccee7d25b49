"""Checkpoints that a killed run continues from, and the saved adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dynalora.adapter.saved import check_adapter_folder
from dynalora.common.files import file_beside
from dynalora.errors import CheckpointError
from dynalora.lab.run_folder import RunFolder


def last_checkpoint(folder: Path, *, needs: str | None = None) -> Path | None:
    """The newest checkpoint in a folder that was written to its end and has the file it `needs`; else None.

    A run may be killed while it writes a checkpoint, so the newest folder is not always a whole one.
    """
    if not folder.is_dir():
        return None
    numbered = [
        (int(match[1]), entry)
        for entry in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", entry.name)) and entry.is_dir()
    ]
    for _, entry in sorted(numbered, reverse=True):
        # The trainer writes its state last but for the arguments.
        if (entry / "trainer_state.json").exists() and _is_whole(entry) and (entry / (needs or "")).exists():
            return entry
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        check_adapter_folder(str(checkpoint))
        for part in checkpoint.glob("model*.safetensors"):
            with safe_open(part, framework="pt"):
                pass
    except (CheckpointError, SafetensorError):
        return False
    # A full model's weights may lie in several files; their index is written last.
    weights = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
    return any((checkpoint / name).exists() for name in weights) and (checkpoint / "optimizer.pt").exists()


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
    return run.path / name
