"""`dynalora merge`: a whole model with the adapter's update in its weights, which loads without dynalora and PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

from dynalora.common.files import folder_beside
from dynalora.errors import DynaloraError, UnsupportedError, first_line
from dynalora.evaluation.causal import causal_pass
from dynalora.jobs.finetune.trained import run_of, tokenizer_of
from dynalora.jobs.merge.settings import MergeSpec
from dynalora.lab.adapters import load_adapter, read_config
from dynalora.lab.baselines import prompt_only
from dynalora.lab.choices import DTYPES
from dynalora.lab.models import local_model_name, model_config
from dynalora.lab.report import say


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote.

    Attributes:
        path: The folder.
        dtype: Data type of the weights.
        shards: Number of safetensors files.
        max_error: Largest difference between the logits of the adapter on its base model and of the merged model, on
            random tokens, relative to the largest logit.
    """

    path: str
    dtype: str
    shards: int
    max_error: float


def run_merge(spec: MergeSpec, *, console: Console) -> None:
    """Merge, and say what was written and what to do with it."""
    report = merge(spec.adapter, spec.output, model=spec.model, dtype=spec.dtype)
    run = run_of(spec.adapter)
    if run is not None and run.quantization is not None:
        say(
            console,
            f"The adapter was trained on base weights held in {run.quantization} and is now in the full ones, so it "
            "may answer a little otherwise than in training.",
        )
    files = "1 safetensors file" if report.shards == 1 else f"{report.shards} safetensors files"
    say(
        console,
        f"{report.path}: the whole model in {report.dtype}, {files}, with its tokenizer; largest difference of its "
        f"logits from the adapter's {report.max_error:.1e} of the largest.",
        f'Load it: AutoModelForCausalLM.from_pretrained("{report.path}"); serve it: vllm serve {report.path}',
    )


def merge(source: str, output: str, *, model: str | None = None, dtype: str | None = None) -> MergeReport:
    """Merge a saved adapter into its base model, and write the whole model with its tokenizer.

    The sum is computed in the adapter's data type and rounded once to the weights'.

    Args:
        source: Run folder, adapter folder or Hub id of an adapter.
        output: Folder to write, new or empty.
        model: The base model; None: the one that the adapter names.
        dtype: Data type of the written weights; None: as in the base model's files.

    Raises:
        UnsupportedError: The adapter's update is no change of weights, or the base model's weights are quantised, so
            that the merged model would compute something else.
        CheckpointError: There is no adapter, it is damaged, or it does not fit the base model.
        ConfigError: The base model cannot be loaded.
    """
    config = read_config(source)
    if getattr(config, "gated", False):
        raise UnsupportedError(
            f"The update of '{source}' depends on the input, through its gates, and weights cannot hold that; export a "
            f"snapshot of the gates first (dynalora export {source} SNAPSHOT --calibrate DATA), then merge that one "
            f"(dynalora merge SNAPSHOT --output {output})."
        )
    if prompt_only(config):
        raise UnsupportedError(
            f"'{source}' learned virtual tokens, which are no change of weights; keep the adapter beside its base "
            "model."
        )
    base = local_model_name(model or str(config.base_model_name_or_path))
    written = dtype or checkpoint_dtype(base)
    adapted = load_adapter(source, base, dtype=written)
    adapted.eval()
    if getattr(adapted.get_base_model(), "is_quantized", False):
        raise UnsupportedError(
            f"The weights of '{base}' are quantised, so the merged model would be rounded to fewer bits and compute "
            "something else; name the model in full precision with --model."
        )
    tokens = torch.randint(adapted.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    before = _logits(adapted, tokens)
    merged = _merged(adapted, source)
    error = (_logits(merged, tokens) - before).abs().max() / before.abs().max()
    tokenizer = tokenizer_of(source, base)
    with folder_beside(output, replace=False) as beside:
        merged.save_pretrained(str(beside))
        tokenizer.save_pretrained(str(beside))
        shards = len(list(beside.glob("*.safetensors")))
    name = str(next(merged.parameters()).dtype).removeprefix("torch.")
    return MergeReport(str(output), name, shards, float(error))


def checkpoint_dtype(name: str) -> str:
    """The data type of a model's files, as far as it is one to merge in; else float32."""
    stored = str(getattr(model_config(name), "dtype", None)).removeprefix("torch.")
    return stored if stored in DTYPES else "float32"


def _merged(adapted: PeftModel, source: str) -> Any:
    """The base model with the update in its weights."""
    try:
        tuner: Any = adapted.base_model
        model = tuner.merge_and_unload(safe_merge=True)
    except DynaloraError:
        raise
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"PEFT cannot merge the adapter '{source}' ({first_line(error)}); keep it beside its base model."
        ) from error
    for trace in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(trace, None)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(embedding, "weight", None):
        model.config.tie_word_embeddings = False  # one of the two has been adapted
    return model


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return causal_pass(model, tokens, torch.ones_like(tokens))[0].float()
