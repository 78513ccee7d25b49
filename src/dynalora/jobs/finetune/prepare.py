"""Check everything that can be wrong with a fine-tuning run before the model's weights are loaded."""

from __future__ import annotations

import logging
import math
import os
import sys
from dataclasses import dataclass, field, replace

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from dynalora.adapter.config import is_number
from dynalora.errors import ConfigError, DataError
from dynalora.evaluation.tokens import PLAIN, Conversation, TokenizedSet, tokenize
from dynalora.evaluation.windows import within_window
from dynalora.forgetting.texts import MeasuredText
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.answers import prompt_of
from dynalora.lab.baselines import edits_base, prompt_only
from dynalora.lab.choices import is_config_file, label_of
from dynalora.lab.configs import adapter_config, check_rank, check_targets, method_name, title_of
from dynalora.lab.data.conversations import load_conversations, load_named_text, measured_text, split, without_repeats
from dynalora.lab.data.prompts import Prompt
from dynalora.lab.models import empty_model, load_tokenizer, local_model_name
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.settings import defaults_of
from dynalora.lab.training.rates import rate_for
from dynalora.lab.training.reporting import check_trackers

logger = logging.getLogger(__name__)


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
        samples: The held-out prompts whose answers are shown.
        rate: The learning rate in a sentence, where none was given; otherwise empty.
    """

    spec: FinetuneSpec
    model: str
    config: PeftConfig
    tokenizer: PreTrainedTokenizerBase
    training: TokenizedSet
    held_out: TokenizedSet
    modules: int
    texts: dict[str, MeasuredText] = field(default_factory=dict)
    samples: list[Prompt] = field(default_factory=list)
    rate: str = ""

    @property
    def method(self) -> str:
        """The method's name, that of a configuration file's included."""
        return method_name(self.config) if is_config_file(self.spec.method) else self.spec.method.lower()


def prepare(spec: FinetuneSpec, *, main_process: bool = True) -> Prepared:
    """Check everything that can be checked without the model's weights, cheapest first.

    Only the main process of a distributed run looks at the run folder.

    Raises:
        ConfigError: The method, its options, the model or the target modules.
        DataError: The data.
        RunFolderError: The run folder.
    """
    check_trackers(spec.report_to)
    config = adapter_config(
        spec.method,
        r=spec.r,
        alpha=spec.alpha,
        dropout=spec.dropout,
        target_modules=spec.target_modules,
        options=spec.method_options,
    )
    if prompt_only(config) and spec.target_modules != FinetuneSpec.target_modules:
        named = spec.target_modules if isinstance(spec.target_modules, str) else ", ".join(spec.target_modules)
        raise ConfigError(
            f"target_modules is {named}, but {title_of(label_of(spec.method))} learns virtual tokens and "
            "adapts no modules; leave it out."
        )
    if spec.max_forgetting is not None and edits_base(spec.method, config):
        raise ConfigError(
            f"max_forgetting is {spec.max_forgetting:g}, but {title_of(label_of(spec.method))} changes the base "
            "weights, so what it forgets cannot be followed; leave it out, or choose another method."
        )
    if spec.resume and spec.learning_rate is None:
        recorded = RunFolder.recorded(spec.output).get("learning_rate")
        spec = replace(spec, learning_rate=recorded if is_number(recorded) else None)
    if main_process:
        RunFolder.check(spec.output, spec.settings(), resume=spec.resume, defaults=defaults_of(type(spec)))
    training, held_out = training_and_held_out(spec)
    monitored = spec.monitor_text if spec.monitored else []
    texts = dict(load_named_text(text, "monitor_text") for text in monitored)
    name = local_model_name(spec.model)
    empty = empty_model(name, trust_remote_code=spec.trust_remote_code)
    modules = check_targets(empty, config)
    check_rank(empty, config, modules)
    tokenizer = load_tokenizer(name, trust_remote_code=spec.trust_remote_code, template=spec.template)
    max_length = within_window(spec.max_length, empty, tokenizer)
    learned = tokens_of(training, tokenizer, spec, max_length)
    if spec.loss_on_prompts and (unlearned := sum(turn.get("weight") == 0 for chat in training for turn in chat)):
        logger.warning("loss_on_prompts learns all tokens, those of %d messages of weight 0 included.", unlearned)
    prepared = Prepared(
        spec=spec,
        model=name,
        config=config,
        tokenizer=tokenizer,
        training=learned.with_prompts() if spec.loss_on_prompts else learned,
        held_out=tokens_of(held_out, tokenizer, spec, max_length),
        modules=len(modules),
        texts={label: measured_text(content, tokenizer) for label, content in texts.items()},
        samples=_samples(held_out, spec.samples),
    )
    return prepared if spec.learning_rate is not None else _with_rate(prepared)


def tokens_of(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, spec: FinetuneSpec, max_length: int
) -> TokenizedSet:
    """Conversations as tokens; with `packing`, one text behind the other in pieces of `max_length`.

    Raises:
        DataError: `packing` is asked for where there are chats, whose answers would read those of others.
    """
    if not spec.packing:
        return tokenize(conversations, tokenizer, max_length=max_length)
    if any(chat[0]["role"] != PLAIN for chat in conversations):
        raise DataError("`packing` puts plain texts one behind the other, and the data are chats; leave it out.")
    return tokenize(conversations, tokenizer, max_length=sys.maxsize).packed(max_length)


def _samples(held_out: list[Conversation], count: int) -> list[Prompt]:
    """The first held-out prompts, none twice."""
    found: list[Prompt] = []
    for prompt in map(prompt_of, held_out):
        if len(found) == count:
            break
        if all(prompt.conversation != other.conversation for other in found):
            found.append(prompt)
    return found


def _with_rate(prepared: Prepared) -> Prepared:
    """The job with the method's tested rate for the run's length."""
    spec, steps = prepared.spec, prepared.spec.steps
    if steps is None:
        rows_a_step = spec.batch_size * spec.gradient_accumulation * int(os.environ.get("WORLD_SIZE", "1"))
        steps = math.ceil(spec.epochs * math.ceil(len(prepared.training) / rows_a_step))
    tested = rate_for(prepared.method, steps)
    sentence = f"Learning rate {tested.rate:g}, {tested.why}; --learning-rate takes another."
    return replace(prepared, spec=replace(spec, learning_rate=tested.rate), rate=sentence)


def training_and_held_out(spec: FinetuneSpec) -> tuple[list[Conversation], list[Conversation]]:
    """The conversations that a run trains on and those that it measures, which has none if nothing is held out.

    Raises:
        DataError: The data.
    """
    conversations = load_conversations(
        spec.data, fields=spec.fields, split=spec.split, subset=spec.subset, limit=spec.limit
    )
    if spec.eval_data is not None or spec.eval_split is not None:
        elsewhere = load_conversations(
            spec.eval_data or spec.data,
            fields=spec.fields,
            # What the training rows are called where they lie says nothing of data that lie elsewhere.
            split=spec.eval_split or ("train" if spec.eval_data is not None else spec.split),
            subset=spec.subset if spec.eval_data is None else None,
        )
        return conversations, without_repeats(elsewhere, conversations)
    return split(conversations, spec.eval_fraction, seed=spec.seed)
