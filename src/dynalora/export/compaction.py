"""Compacting a saved adapter."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from dynalora.adapter.compaction import THRESHOLD, Compaction, compact
from dynalora.adapter.layer import adapter_layers
from dynalora.common.files import folder_beside
from dynalora.errors import DynaloraError
from dynalora.export.lora import load_without_base


def compact_adapter_folder(
    source: str, path: str | os.PathLike[str], threshold: float = THRESHOLD, *, rewrite: bool = True
) -> Compaction:
    """Write a smaller copy of a saved adapter, without its base model; see `dynalora.compact`.

    Whatever else the adapter's file holds (a trained head, biases, its clock) is copied as it is.

    Args:
        source: Folder of the saved adapter.
        path: Folder to write; must not exist, or be empty.
        threshold: What counts as dead, a share of the largest singular value over all matrices.
        rewrite: Whether factors may be rewritten to singular components where that removes more.

    Returns:
        What was removed.

    Raises:
        CheckpointError: The source holds no whole adapter of dynalora.
        ConfigError: `threshold` is out of range.
        UnsupportedError: The method's components cannot be removed.
        DynaloraError: The folder to write is not empty.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DynaloraError(
            f"{target} already exists and is not an empty folder; choose another path for the compacted adapter."
        )
    model = load_without_base(source)
    done = compact(model, threshold, rewrite=rewrite)
    state = load_file(os.path.join(source, SAFETENSORS_WEIGHTS_NAME))
    state |= {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    settings = json.loads(Path(source, CONFIG_NAME).read_text(encoding="utf-8"))
    # Loaded onto stand-ins, the configuration names its modules anew; only what follows from the ranks is taken over.
    layers = adapter_layers(model, "default")
    config: Any = next(iter(layers.values())).drivers["default"].config
    settings |= config.describe(layers.values(), "default")
    with folder_beside(target, replace=False) as beside:
        (beside / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        save_file(state, beside / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        card = Path(source, "README.md")
        if card.is_file():
            shutil.copy(card, beside)
    return done
