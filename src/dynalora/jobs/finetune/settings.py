"""What a fine-tuning run can be told."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dynalora.errors import ConfigError
from dynalora.lab.data.fields import Fields
from dynalora.lab.precision import DTYPES, check_quantization
from dynalora.lab.settings import named_source, names_or_pattern
from dynalora.lab.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class FinetuneSpec(TrainSettings):
    """Everything `dynalora finetune` can be told.

    Attributes:
        model: Id of a causal language model on the Hugging Face Hub, a folder that holds one, or `smollm2`, the demo's.
        data: Id of a data set on the Hub, a file, or a folder; see
            [`load_conversations`][dynalora.lab.data.conversations.load_conversations].
        output: The run folder, new or empty.
        method: One of [`method_names`][dynalora.lab.configs.method_names], some of which are PEFT's; or a
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
            [`load_texts`][dynalora.lab.data.conversations.load_texts]. The first 32
            texts count, up to 128 tokens of each.
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
