"""Base models and tokenizers, by Hub id or folder, without and with their weights, in any precision."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynalora.common.extras import install
from dynalora.common.names import is_path
from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError, first_line
from dynalora.evaluation.chat_templates import check_chat_template
from dynalora.evaluation.heads import CAUSAL_LM, MASKED_LM, Head, head_of
from dynalora.evaluation.prompts import use_template
from dynalora.evaluation.tokens import ensure_chat_template, ensure_pad_token
from dynalora.lab.choices import QUANTIZATIONS, check_quantization
from dynalora.lab.packaged_models import demo_model

logger = logging.getLogger(__name__)


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype for one of [`DTYPES`][dynalora.lab.choices.DTYPES] on this machine."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def new_layers(model: nn.Module) -> list[str]:
    """Linear layers that a checkpoint without this head need not have: the head, and the pooler before it.

    transformers would make quantised layers of them and then leave their new weights as they are, which works nowhere.
    """
    encoder = f"{getattr(model, 'base_model_prefix', '')}."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (not name.startswith(encoder) or "pooler" in name.split("."))
    ]


def quantization_config(name: str, dtype: torch.dtype, *, whole: list[str] | None = None) -> Any:
    """Settings of transformers for a way to hold the base weights.

    4-bit weights are multiplied in `dtype`; the layers `whole` stay as they are (None: the output layer).

    Raises:
        ConfigError: There is no such way, or its library is not installed.
    """
    check_quantization(name)
    try:
        if name == "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=whole)
        four = name == "4bit"
        return transformers.BitsAndBytesConfig(
            load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=whole,
        )  # fmt: skip
    except ImportError as error:
        raise not_installed(name, error) from error


def not_installed(quantization: str, error: ImportError) -> ConfigError:
    """The error to raise where quantization lacks its library."""
    return ConfigError(
        f"quantization '{quantization}' needs a library that is not installed ({first_line(error)}); run: "
        f"{install(QUANTIZATIONS.get(quantization, 'quant'))}."
    )


DEMO_ALIAS = "smollm2"


def local_model_name(name: str, *, progress: Progress = silent) -> str:
    """What `from_pretrained` takes for a model's name: `smollm2` is the demo's model, wherever it is to be had."""
    if name.lower() != DEMO_ALIAS:
        return name
    return demo_model(progress=progress).path


def empty_model(
    name: str, *, trust_remote_code: bool = False, heads: Sequence[Head] = (CAUSAL_LM,), labels: int = 2
) -> nn.Module:
    """The model of [`load_model`][dynalora.lab.models.load_model] on the meta device: all modules, no weights.

    Raises:
        ConfigError: There is no such model, or it is not of that kind.
    """
    config, head = _configured(name, heads, trust_remote_code)
    if head.labelled:
        config.num_labels = labels
    try:
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, f"AutoModelFor{head.model_class}").from_config(
                config, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(name, error, head.description) from error
    return model


def _configured(name: str, heads: Sequence[Head], trust_remote_code: bool) -> tuple[Any, Head]:
    """A model's configuration, and which of several kinds of models it is.

    Raises:
        ConfigError: There is no such model, or it is of another kind.
    """
    config = model_config(name, trust_remote_code=trust_remote_code, what=heads[0].description)
    head = head_of(config, heads)
    if head is None:
        raise ConfigError(
            f"The model '{name}' is an encoder-decoder ({config.model_type}), and {heads[0].description} is needed "
            "here; encoder-decoders can be trained with `dynalora compare` and with a Trainer of your own."
        )
    masked = next((name for name in getattr(config, "architectures", None) or () if name.endswith("ForMaskedLM")), None)
    if head is CAUSAL_LM and masked is not None and not getattr(config, "is_decoder", False):
        # transformers loads it all the same, and every token then sees those that it should predict.
        raise ConfigError(
            f"The model '{name}' is a masked language model ({masked}), whose tokens see what follows, and "
            f"{CAUSAL_LM.description} is needed here; masked ones can be trained on tasks of classification with "
            "`dynalora compare`."
        )
    return config, head


def model_config(name: str, *, trust_remote_code: bool = False, what: str = "a causal language model") -> Any:
    """A model's configuration.

    Args:
        name: Hub id or folder.
        trust_remote_code: Run code that comes with the model.
        what: What is needed, for the error.

    Raises:
        ConfigError: There is no such model, or its files cannot be understood.
    """
    _check_place(name, what)
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # a stranger's file can hold anything, and each kind of model fails in its own way
        raise _unusable(name, error, what) from error


def _check_place(name: str, what: str) -> None:
    """Refuse a folder that is not there, before the Hub is asked for it.

    Raises:
        ConfigError: It is not there.
    """
    if is_path(name) and not Path(name).expanduser().exists():
        raise ConfigError(
            f"The model '{name}' cannot be used (there is no such folder); give the Hub id or the folder of {what}."
        )
    if is_path(name) and Path(name).expanduser().is_file():
        raise ConfigError(
            f"The model '{name}' is a file; give the Hub id, or the folder that holds its config.json, of {what}."
        )


def _unusable(name: str, error: Exception, what: str) -> ConfigError:
    return ConfigError(
        f"The model '{name}' cannot be used ({first_line(error)}); give the Hub id or the folder of {what}."
    )


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, template: str | None = "chat"
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a chat template and a padding token.

    Args:
        name: Of the model.
        trust_remote_code: Run code that comes with the model.
        template: `chat` for the model's own chat template, or a paper's prompt format, see
            [`prompts`][dynalora.evaluation.prompts]; None: the tokenizer is for a model that is not asked anything.

    Raises:
        ConfigError: There is none, or no such template.
        DataError: The model's chat template does not come to an end.
    """
    _check_place(name, "a model with a tokenizer")
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a stranger's file can hold anything
        folder = Path(name).expanduser()
        reason = first_line(error)
        if folder.is_dir() and not any(file.name.startswith(("token", "vocab", "spiece")) for file in folder.iterdir()):
            reason = "its folder has none"
        raise ConfigError(
            f"The tokenizer of '{name}' cannot be loaded ({reason}); copy or download the model again."
        ) from error
    if template is not None:
        use_template(tokenizer, template)
        check_chat_template(tokenizer)
        ensure_chat_template(tokenizer)
    ensure_pad_token(tokenizer)
    return tokenizer


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    trust_remote_code: bool = False,
    heads: Sequence[Head] = (CAUSAL_LM,),
    labels: int = 2,
) -> PreTrainedModel:
    """The model with its weights.

    Args:
        name: Hub id or folder.
        dtype: Of the weights.
        quantization: One of [`QUANTIZATIONS`][dynalora.lab.choices.QUANTIZATIONS], or None.
        trust_remote_code: Run code that comes with the model.
        heads: The kinds of models that will do, of [`heads`][dynalora.evaluation.heads]; the first that the model can
            be is loaded.
        labels: For a classifier, number of classes; 1: a value.

    Raises:
        ConfigError: The weights cannot be loaded or do not fit the model's configuration, the model is of another kind,
            or quantization is asked for without its library.
    """
    _, head = _configured(name, heads, trust_remote_code)
    options: dict[str, Any] = {
        "dtype": resolve_dtype(dtype),
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,  # nothing is unpickled
        "ignore_mismatched_sizes": True,  # they are refused below, by name
    }
    if head.labelled:
        options["num_labels"] = labels
    try:
        if quantization is not None:
            whole: list[str] | None = None
            if head.new:
                empty = empty_model(name, trust_remote_code=trust_remote_code, heads=heads, labels=labels)
                whole = new_layers(empty)
            options["quantization_config"] = quantization_config(quantization, options["dtype"], whole=whole)
        model: PreTrainedModel
        model, loading = getattr(transformers, f"AutoModelFor{head.model_class}").from_pretrained(
            name, output_loading_info=True, **options
        )
    except ImportError as error:
        raise not_installed(quantization or "", error) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"The weights of '{name}' cannot be loaded ({first_line(error)}); copy or download the model again."
        ) from error
    _check_weights(model, name, head, loading)
    return model


def _check_weights(model: PreTrainedModel, name: str, head: Head, loading: Mapping[str, Any]) -> None:
    """Refuse a model whose files lack weights that its configuration asks for, which transformers would draw at random.

    Only what no pre-trained model has may be new: a head, and the pooler before it.

    Args:
        model: The model as it was loaded.
        name: Its Hub id or folder, for errors.
        head: The kind of model.
        loading: What transformers says of the loading.

    Raises:
        ConfigError: Some are lacking, or have another shape.
    """
    encoder = f"{model.base_model_prefix}."
    for key, there, asked in sorted(loading["mismatched_keys"]):
        if head.new and not key.startswith(encoder):
            logger.warning(
                "'%s' has a head of other classes (%s has the shape %s, and %s is needed); a new one takes its place, "
                "which knows nothing until it is trained.", name, key, tuple(there), tuple(asked),
            )  # fmt: skip
            continue
        raise ConfigError(
            f"The weights of '{name}' do not fit its config.json, a {type(model).__name__}: {key} has the shape "
            f"{tuple(there)} in its files, and {tuple(asked)} by the configuration; give the configuration and the "
            "weights of one model."
        )
    fresh = sorted(loading["missing_keys"])
    if head.new:
        fresh = [key for key in fresh if key.startswith(encoder) and "pooler" not in key.split(".")]
    if fresh and head is MASKED_LM and not any(key.startswith(encoder) for key in fresh):
        raise ConfigError(
            f"'{name}' has no masked-LM head (its checkpoint lacks {fresh[0]}), and a new one says nothing; give a "
            "masked language model."
        )
    if fresh:
        raise ConfigError(
            f"The weights of '{name}' do not fit its config.json, a {type(model).__name__}: {len(fresh)} of "
            f"{len(model.state_dict())} are not in its files (the first: {fresh[0]}), and random ones would stand in "
            "their place; give the configuration and the weights of one model."
        )
    # Weights of other parts, such as of an encoder of pictures, are left out on purpose; those of further layers are
    # not.
    places = {_without_numbers(key) for key in model.state_dict()}
    left = sorted(key for key in loading["unexpected_keys"] if _without_numbers(key) in places)
    if left:
        logger.warning(
            "The files of '%s' hold more layers than its config.json names, and %d of their weights are left out (the "
            "first: %s); its answers may be worth little.",
            name, len(left), left[0],
        )  # fmt: skip


def _without_numbers(key: str) -> str:
    return re.sub(r"\d+", "#", key)


def placed(model: Any, device: torch.device | str | None) -> Any:
    """The model on a device; bitsandbytes' weights are where they belong, and must not be moved. None: where it is."""
    fixed = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    return model if device is None or fixed else model.to(device)
