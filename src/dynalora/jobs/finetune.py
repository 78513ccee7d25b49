"""Fine-tune a user's own model on the user's own data: the job behind `dynalora finetune`.

Everything that can be wrong with the settings, the data, the run folder or the target modules is found before the
model's weights are loaded.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
import yaml
from peft import PeftConfig
from rich.console import Console
from torch import nn

from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.method import Method
from dynalora.adapter.model import leave_out_head
from dynalora.common.names import plain_name
from dynalora.common.progress import Progress, rich_progress, silent
from dynalora.drawing import runs as plots
from dynalora.drawing.gates import plot_gates
from dynalora.drawing.retention import plot_retention_curves
from dynalora.drawing.style import rendered
from dynalora.errors import ConfigError, DynaloraError
from dynalora.evaluation.prompts import use_template
from dynalora.evaluation.run import within_window
from dynalora.forgetting.gates import record_gates
from dynalora.forgetting.landscape import rank_landscape
from dynalora.forgetting.monitor import RetentionMonitor
from dynalora.forgetting.retention import MeasuredText, Retention, given_text, own_text, retention
from dynalora.lab import data
from dynalora.lab.baselines import (
    BASELINES,
    config_from_file,
    edits_base,
    is_config_file,
    label_of,
    prompt_only,
)
from dynalora.lab.data import Fields
from dynalora.lab.report import Cell, Figure, Report, Section, Table, rich_table, write_report
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.settings import coerce, defaults_of, did_you_mean, named_source
from dynalora.lab.training import (
    UNTIMED_STEPS,
    TrainResult,
    TrainSettings,
    save_adapter,
    train_adapter,
)
from dynalora.methods import METHODS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "FinetuneSpec",
    "Prepared",
    "TrainResult",
    "TrainSettings",
    "adapter_config",
    "check_quantization",
    "check_targets",
    "compared_config",
    "compared_names",
    "decisions",
    "empty_model",
    "finetune",
    "load_model",
    "load_tokenizer",
    "local_model_name",
    "method_names",
    "placed",
    "prepare",
    "quantization_config",
    "resolve_dtype",
    "save_adapter",
    "summary_table",
    "train_adapter",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Precisions of the base weights; `auto` takes bfloat16 where the machine computes in it fast."""
QUANTIZATIONS = {"4bit": "quant", "8bit": "quant", "int8": "torchao"}
"""Ways to hold the base weights → the extra that brings the library."""
BASELINE = "lora"
DEMO_ALIAS = "smollm2"
MONITORED_TEXTS = 32
MONITORED_LENGTH = 128
"""Of text that is named for monitoring: enough for a curve, and cheap at every measurement."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSpec(TrainSettings):
    """Everything `dynalora finetune` can be told.

    Attributes:
        model: Id of a causal language model on the Hugging Face Hub, a folder that holds one, or `smollm2`, the demo's.
        data: Id of a data set on the Hub, a file, or a folder; see
            [`load_conversations`][dynalora.lab.data.load_conversations].
        output: The run folder, new or empty.
        method: One of [`method_names`][dynalora.jobs.finetune.method_names], some of which are PEFT's; or a
            `.json` or `.yaml` file as PEFT's `adapter_config.json`, which says everything of the method itself: `r`,
            `alpha` and `dropout` then do not apply, and `target_modules` only if the file has none.
        r: Rank of the adapter; for `p-tuning` the number of virtual tokens.
        alpha: The update is scaled by alpha / r; None: the method's default (twice the rank for `lora`).
        dropout: On the adapter's input, in [0, 1).
        target_modules: Names of the modules to adapt, as a list or separated by commas; a regular expression; or
            `all-linear`.
        method_options: Further fields of the method's configuration, by name.
        split: Which split of the data to train on.
        subset: Which configuration of a Hub data set.
        prompt_field: The field with the prompt; None: found by its usual names, as the next three.
        response_field: The field with the response.
        input_field: An optional field whose text follows the prompt.
        messages_field: The field with chat messages, instead of the three above.
        limit: Use only the first rows.
        eval_data: Held-out data from elsewhere, read like `data`.
        eval_split: Which split of `eval_data` (or of `data`, if `eval_data` is None) to measure on; None: a part of
            the training data is held out.
        eval_fraction: The part of `data` to hold out where no other held-out data is named; 0: none.
        template: Prompts are written in the model's own format (`chat`) or in a paper's: `alpaca`, `llm-adapters`,
            `magicoder`, `none`; see [`prompts`][dynalora.evaluation.prompts].
        max_length: Longest sequence in tokens; longer ones lose their end.
        dtype: Of the base model's weights: `float32`, `bfloat16`, `float16`, or `auto` (bfloat16 on GPUs that have
            it, else float32). Adapter weights are float32.
        quantization: `4bit` (NF4) or `8bit` base weights, with bitsandbytes, or `int8` ones, with torchao; None: as
            they are (a checkpoint that is quantised stays so).
        retention: Measure what the model forgot, on text that the base model writes itself.
        monitor_every: Optimizer steps between measurements of retention during training; None: a tenth of the run; 0:
            only when it is over.
        monitor_text: Further text to measure retention on during training, each as `NAME=SOURCE`; see
            [`load_texts`][dynalora.lab.data.load_texts]. The first 32 texts count, up to 128 tokens of each.
        max_forgetting: KL(base ‖ tuned) in nats per token that none of these texts may exceed: the run stops at the
            first measurement above it; None: no limit.
        keep_best: Instead of stopping, go to the end, and keep the weights of the lowest held-out loss (without
            held-out data the latest) among those measured within `max_forgetting`.
        trust_remote_code: Run code that comes with the model.
        resume: Continue the killed run in `output`.
    """

    model: str
    data: str
    output: str
    method: str = "disel"
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    method_options: dict[str, Any] = field(default_factory=dict)
    split: str = "train"
    subset: str | None = None
    prompt_field: str | None = None
    response_field: str | None = None
    input_field: str | None = None
    messages_field: str | None = None
    limit: int | None = None
    eval_data: str | None = None
    eval_split: str | None = None
    eval_fraction: float = 0.05
    template: str = "chat"
    max_length: int = 512
    dtype: str = "auto"
    quantization: str | None = None
    retention: bool = True
    monitor_every: int | None = None
    monitor_text: list[str] = field(default_factory=list)
    max_forgetting: float | None = None
    keep_best: bool = False
    trust_remote_code: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "target_modules", names_or_pattern(self.target_modules))
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; give a whole number of at least 1.")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(
                f"eval_fraction is {self.eval_fraction}; give a part from 0 up to, but without, 1."
            )
        if self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; give at least 2 tokens.")
        if self.monitor_every is not None and self.monitor_every < 0:
            raise ConfigError(
                f"monitor_every is {self.monitor_every}; give a number of steps, or 0 for only at the end."
            )
        if self.max_forgetting is not None and not (
            self.max_forgetting > 0 and math.isfinite(self.max_forgetting)
        ):
            raise ConfigError(f"max_forgetting is {self.max_forgetting}; give nats per token, above 0.")
        if self.max_forgetting is not None and not self.monitored:
            raise ConfigError(
                "max_forgetting needs measurements during training; leave retention on and monitor_every above 0."
            )
        if self.keep_best and self.max_forgetting is None:
            raise ConfigError("keep_best needs a budget; give max_forgetting in nats per token.")
        for text in self.monitor_text:
            named_source(text, "monitor_text")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is '{self.dtype}'; choose one of {', '.join(DTYPES)}.")
        if self.dtype == "float16" and not torch.cuda.is_available():
            raise ConfigError("dtype is 'float16', which trains on GPUs only; choose bfloat16 or float32.")
        check_quantization(self.quantization)

    @property
    def monitored(self) -> bool:
        """Whether retention is followed during training."""
        return self.retention and self.monitor_every != 0

    @property
    def fields(self) -> Fields:
        """The data's fields that the user named."""
        return Fields(
            prompt=self.prompt_field,
            response=self.response_field,
            input=self.input_field,
            messages=self.messages_field,
        )

    def settings(self) -> dict[str, Any]:
        """What `config.yaml` holds: everything but `resume`, which does not change the result."""
        everything = asdict(self)
        own = [name for name in FinetuneSpec.__annotations__ if name != "resume"]
        # What the run is about comes first; how it is trained follows.
        return {name: everything.pop(name) for name in own} | {
            name: value for name, value in everything.items() if name != "resume"
        }


def names_or_pattern(targets: list[str] | str) -> list[str] | str:
    """Module names written with commas as a list; `all-linear` and regular expressions stay as they are."""
    if (
        isinstance(targets, str)
        and targets != "all-linear"
        and re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)*,?", targets)
    ):
        return [name.strip() for name in targets.split(",") if name.strip()]
    return targets


def method_names() -> list[str]:
    """Methods whose adapters can be trained: dynalora's, and PEFT's to compare with."""
    from dynalora import methods

    return [*methods.method_names(), *(name for name, known in BASELINES.items() if known.config is not None)]


def compared_names() -> list[str]:
    """Methods that can be compared: those of `method_names`, and `full` fine-tuning."""
    return [*method_names(), *(name for name, known in BASELINES.items() if known.config is None)]


def compared_config(
    method: str,
    *,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: list[str] | str = "all-linear",
    options: Mapping[str, Any] | None = None,
    task_type: str = "CAUSAL_LM",
) -> PeftConfig | None:
    """As [`adapter_config`][dynalora.jobs.finetune.adapter_config], and None for full fine-tuning.

    Args:
        method: One of [`compared_names`][dynalora.jobs.finetune.compared_names], or a configuration file.
        r: Rank; full fine-tuning has none.
        alpha: As for `adapter_config`.
        dropout: Likewise.
        target_modules: Likewise; full fine-tuning trains every weight.
        options: Likewise.
        task_type: Likewise.

    Raises:
        ConfigError: As `adapter_config`; alpha, dropout or options are given for full fine-tuning.
    """
    known = BASELINES.get(method.lower())
    if known is None or known.config is not None:
        return adapter_config(
            method, r=r, alpha=alpha, dropout=dropout, target_modules=target_modules, options=options,
            task_type=task_type,
        )  # fmt: skip
    known.fields(r, alpha, dropout)
    if options:
        raise ConfigError(
            f"Method '{method}' has no adapter and no option '{next(iter(options))}'; leave it out."
        )
    return None


def adapter_config(
    method: str,
    *,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: list[str] | str = "all-linear",
    options: Mapping[str, Any] | None = None,
    task_type: str = "CAUSAL_LM",
) -> PeftConfig:
    """The configuration of an adapter, by the method's name.

    Args:
        method: One of [`method_names`][dynalora.jobs.finetune.method_names], or a `.json` or `.yaml` file as
            PEFT's `adapter_config.json`, to which `r`, `alpha` and `dropout` do not apply.
        r: Rank; for `randlora` that of each random basis, of which there are the fewer the larger it is; for
            `p-tuning` the number of virtual tokens.
        alpha: The update is scaled by alpha / r; None: the method's default, for LoRA twice the rank.
        dropout: On the adapter's input.
        target_modules: Names, a regular expression, or `all-linear`; means nothing to `p-tuning`, and to a file that
            names its own.
        options: Further fields of the method's configuration.
        task_type: PEFT's name of what the model does.

    Raises:
        ConfigError: An unknown method, an unknown option (lists the valid ones), or a value that cannot be.
    """
    from dynalora import methods

    targets = names_or_pattern(target_modules)
    if is_config_file(method):
        told = config_from_file(method, target_modules=targets, options=options, task_type=task_type)
        leave_out_head(told)
        return told
    name = method.lower()
    if name not in method_names():
        if name in BASELINES:
            raise ConfigError(
                f"Method '{method}' has no adapter and cannot be used here; choose one of {', '.join(method_names())}."
            )
        raise ConfigError(f"Unknown method '{method}'; choose one of {', '.join(method_names())}.")
    if r < 1:
        raise ConfigError(f"The rank r is {r}; give a whole number of at least 1.")
    common: dict[str, Any] = {"task_type": task_type, "target_modules": targets}
    preset: dict[str, Any] = {}
    if name in BASELINES:
        baseline = BASELINES[name]
        kind: Any = baseline.config
        own = baseline.fields(r, alpha, dropout)
        preset = {key: own.pop(key) for key in {*baseline.options, *baseline.more(r)}}
        common |= own
        if not baseline.adapts_modules:
            del common["target_modules"]
        valid = {item.name for item in fields(kind)} - {item.name for item in fields(PeftConfig)}
    else:
        kind = methods.config_class(name)
        common |= {"r": r, "alpha": alpha, "dropout": dropout}
        valid = set(kind.own_fields())
    valid -= set(common)
    chosen = dict(options or {})
    for option in chosen:
        if option in common:
            raise ConfigError(
                f"'{option}' is a setting of its own; give it there and not among the method's options."
            )
        if option not in valid:
            raise ConfigError(
                f"Method '{name}' has no option '{option}'; {did_you_mean(option, sorted(valid))}."
            )
    try:
        made: PeftConfig = kind(**common, **{**preset, **_typed(kind, chosen)})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The settings of method '{name}' do not fit together: {error}") from error
    leave_out_head(made)
    return made


def _typed(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that came as text, as YAML 1.1 has it for `1e-4`, as the numbers the field wants."""
    try:
        hints = get_type_hints(kind)
    except NameError:  # a field annotated with a type that is imported for type checkers only
        return dict(options)

    def typed(name: str, value: Any) -> Any:
        try:
            return coerce(value, hints[name], name) if isinstance(value, str) else value
        except ConfigError:
            return value  # the configuration says itself what it wants

    return {name: typed(name, value) for name, value in options.items()}


# --- the model, first without and then with its weights ---------------------------------------------------


def check_targets(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names of the modules that an adapter would wrap; none for methods that train virtual tokens instead.

    Args:
        model: The base model; one on the meta device will do.
        config: The adapter's configuration.

    Raises:
        ConfigError: Nothing matches, or one of the listed names matches nothing; says which linear modules exist.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    if prompt_only(config):
        return []
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    targets: Any = getattr(config, "target_modules", None)
    if targets is None:
        return list(linear)  # PEFT's own choice for the architecture
    kinds = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear)) or "none"
    exist = f"the model's linear modules are {kinds}"
    if isinstance(targets, str) and targets.lower() == "all-linear":
        # As PEFT reads it: all but the output layer.
        output_layer: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = output_layer()
        inner = [name for name, module in linear.items() if module is not head]
        if not inner:
            raise ConfigError(f"target_modules 'all-linear' matches nothing; {exist}.")
        return inner
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ConfigError(
                f"target_modules '{targets}' is not a valid regular expression ({error})."
            ) from None
    else:
        everything = [name for name, _ in model.named_modules()]
        for target in sorted(targets):
            if not any(name == target or name.endswith(f".{target}") for name in everything):
                raise ConfigError(f"target_modules '{target}' matches nothing; {exist}.")
    matched = [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]
    if not matched:
        told = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        raise ConfigError(f"target_modules '{told}' matches nothing; {exist}.")
    return matched


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
        head: As in [`load_model`][dynalora.jobs.finetune.load_model].
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
        f"The model '{name}' cannot be used ({_first_line(error)}); give the Hub id or the folder of {wanted}."
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
        raise ConfigError(f"The tokenizer of '{name}' cannot be loaded ({_first_line(error)}).") from error
    if template is not None:
        use_template(tokenizer, template)
        data.ensure_chat_template(tokenizer)
    data.ensure_pad_token(tokenizer)
    return tokenizer


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype for one of [`DTYPES`][dynalora.jobs.finetune.DTYPES] on this machine."""
    if name == "auto":
        return (
            torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


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
        quantization: One of [`QUANTIZATIONS`][dynalora.jobs.finetune.QUANTIZATIONS], or None.
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
                whole = _new_layers(empty)
            options["quantization_config"] = quantization_config(quantization, options["dtype"], whole=whole)
        model: PreTrainedModel
        model, told = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(
            name, output_loading_info=True, **options
        )
    except ImportError as error:
        raise _not_installed(quantization or "", error) from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"The weights of '{name}' cannot be loaded ({_first_line(error)}).") from error
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


def check_quantization(name: str | None) -> None:
    """Make sure that base weights can be held so.

    Raises:
        ConfigError: There is no such way.
    """
    if name is not None and name not in QUANTIZATIONS:
        raise ConfigError(f"quantization is '{name}'; choose one of {', '.join(QUANTIZATIONS)}.")


def _new_layers(model: nn.Module) -> list[str]:
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

    Args:
        name: One of [`QUANTIZATIONS`][dynalora.jobs.finetune.QUANTIZATIONS].
        dtype: That 4-bit weights are multiplied in.
        whole: Names of layers that stay as they are; None: the output layer.

    Raises:
        ConfigError: There is no such way, or its library is not installed.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    check_quantization(name)
    try:
        if name == "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=whole)
        four = name == "4bit"
        return BitsAndBytesConfig(
            load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=whole,
        )  # fmt: skip
    except ImportError as error:
        raise _not_installed(name, error) from error


def _not_installed(quantization: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"quantization '{quantization}' needs a library that is not installed ({_first_line(error)}): "
        f"pip install 'dynalora[{QUANTIZATIONS.get(quantization, 'quant')}]'."
    )


def _first_line(error: BaseException) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


# --- the whole job ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A checked job, before any weights are loaded.

    Attributes:
        spec: What was asked for.
        model: What to load the model from.
        config: The adapter's configuration.
        tokenizer: The model's.
        training: The training set, tokenised.
        held_out: The held-out set, tokenised; may be empty.
        modules: Number of modules that get an adapter.
        texts: What retention is measured on during training besides the base model's own text, by name.
    """

    spec: FinetuneSpec
    model: str
    config: PeftConfig
    tokenizer: PreTrainedTokenizerBase
    training: data.TokenizedSet
    held_out: data.TokenizedSet
    modules: int
    texts: dict[str, MeasuredText] = field(default_factory=dict)


def prepare(spec: FinetuneSpec, *, main_process: bool = True) -> Prepared:
    """Check everything that can be checked without the model's weights, cheapest first.

    Args:
        spec: What is asked for.
        main_process: False on all but one process of a distributed run, which leave the run folder alone.

    Raises:
        ConfigError: The method, its options, the model or the target modules.
        DataError: The data.
        RunFolderError: The run folder.
    """
    config = adapter_config(
        spec.method,
        r=spec.r,
        alpha=spec.alpha,
        dropout=spec.dropout,
        target_modules=spec.target_modules,
        options=spec.method_options,
    )
    if spec.max_forgetting is not None and edits_base(spec.method, config):
        raise ConfigError(
            f"max_forgetting is {spec.max_forgetting:g}, but {_titled(label_of(spec.method))} changes the base "
            "weights, so what it forgets cannot be followed; leave it out, or choose another method."
        )
    if main_process:
        RunFolder.check(spec.output, spec.settings(), resume=spec.resume, defaults=defaults_of(type(spec)))
    conversations = data.load_conversations(
        spec.data, fields=spec.fields, split=spec.split, subset=spec.subset, limit=spec.limit
    )
    if spec.eval_data is not None or spec.eval_split is not None:
        elsewhere = data.load_conversations(
            spec.eval_data or spec.data,
            fields=spec.fields,
            split=spec.eval_split or spec.split,
            subset=spec.subset if spec.eval_data is None else None,
        )
        training, held_out = conversations, data.without_repeats(elsewhere, conversations)
    else:
        training, held_out = data.split(conversations, spec.eval_fraction, seed=spec.seed)
    named = {}
    for text in spec.monitor_text if spec.monitored else ():
        called, source = named_source(text, "monitor_text")
        named[called] = data.load_texts(source, limit=MONITORED_TEXTS)
    name = local_model_name(spec.model)
    empty = empty_model(name, trust_remote_code=spec.trust_remote_code)
    modules = check_targets(empty, config)
    tokenizer = load_tokenizer(name, trust_remote_code=spec.trust_remote_code, template=spec.template)
    max_length = within_window(spec.max_length, empty, tokenizer)
    return Prepared(
        spec=spec,
        model=name,
        config=config,
        tokenizer=tokenizer,
        training=data.tokenize(training, tokenizer, max_length=max_length),
        held_out=data.tokenize(held_out, tokenizer, max_length=max_length),
        modules=len(modules),
        texts={
            called: given_text(texts, tokenizer, max_length=MONITORED_LENGTH)
            for called, texts in named.items()
        },
    )


def finetune(spec: FinetuneSpec, *, console: Console | None = None) -> TrainResult:
    """Do the whole job: check, load, train, measure, write the run folder.

    Args:
        spec: What to do.
        console: Where progress and the closing table are shown; None: nowhere.

    Returns:
        The trained model with its measurements; everything is also in the run folder.

    Raises:
        DynaloraError: As [`prepare`][dynalora.jobs.finetune.prepare], before any weights are loaded.
    """
    # Set by torchrun, accelerate and deepspeed before the first line of Python runs.
    main = int(os.environ.get("RANK", "0")) == 0
    say = console if console is not None and main else None
    ready = prepare(spec, main_process=main)
    with RunFolder.create(
        spec.output, spec.settings(), resume=spec.resume, defaults=defaults_of(type(spec)), main_process=main
    ) as run:
        if say is not None:
            say.print(
                f"{len(ready.training):,} training and {len(ready.held_out):,} held-out conversations, "
                f"{ready.training.response_tokens:,} tokens to learn from. Loading {spec.model} …",
                highlight=False,
                markup=False,
            )
        model = load_model(
            ready.model,
            dtype=spec.dtype,
            quantization=spec.quantization,
            trust_remote_code=spec.trust_remote_code,
        )
        result = train_adapter(
            model,
            ready.tokenizer,
            ready.config,
            ready.training,
            ready.held_out,
            settings=spec,
            run=run,
            label=label_of(spec.method),
            console=say,
            monitor=(watcher := _monitor(spec, ready, run)),
        )
        if main:
            save_adapter(result.model, ready.tokenizer, run)
            kept = None
            if spec.retention and edits_base(spec.method, ready.config):
                if say is not None:
                    say.print(
                        f"{_titled(label_of(spec.method))} changes the base weights, so disabling it does not tell "
                        "what was forgotten; retention is left out.",
                        highlight=False,
                    )
            elif spec.retention:
                kept = measure_retention(result.model, ready.tokenizer, console=say)
            if kept is not None:
                run.log({"run": result.label, "step": result.steps, "retention": asdict(kept)})
            _write_results(spec, ready, result, kept, run, say, watcher)
            run.finish()
            # The adapter is saved; optimizer states are of no more use and larger than everything else.
            shutil.rmtree(run.checkpoints, ignore_errors=True)
    return result


def _monitor(spec: FinetuneSpec, ready: Prepared, run: RunFolder) -> RetentionMonitor | None:
    if not spec.monitored or edits_base(spec.method, ready.config):
        return None
    return RetentionMonitor(
        ready.texts,
        tokenizer=ready.tokenizer,
        every=spec.monitor_every or 0.1,
        max_forgetting=spec.max_forgetting,
        keep_best=spec.keep_best,
        name=label_of(spec.method),
        path=run.path / "retention.jsonl",
    )


def measure_retention(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, console: Console | None = None
) -> Retention:
    """KL from the base model and loss shift, on text that the base model itself writes."""
    if console is None:
        return retention(model, own_text(model, tokenizer))
    with rich_progress(console) as progress:
        return retention(model, own_text(model, tokenizer, progress=progress), progress=progress)


def method_of(model: PeftModel) -> Method | None:
    """The method of a model's active adapter; None if it is not one of dynalora's."""
    kind = str(model.active_peft_config.peft_type).rpartition(".")[2]
    return METHODS.get(kind.lower())


def decisions(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, held_out: data.TokenizedSet
) -> tuple[str, bytes, str] | None:
    """What the adapter decided, as a plot.

    Args:
        model: The adapted model.
        tokenizer: For padding.
        held_out: Where gates are recorded, on response tokens only; empty: no gates are.

    Returns:
        File name, PNG and caption: the gates of an adapter that has any, the rank landscape of any other; None if
        there is nothing to see.
    """
    collator = data.Collator(tokenizer.pad_token_id or 0)
    try:
        if getattr(getattr(model, "active_peft_config", None), "gated", False):
            if len(held_out) == 0:
                return None
            batches = [
                collator(held_out.rows[start : start + 8]) for start in range(0, min(len(held_out), 128), 8)
            ]
            drawn = plot_gates({"held-out responses": record_gates(model, batches)})
            return (
                "gates",
                rendered(drawn),
                "How far the gates open on the tokens of held-out responses, by depth.",
            )
        rows = rank_landscape(model)
    except DynaloraError:
        return None
    return (
        "rank_landscape",
        plots.rank_heatmap(rows),
        "Singular values above 0.001 of every adapted matrix's update.",
    )


def decided_by(model: PeftModel, method: Method) -> list[dict[str, Any]]:
    """What the active adapter decided, as rows of a table."""
    adapter = model.active_adapter
    layers = {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer) and module.has_adapter(adapter)
    }
    return method.decided(layers, adapter)


def summary_table(
    results: Sequence[TrainResult], *, more: Mapping[str, Sequence[Cell]] | None = None
) -> Table:
    """Results as one table, a row per run.

    Args:
        results: The runs.
        more: Further columns, name → one cell per run.
    """
    extra = dict(more or {})

    def loss(value: float | None) -> Cell:
        return None if value is None else f"{value:.4f}"

    rows = [
        [
            result.label,
            loss(result.held_out_before),
            loss(result.held_out_after),
            result.trainable_parameters,
            None if result.step_seconds is None else f"{result.step_seconds:.3f}",
            *(cells[index] for cells in extra.values()),
        ]
        for index, result in enumerate(results)
    ]
    columns = ["method", "held-out loss before", "after", "trainable parameters", "step (s)", *extra]
    note = (
        "Losses in nats per response token; step: median time of an optimizer step "
        f"without the first {UNTIMED_STEPS}."
    )
    if "KL from base" in extra:
        note += (
            " KL(base ‖ tuned), with its standard error, and loss shift in nats per token of text that the base "
            "model wrote."
        )
    return Table(columns, rows, note=note)


def _titled(method: str) -> str:
    """A method's name as its paper writes it."""
    titles = {name: known.title for name, known in BASELINES.items()}
    titles |= {name: known.title for name, known in METHODS.items()}
    return titles.get(method) or method


def _forgetting_told(monitor: RetentionMonitor | None) -> str:
    """What became of the budget of forgetting, as the end of a summary; nothing if it was kept without more ado."""
    if monitor is None or monitor.exceeded is None:
        return ""
    point = monitor.exceeded
    told = (
        f" At step {point.step:,} KL on '{point.text}' was {point.retention.kl:.4f} nats per token, above the budget "
        f"of {monitor.max_forgetting:g}"
    )
    if not monitor.keep_best:
        return f"{told}, and the run was stopped."
    if monitor.best is None:
        return f"{told}, and no weights within it were measured."
    return f"{told}; the weights are those of step {monitor.best.step:,}, at {monitor.best.forgetting:.4f}."


def _short(source: str) -> str:
    """A Hub id as it is, a path by its last part."""
    return Path(source).resolve().name if Path(source).exists() else source


def _write_results(
    spec: FinetuneSpec,
    ready: Prepared,
    result: TrainResult,
    kept: Retention | None,
    run: RunFolder,
    console: Console | None,
    monitor: RetentionMonitor | None = None,
) -> None:
    pictures = {"loss": plots.loss_curves({result.label: result.records})}
    captions = {"loss": "Training loss (thin: each logged step; thick: running mean) and held-out loss."}
    decided = decisions(result.model, ready.tokenizer, ready.held_out)
    if decided is not None:
        name, pictures[name], captions[name] = decided
    method = method_of(result.model)
    if method is not None and (drawn := plots.metric_panels(result.records, method.panels)) is not None:
        pictures["method"] = drawn
        captions["method"] = f"What {method.title or method.name} weighed and measured in training."
    if method is not None and (rows := decided_by(result.model, method)):
        run.write("decisions.json", json.dumps(rows, indent=1))
    if monitor is not None and monitor.points:
        curves = plot_retention_curves(monitor.points, max_forgetting=spec.max_forgetting)
        pictures["retention"] = plots.save_figure(run, "retention", curves)
        captions["retention"] = (
            "KL from the base model, with its standard error, and loss shift during training."
        )
    for name, content in pictures.items():
        run.write(f"plots/{name}.png", content)
    more: dict[str, list[Cell]] = {}
    if kept is not None:
        more = {
            "KL from base": [f"{kept.kl:.4f} ± {kept.kl_error:.4f}"],
            "loss shift": [f"{kept.loss_shift:+.4f}"],
        }
    table = summary_table([result], more=more)
    change = ""
    if result.held_out_before is not None and result.held_out_after is not None:
        change = f" took the held-out loss from {result.held_out_before:.4f} to {result.held_out_after:.4f}"
    share = 100 * result.trainable_parameters / result.parameters
    summary = (
        f"{result.steps:,} optimizer steps{change or ' were taken'}, training "
        f"{result.trainable_parameters:,} parameters ({share:.2f} % of the model)"
        f"{f' in {ready.modules} modules' if ready.modules else ''}.{_forgetting_told(monitor)}"
    )
    counts = Table(
        ["", "conversations", "tokens to learn from", "truncated", "left out"],
        [
            [name, len(part), part.response_tokens, part.truncated, part.dropped]
            for name, part in (("training", ready.training), ("held out", ready.held_out))
        ],
    )
    sections = [
        Section("Result", tables=[table]),
        Section("Data", tables=[counts]),
        Section("Plots", figures=[Figure(content, captions[name]) for name, content in pictures.items()]),
        Section("Settings", listing=yaml.safe_dump(spec.settings(), sort_keys=False, allow_unicode=True)),
    ]
    title = f"{_short(spec.model)} fine-tuned with {_titled(result.label)} on {_short(spec.data)}"
    write_report(Report(title, summary, sections), run.report)
    if console is not None:
        console.print(rich_table(table))
        if told := _forgetting_told(monitor):
            console.print(told.strip(), highlight=False, markup=False)
        console.print(f"Adapter: {run.adapter}\nReport:  {run.report}", highlight=False, markup=False)
