"""Base models and tokenizers, by Hub id or folder: first without and then with their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError, first_line
from dynalora.evaluation.prompts import use_template
from dynalora.evaluation.tokens import ensure_chat_template, ensure_pad_token
from dynalora.lab.precision import new_layers, not_installed, quantization_config, resolve_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_ALIAS = "smollm2"


def local_model_name(name: str, *, progress: Progress = silent) -> str:
    """What `from_pretrained` takes for a model's name: `smollm2` is the demo's model, wherever it is to be had."""
    if name.lower() != DEMO_ALIAS:
        return name
    from dynalora.lab.packaged_models import demo_model

    return demo_model(progress=progress).path


_HEADS = {
    "lm": ("CausalLM", "a causal language model"),
    "seq2seq": ("Seq2SeqLM", "an encoder-decoder"),
    "masked": ("MaskedLM", "a masked language model"),
    "classes": ("SequenceClassification", "a model that can classify text"),
    "spans": ("QuestionAnswering", "a model that can mark answers in a text"),
}


def empty_model(
    name: str, *, trust_remote_code: bool = False, head: str = "lm", labels: int = 2
) -> nn.Module:
    """The model on the meta device: all its modules, none of its weights.

    Args:
        name: Hub id or folder.
        trust_remote_code: Run code that comes with the model.
        head: As in [`load_model`][dynalora.lab.models.load_model].
        labels: Likewise.

    Raises:
        ConfigError: There is no such model, or it is not of that kind.
    """
    import transformers

    config, head = _configured(name, head, trust_remote_code)
    if head == "classes":
        config.num_labels = labels
    auto, wanted = _HEADS[head]
    try:
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, f"AutoModelFor{auto}").from_config(
                config, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(name, error, wanted) from error
    return model


def _configured(name: str, head: str, trust_remote_code: bool) -> tuple[Any, str]:
    """A model's configuration and its head: `text` is resolved to the kind of model that it is.

    Raises:
        ConfigError: There is no such model, or it is an encoder-decoder where a causal language model is wanted.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(name, error, _HEADS["lm" if head == "text" else head][1]) from error
    both = bool(getattr(config, "is_encoder_decoder", False))
    if head == "lm" and both:
        raise ConfigError(
            f"The model '{name}' is an encoder-decoder ({config.model_type}), and a causal language model is needed "
            "here; encoder-decoders can be trained with `dynalora compare` and with a Trainer of your own."
        )
    if head == "text":
        head = "seq2seq" if both else "lm"
    return config, head


def _unusable(name: str, error: Exception, wanted: str) -> ConfigError:
    return ConfigError(
        f"The model '{name}' cannot be used ({first_line(error)}); give the Hub id or the folder of {wanted}."
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
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"The tokenizer of '{name}' cannot be loaded ({first_line(error)}).") from error
    if template is not None:
        use_template(tokenizer, template)
        ensure_chat_template(tokenizer)
    ensure_pad_token(tokenizer)
    return tokenizer


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    trust_remote_code: bool = False,
    head: str = "lm",
    labels: int = 2,
) -> PreTrainedModel:
    """The model with its weights.

    Args:
        name: Hub id or folder.
        dtype: Of the weights.
        quantization: One of [`QUANTIZATIONS`][dynalora.lab.precision.QUANTIZATIONS], or None.
        trust_remote_code: Run code that comes with the model.
        head: `lm` for a causal language model, `text` for one or an encoder-decoder, `masked` for a masked one,
            `classes` for a sequence classifier, `spans` for a model with a question-answering head.
        labels: For `classes`, number of classes; 1: a value.

    Raises:
        ConfigError: The weights cannot be loaded, the model is of another kind, or quantization is asked for without
            its library.
    """
    import transformers

    auto, _ = _HEADS[_configured(name, head, trust_remote_code)[1]]
    options: dict[str, Any] = {
        "dtype": resolve_dtype(dtype),
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,  # nothing is unpickled
    }
    if head == "classes":
        options["num_labels"] = labels
    try:
        if quantization is not None:
            whole: list[str] | None = None
            if head in ("classes", "spans"):
                empty = empty_model(name, trust_remote_code=trust_remote_code, head=head, labels=labels)
                whole = new_layers(empty)
            options["quantization_config"] = quantization_config(quantization, options["dtype"], whole=whole)
        model: PreTrainedModel
        model, told = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(
            name, output_loading_info=True, **options
        )
    except ImportError as error:
        raise not_installed(quantization or "", error) from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"The weights of '{name}' cannot be loaded ({first_line(error)}).") from error
    if head == "masked":
        fresh = sorted(
            own for own in told["missing_keys"] if not own.startswith(f"{model.base_model_prefix}.")
        )
        if fresh:
            raise ConfigError(
                f"'{name}' has no masked-LM head (its checkpoint lacks {fresh[0]}), and a new one says nothing; give a "
                "masked language model."
            )
    return model


def placed(model: Any, device: torch.device | str | None) -> Any:
    """The model on a device; bitsandbytes' weights are where they belong, and must not be moved. None: where it is."""
    fixed = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    return model if device is None or fixed else model.to(device)
