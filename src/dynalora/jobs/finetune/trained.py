"""A trained adapter taken up again: on its base model, with its tokenizer and the settings of its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.adapters import adapter_folder, load_adapter, read_config
from dynalora.lab.models import load_tokenizer, local_model_name, placed
from dynalora.lab.run_folder import CONFIG
from dynalora.lab.settings import read_yaml, settings_from


@dataclass(frozen=True)
class Trained:
    """An adapter that can be used.

    Attributes:
        model: The adapter on its base model, in evaluation mode, on a GPU if there is one.
        tokenizer: The one that was saved with the adapter, which writes prompts as they were in training; else the
            base model's.
        run: The settings of the fine-tuning run that it comes from; None if it comes from none.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    run: FinetuneSpec | None


def run_of(source: str) -> FinetuneSpec | None:
    """The settings of the fine-tuning run that an adapter comes from; None if it comes from none."""
    file = Path(source) / CONFIG
    values = read_yaml(file) if file.exists() else {}
    if not {"model", "data", "method"} <= set(values):
        return None
    return settings_from(FinetuneSpec, values, source=f"'{file}'")


def tokenizer_of(source: str, model: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with an adapter; else that of `model`, or of the base model that it names."""
    folder = adapter_folder(source)
    if (Path(folder) / "tokenizer_config.json").exists():
        return load_tokenizer(folder, template=None)
    return load_tokenizer(model or str(read_config(source).base_model_name_or_path), template=None)


def load_trained(
    source: str, model: str | None = None, *, dtype: str | None = None, quantization: str | None = None
) -> Trained:
    """Load an adapter to use it.

    Args:
        source: Run folder, adapter folder or Hub id.
        model: The base model; None: the one that the adapter names.
        dtype: Data type of the base model's weights; None: as in the run, else auto.
        quantization: Hold the base weights in fewer bits; None: as in the run.

    Raises:
        CheckpointError: There is no adapter, it is damaged, or it does not fit the base model.
        ConfigError: The base model is unknown or cannot be loaded.
    """
    run = run_of(source)
    base = local_model_name(model) if model is not None else None
    adapted = load_adapter(
        source,
        base,
        dtype=dtype or (run.dtype if run is not None else "auto"),
        quantization=quantization or (run.quantization if run is not None else None),
    )
    adapted.eval()
    return Trained(placed(adapted, "cuda" if torch.cuda.is_available() else None), tokenizer_of(source, base), run)
