"""Load a saved adapter onto its base model, refusing a damaged one before any weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from dynalora.adapter.saved import check_adapter_folder, check_known
from dynalora.common.names import is_path
from dynalora.errors import CheckpointError, ConfigError, first_line
from dynalora.evaluation.heads import ALL_HEADS, CAUSAL_LM, Head, described
from dynalora.lab.models import load_model, load_tokenizer
from dynalora.lab.run_folder import STATUS, RunFolder


def adapter_folder(source: str | os.PathLike[str]) -> str:
    """The local folder of an adapter: a run folder's `adapter/`, the folder itself, or what is fetched from the Hub.

    Raises:
        CheckpointError: The folder holds no adapter, or only part of one.
    """
    path = Path(source)
    if not path.exists():
        if isinstance(source, Path) or is_path(str(source)) or "/" not in str(source):
            raise CheckpointError(f"There is no adapter '{source}'; give a run folder, an adapter folder or a Hub id.")
        files = ["adapter_config.json", "adapter_model.safetensors"]
        folder = Path(_fetched(str(source), files, "a run folder, an adapter folder or a Hub id"))
        check_adapter_folder(str(folder))
        return str(folder)
    if path.is_file() and path.name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        path = path.parent
    if not path.is_dir():
        raise CheckpointError(f"'{source}' is no adapter, but a file; {_REMEDY}.")
    inside = path / "adapter"
    folder = inside if not (path / "adapter_config.json").exists() and inside.is_dir() else path
    if not (folder / "adapter_config.json").exists():
        raise CheckpointError(f"'{source}' holds no adapter ({_why_none(path)}).")
    check_adapter_folder(str(folder))
    if not (folder / "adapter_model.safetensors").exists():
        raise CheckpointError(f"'{folder}' has no adapter_model.safetensors; save the adapter again.")
    return str(folder)


_REMEDY = "give a run folder, an adapter folder or a Hub id"


def _why_none(folder: Path) -> str:
    """Why a folder holds no adapter, and what to do, in a clause."""
    if not (folder / STATUS).exists():
        return f"it has no {CONFIG_NAME}; {_REMEDY}"
    if not RunFolder.has_finished(folder):
        return "the run did not finish; resume it"
    # Experiments keep the adapter of every stage.
    deeper = sorted(file.parent for depth in ("*/*", "*/*/*") for file in folder.glob(f"{depth}/{CONFIG_NAME}"))
    if deeper:
        return f"it has {len(deeper)} deeper inside; name one, such as '{deeper[0]}'"
    return f"this kind of run keeps none; {_REMEDY}"


def model_folder(source: str | os.PathLike[str]) -> str:
    """The local folder of a full model: the folder itself, or what is fetched from the Hub, in safetensors only.

    Raises:
        CheckpointError: There is no such folder, and nothing of that name on the Hub.
    """
    if Path(source).is_dir():
        return str(source)
    if isinstance(source, Path) or is_path(str(source)):
        raise CheckpointError(f"There is no model '{source}'; give the folder or the Hub id of a full model.")
    return _fetched(str(source), ["*.safetensors", "*.json"], "the folder or the Hub id of a model")


def _fetched(name: str, patterns: list[str], remedy: str) -> str:
    """The local copy of some files of a repository on the Hub; `remedy` says in the error what to give instead."""
    try:
        return str(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client's, the network's and the file system's errors
        raise CheckpointError(
            f"There is no folder '{name}', and it cannot be fetched from the Hub ({first_line(error)}); give {remedy}."
        ) from error


def read_config(source: str | os.PathLike[str]) -> PeftConfig:
    """The configuration of a saved adapter, after its files were checked.

    Raises:
        CheckpointError: There is no adapter, it is damaged, or its method is unknown here.
    """
    folder = adapter_folder(source)
    check_known(folder)
    try:
        config: PeftConfig = PeftConfig.from_pretrained(folder)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The adapter '{source}' cannot be read ({first_line(error)}).") from error
    return config


def base_tokenizer(source: str, model: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of an adapter's base model: of `model` if that is given, else of the one the adapter names."""
    return load_tokenizer(model or str(read_config(source).base_model_name_or_path))


def load_adapter(
    source: str | os.PathLike[str] | None,
    model: str | None = None,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    heads: Sequence[Head] = (CAUSAL_LM,),
    labels: int = 2,
) -> PeftModel:
    """A saved adapter on its base model, for inference.

    Args:
        source: A run folder, an adapter folder or a Hub id.
        model: The base model; None: the one the adapter names.
        dtype: Of the base model's weights, as in
            [`FinetuneSpec`][dynalora.jobs.finetune.settings.FinetuneSpec].
        quantization: Likewise.
        heads: Of the base model, as in [`load_model`][dynalora.lab.models.load_model].
        labels: For a classifier, number of classes; 1: a value.

    Raises:
        CheckpointError: There is no adapter, it is damaged, or it does not fit the base model.
        ConfigError: No adapter is given, or the base model is unknown or cannot be loaded.
    """
    if not source:
        raise ConfigError("No adapter is given; name a run folder, an adapter folder or a Hub id.")
    config = read_config(source)
    check_task(config, source, heads)
    name = model or config.base_model_name_or_path
    if not name:
        raise ConfigError(f"The adapter '{source}' does not say which base model it belongs to; name it with --model.")
    base = load_model(name, dtype=dtype, quantization=quantization, heads=heads, labels=labels)
    folder = adapter_folder(source)
    try:
        adapted = PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"The adapter '{source}' does not fit the model '{name}' ({first_line(error)})."
        ) from error
    _check_weights(adapted, folder, name)
    return adapted


def check_task(config: PeftConfig, source: str | os.PathLike[str], heads: Sequence[Head]) -> None:
    """Refuse an adapter that was trained with another kind of model than is needed.

    Args:
        config: The adapter's configuration. One without a task type is taken for any.
        source: Where the adapter is, for the error.
        heads: The kinds of models that will do.

    Raises:
        ConfigError: None of them is the adapter's.
    """
    trained = next((head for head in ALL_HEADS if head.task_type == config.task_type), None)
    if trained is None or trained in heads:
        return
    raise ConfigError(
        f"The adapter '{source}' was trained with {trained.description} ({trained.task_type}), and "
        f"{described(heads)} is needed here; choose tasks of the adapter's kind, or another adapter."
    )


def _check_weights(adapted: PeftModel, folder: str, name: str) -> None:
    """Refuse an adapter of which weights have no place in the model, are not there, or are no numbers.

    Otherwise PEFT would leave them out, or as they are in a new adapter, or compute nonsense, all in silence.
    """
    with safe_open(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        saved = set(file.keys())
        odd = next((key for key in sorted(saved) if not _finite(file.get_tensor(key))), None)
    places = set(get_peft_model_state_dict(adapted))
    leftover = sorted(saved - places)
    if leftover:
        raise CheckpointError(
            f"The adapter in '{folder}' does not fit the model '{name}': {len(leftover)} of its {len(saved)} weights "
            f"have no place there (the first: {leftover[0]}); name its base model with --model."
        )
    own = str(getattr(adapted.base_model, "prefix", "") or "\0")
    lacking = sorted(key for key in places - saved if own in key)
    if lacking:
        raise CheckpointError(
            f"The adapter in '{folder}' lacks {len(lacking)} of the weights that its configuration names (the first: "
            f"{lacking[0]}); use another copy of it."
        )
    if odd is not None:
        raise CheckpointError(f"The adapter in '{folder}' has NaN or infinite values in {odd}; use another copy of it.")


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
