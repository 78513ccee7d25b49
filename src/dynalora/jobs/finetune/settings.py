"""Settings of `dynalora finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from dynalora.errors import ConfigError
from dynalora.lab.choices import DTYPES, PROMPTS, QUANTIZATIONS, is_config_file, method_names
from dynalora.lab.data.fields import Fields
from dynalora.lab.lab_settings import MODEL_AND_DATA, RUN, AdapterSettings
from dynalora.lab.settings import Setting, named_source, names_or_pattern, whole_path
from dynalora.lab.training.settings import TrainSettings

_METHOD, _DATA, _TRAINING = "Method", "Data in detail", "Training"


@dataclass(frozen=True, kw_only=True)
class FinetuneSpec(AdapterSettings, TrainSettings, panel=MODEL_AND_DATA):
    """Model, data, method and training of `dynalora finetune`.

    Attributes:
        model: Fine-tune this causal language model: its id on the Hugging Face Hub, a folder that holds one, or
            smollm2, the demo's.
        data: Train on this data: a .jsonl, .json, .csv, .tsv, .parquet or .txt file (.gz too), a folder of such files,
            or the id of a data set on the Hub. See
            [`load_conversations`][dynalora.lab.data.conversations.load_conversations].
        output: Write the run into this folder, which must be new or empty.
        method: Train an adapter of this method, or of a .json or .yaml file like PEFT's adapter_config.json. Such a
            file says everything of the method itself: `r`, `alpha` and `dropout` then do not apply, and
            `target_modules` only if the file has none.
        learning_rate: Let the learning rate of AdamW rise to this value, from which the schedule lowers it; None: the
            method's tested rate for the run's length. See [`rates`][dynalora.lab.training.rates].
        method_options: Set a further field of the method's configuration, and give the flag again for more. `--method
            NAME --help` lists and explains them.
        split: Train on this split of the data.
        subset: Take this subset (configuration) of a data set on the Hub that has several.
        prompt_field: Read prompts from this field of every row; None: recognised by its usual names.
        response_field: Read responses from this field of every row; None: recognised by its usual names.
        input_field: Read text that follows the prompt from this field, where there is one; None: recognised by its
            usual names.
        messages_field: Read chat messages from this field, instead of prompt, input and response; None: recognised by
            its usual names.
        text_field: Read plain text from this field, all of which is learned; None: recognised where it is the only
            field.
        limit: Use only this many rows, from the first; None: all.
        eval_data: Measure on held-out data from elsewhere, which are read like the training data.
        eval_split: Measure on this split of the held-out data, or of the training data if there are none; None: a part
            of the training data is held out.
        eval_fraction: Hold out this part of the data where no other held-out data are named; 0: none.
        template: Write prompts in this format: the model's own (chat), or a paper's. See
            [`prompts`][dynalora.evaluation.prompts].
        max_length: Cut sequences after this many tokens. What is cut off is not learned.
        packing: Learn plain texts one behind the other, in pieces of `max_length`, so that none loses its end and
            nothing is padded. For plain text only.
        dtype: Load the base model's weights with this data type; auto is bfloat16 on GPUs that have it, else float32.
            The adapter's weights are float32.
        quantization: Hold the base weights in fewer bits, with bitsandbytes (4bit is NF4) or torchao (int8); None: as
            they are. A checkpoint that is quantised stays so.
        retention: Measure what the model forgot, on text that the base model writes itself.
        scaled: Measure the held-out loss and what was forgotten with the update scaled down, too, when the run is over,
            for the report. This needs held-out data, and retention must be measured.
        samples: Answer this many held-out prompts before and after training, for the report; 0: none.
        monitor_every: Measure retention every so many optimizer steps; None: a tenth of the run; 0: only when the run
            is over.
        monitor_text: Measure retention on this text, too, during training; give the flag again for more. The first 32
            texts count, up to 128 tokens of each. See [`load_texts`][dynalora.lab.data.conversations.load_texts].
        max_forgetting: Stop the run when the KL from the base model, on its own text or a monitored one, is above so
            many nats per token; None: no limit.
        keep_best: Keep the weights of the lowest held-out loss, of those that are measured every `eval_every` steps.
            With max_forgetting, instead of stopping, go to the end and keep the best within that limit, measured as
            often as retention is; without held-out data these are the latest.
        trust_remote_code: Run code that comes with the model. Do so only for models whose authors you trust.
        dry_run: Say what the run takes (memory, parameters, steps, and the time per step, of a few real steps), and
            train and write nothing.
        resume: Continue the killed run in the run folder.
    """

    model: Annotated[str, Setting("-m", place=True)]
    data: Annotated[str, Setting("-d", place=True)]
    output: Annotated[str, Setting("-o", home=True)]
    method: Annotated[str, Setting(suggested=method_names, panel=_METHOD)] = "disel"
    method_options: Annotated[
        dict[str, Any], Setting("-O", name="--option", metavar="NAME=VALUE", merge=True, panel=_METHOD)
    ] = field(default_factory=dict)
    learning_rate: float | None = None  # type: ignore[assignment]  # a number once the run is prepared
    split: Annotated[str, Setting(panel=_DATA)] = "train"
    subset: Annotated[str | None, Setting(panel=_DATA)] = None
    prompt_field: Annotated[str | None, Setting(panel=_DATA)] = None
    response_field: Annotated[str | None, Setting(panel=_DATA)] = None
    input_field: Annotated[str | None, Setting(panel=_DATA)] = None
    messages_field: Annotated[str | None, Setting(panel=_DATA)] = None
    text_field: Annotated[str | None, Setting(panel=_DATA)] = None
    limit: Annotated[int | None, Setting(least=1, panel=_DATA)] = None
    eval_data: Annotated[str | None, Setting(panel=_DATA, place=True)] = None
    eval_split: Annotated[str | None, Setting(panel=_DATA)] = None
    eval_fraction: Annotated[float, Setting(least=0, below=1, panel=_DATA)] = 0.05
    template: Annotated[str, Setting(suggested=PROMPTS, panel=_DATA)] = "chat"
    max_length: Annotated[int, Setting(least=2, panel=_TRAINING)] = 512
    packing: Annotated[bool, Setting(panel=_DATA)] = False
    dtype: Annotated[str, Setting(choices=DTYPES, panel=_TRAINING)] = "auto"
    quantization: Annotated[str | None, Setting(choices=tuple(QUANTIZATIONS), panel=_TRAINING)] = None
    retention: Annotated[bool, Setting(panel=RUN)] = True
    scaled: Annotated[bool, Setting(panel=RUN)] = True
    samples: Annotated[int, Setting(least=0, panel=RUN)] = 3
    monitor_every: Annotated[int | None, Setting(least=0, panel=RUN)] = None
    monitor_text: Annotated[list[str], Setting(metavar="NAME=SOURCE", panel=RUN)] = field(default_factory=list)
    max_forgetting: Annotated[float | None, Setting(above=0, panel=RUN)] = None
    keep_best: Annotated[bool, Setting(panel=RUN)] = False
    trust_remote_code: Annotated[bool, Setting(panel=RUN)] = False
    dry_run: Annotated[bool, Setting(panel=RUN, recorded=False)] = False
    resume: Annotated[bool, Setting(panel=RUN, recorded=False)] = False

    def _check(self) -> None:
        super()._check()
        object.__setattr__(self, "target_modules", names_or_pattern(self.target_modules))
        if is_config_file(self.method):  # and not a folder that has the name of a method
            object.__setattr__(self, "method", whole_path(self.method))
        if self.max_forgetting is not None and not self.monitored:
            raise ConfigError(
                "max_forgetting needs measurements during training; leave retention on and monitor_every above 0."
            )
        if self.monitor_text and not self.monitored:
            raise ConfigError(
                "monitor_text names text to measure retention on during training; leave retention on and monitor_every "
                "above 0, or leave it out."
            )
        held_out = self.eval_data is not None or self.eval_split is not None or self.eval_fraction > 0
        if self.keep_best and self.max_forgetting is None and not (held_out and self.eval_every != 0):
            raise ConfigError(
                "keep_best goes by the held-out loss during training; hold data out (eval_fraction, eval_split or "
                "eval_data) and leave eval_every above 0, or give max_forgetting in nats per token."
            )
        if self.early_stopping is not None and not (held_out and self.eval_every != 0):
            raise ConfigError(
                "early_stopping goes by the held-out loss during training; hold data out (eval_fraction, eval_split or "
                "eval_data) and leave eval_every above 0."
            )
        named = [named_source(text, "monitor_text") for text in self.monitor_text]
        if len({name for name, _ in named}) < len(named):
            raise ConfigError(f"monitor_text uses a name twice: {', '.join(self.monitor_text)}.")
        object.__setattr__(self, "monitor_text", [f"{name}={whole_path(source)}" for name, source in named])
        if self.dtype == "float16":
            import torch

            if not torch.cuda.is_available():
                raise ConfigError("dtype is 'float16', which trains on GPUs only; choose bfloat16 or float32.")

    @property
    def monitored(self) -> bool:
        """Whether retention is followed during training."""
        return self.retention and self.monitor_every != 0

    @property
    def fields(self) -> Fields:
        """The data's fields that the user named."""
        return Fields(self.prompt_field, self.response_field, self.input_field, self.messages_field, self.text_field)
