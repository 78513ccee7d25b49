"""Texts to measure forgetting on: what the base model writes by itself, and texts of the user's choice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dynalora.common.devices import device_of
from dynalora.common.files import cache_folder, write_file
from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError, check_least
from dynalora.evaluation.causal import continued
from dynalora.evaluation.generation import chat_prompt, end_ids, evaluating, padding_id
from dynalora.evaluation.padding import padded
from dynalora.forgetting.base_model import adapters_off, fingerprint, refuse_merged

_FORMAT = 1

Rows = tuple[tuple[int, ...], ...]

# Short and varied: prose, dialogue, knowledge, lists, code, mathematics. What follows them is the model's own.
OPENINGS = (
    "The history of",
    "In the morning, she",
    "Water boils when",
    "def main():\n",
    "Dear Sir or Madam,\n",
    "The three most important",
    "Once upon a time",
    "Theorem 1. Let",
    "# Introduction\n",
    "According to the report,",
    "Ingredients:\n-",
    "Scientists have found that",
    "The river flows",
    "import numpy as np\n",
    "He looked at the clock and",
    "Q: What is",
)
CHATS = (
    "Tell me about the moon.",
    "How do I cook rice?",
    "Write a short poem about autumn.",
    "What is the difference between a virus and a bacterium?",
    "Give me three ideas for a birthday present.",
    "Explain how a bicycle stays upright.",
    "Write a Python function that reverses a list.",
    "Who was Marie Curie?",
    "Summarise the plot of Romeo and Juliet.",
    "Why is the sky blue?",
    "Help me write an email asking for a day off.",
    "What should I see in Rome?",
    "Translate 'good morning' into French.",
    "How does a computer store numbers?",
    "Suggest a name for a small bakery.",
    "What makes a good friend?",
)


@dataclass(frozen=True)
class MeasuredText:
    """Texts to measure on.

    Attributes:
        rows: Token ids of each text, context included.
        starts: For each text the index, at least 1, of the first token that counts; those before it are context.
    """

    rows: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return sum(len(row) - start for row, start in zip(self.rows, self.starts, strict=True))

    def __add__(self, other: MeasuredText) -> MeasuredText:
        """These texts and another's."""
        return MeasuredText((*self.rows, *other.rows), (*self.starts, *other.starts))


@dataclass(frozen=True)
class OwnText(MeasuredText):
    """Texts that a model wrote: what counts is what it wrote, the openings are context.

    Attributes:
        fingerprint: Of the model that wrote them, as `fingerprint` gives it.
        seed: Of the sampling.
    """

    fingerprint: str
    seed: int


def own_text(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: int = 32,
    tokens: int = 48,
    seed: int = 0,
    batch_size: int = 32,
    cache: str | os.PathLike[str] | bool = True,
    progress: Progress = silent,
) -> OwnText:
    """Text that the base model writes: sampled at temperature 1 from its full distribution after short openings.

    Every other opening is a chat message if the tokenizer has a chat template. Adapters are switched off while
    sampling. The text is kept on disk under the model's fingerprint, so that runs on different days measure on the
    same text; sampling the same text again is only certain on the same machine and versions.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: The model's.
        texts: Number of texts; with more than there are openings, openings are used again.
        tokens: Most tokens per text; a text may end earlier by itself.
        seed: Of the sampling. The global random state is left as it was.
        batch_size: Texts per batch.
        cache: True for the user's cache folder, a folder, or False to neither read nor write a file.
        progress: Called with the number of texts written.

    Returns:
        The texts. A text whose first token already ends it counts with that one token.

    Raises:
        ConfigError: Texts, tokens or batch_size below 1.
        UnsupportedError: The model holds weights merged from an adapter, so its base cannot be asked.
    """
    check_least(1, texts=texts, tokens=tokens, batch_size=batch_size)
    refuse_merged(model)
    prompts = _openings(tokenizer, texts)

    def write() -> Rows:
        return sampled(model, tokenizer, prompts, tokens, seed, batch_size, progress)

    plan = [prompts, tokens, seed, batch_size]
    return _remembered(model, cache, plan, seed, tuple(len(prompt) for prompt in prompts), write)


def anchor_text(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: int = 128,
    tokens: int = 64,
    seed: int = 0,
    batch_size: int = 32,
    cache: str | os.PathLike[str] | bool = True,
    progress: Progress = silent,
) -> OwnText:
    """Text that the base model writes without being asked anything, to train with (`retain`).

    Half of the texts continue a random first token. With a chat template the other half are chats of which the model
    writes both sides: the user's message after what the template puts before it, then the answer. None of the openings
    of [`own_text`][dynalora.forgetting.texts.own_text], on which retention is measured, is used.

    Args:
        model: A causal language model, with or without adapters, which are switched off while it writes.
        tokenizer: The model's.
        texts: Number of texts.
        tokens: Most tokens per text; in a chat most tokens of the answer, and half as many of the user's message.
        seed: Of the first tokens and of the sampling. The global random state is left as it was.
        batch_size: Texts per batch.
        cache: True for the user's cache folder, a folder, or False to neither read nor write a file.
        progress: Called with the number of texts written.

    Raises:
        ConfigError: Texts, tokens or batch_size below 1.
        UnsupportedError: The model holds weights merged from an adapter, so its base cannot be asked.
    """
    check_least(1, texts=texts, tokens=tokens, batch_size=batch_size)
    refuse_merged(model)
    chats = texts // 2 if tokenizer.chat_template else 0
    first = _first_tokens(tokenizer, texts - chats, seed)

    def write() -> Rows:
        rows = sampled(model, tokenizer, first, tokens, seed, batch_size, progress)
        if not chats:
            return rows
        before, between = _chat_frame(tokenizer)
        ends = end_ids(model, tokenizer)
        messages = sampled(model, tokenizer, [before] * chats, max(1, tokens // 2), seed + 1, batch_size, progress)
        asked = [[*(row[:-1] if row[-1] in ends else row), *between] for row in messages]
        return (*rows, *sampled(model, tokenizer, asked, tokens, seed + 2, batch_size, progress))

    frame = len(_chat_frame(tokenizer)[0]) if chats else 0
    starts = (1,) * len(first) + (max(1, frame),) * chats
    return _remembered(model, cache, ["anchors", first, chats, tokens, seed, batch_size], seed, starts, write)


def answered_text(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    *,
    tokens: int = 64,
    seed: int = 0,
    batch_size: int = 32,
    cache: str | os.PathLike[str] | bool = True,
    progress: Progress = silent,
) -> OwnText:
    """What the base model answers to prompts, to train with (`retain`): what it can do with these is kept.

    For a second task: the base model is then the one into which the first task's adapter was merged, and the prompts
    are some of the first task's.

    Args:
        model: A causal language model, with or without adapters, which are switched off while it writes.
        tokenizer: The model's.
        prompts: Messages to the model, put into the chat template if there is one; or token ids, which are taken as
            they are.
        tokens: Most tokens per answer.
        seed: Of the sampling, at temperature 1. The global random state is left as it was.
        batch_size: Prompts per batch.
        cache: True for the user's cache folder, a folder, or False to neither read nor write a file.
        progress: Called with the number of answers written.

    Returns:
        The texts, of which the answers count.

    Raises:
        ConfigError: One string instead of a list, no prompt or an empty one, or tokens or batch_size below 1.
        UnsupportedError: The model holds weights merged from an adapter, so its base cannot be asked.
    """
    check_least(1, tokens=tokens, batch_size=batch_size)
    if isinstance(prompts, str):
        raise ConfigError("prompts must be a list of prompts, got one string; put it into a list.")
    refuse_merged(model)
    openings = [_opening(tokenizer, prompt) for prompt in prompts]
    if not openings or not all(openings):
        raise ConfigError("prompts holds no prompt, or an empty one; give at least one, each with a token.")

    def write() -> Rows:
        return sampled(model, tokenizer, openings, tokens, seed, batch_size, progress)

    starts = tuple(len(opening) for opening in openings)
    return _remembered(model, cache, ["answers", openings, tokens, seed, batch_size], seed, starts, write)


def _opening(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    return chat_prompt(tokenizer, prompt) if tokenizer.chat_template else list(tokenizer(prompt)["input_ids"])


def _first_tokens(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[list[int]]:
    """One ordinary token each."""
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    return [[int(ordinary[index])] for index in torch.randint(len(ordinary), (count,), generator=generator)]


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What a chat template writes before the user's message, and between it and the answer, as token ids."""
    mark = "\u2063message\u2063"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, _, between = str(text).partition(mark)
    return tuple(list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, between))  # type: ignore[return-value]


def _remembered(
    model: torch.nn.Module,
    cache: str | os.PathLike[str] | bool,
    plan: list[Any],
    seed: int,
    starts: tuple[int, ...],
    write: Callable[[], Rows],
) -> OwnText:
    """Text of a plan from the cache, or written now and put there."""
    mark = fingerprint(model)
    file = None
    if cache is not False:
        folder = cache_folder() / "own-text" if cache is True else Path(cache)
        name = hashlib.sha256(json.dumps([_FORMAT, mark, *plan]).encode()).hexdigest()[:32]
        file = folder / f"{name}.json"
        rows = _read(file, starts)
        if rows is not None:
            return OwnText(rows, starts, mark, seed)
    text = OwnText(write(), starts, mark, seed)
    if file is not None:
        _write(file, text)
    return text


def given_text(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512) -> MeasuredText:
    """Texts of the user's choice, to measure on; every token but the first of each text counts.

    Args:
        texts: The texts; those of fewer than two tokens are left out.
        tokenizer: The model's; special tokens are added as it does by default.
        max_length: Tokens at which a text is cut.

    Raises:
        ConfigError: One string instead of a list, max_length below 2, or no text with two tokens.
    """
    if isinstance(texts, str):
        raise ConfigError("texts must be a list of texts, got one string; put it into a list.")
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; give at least 2 tokens.")
    rows = [tuple(tokenizer(text)["input_ids"][:max_length]) for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ConfigError(f"None of the {len(texts)} texts has two tokens; give text to measure on.")
    return MeasuredText(tuple(rows), (1,) * len(rows))


def _openings(tokenizer: PreTrainedTokenizerBase, texts: int) -> list[list[int]]:
    prompts: list[list[int]] = []
    for index in range(texts):
        half = index // 2
        if tokenizer.chat_template and index % 2:
            prompts.append(chat_prompt(tokenizer, CHATS[half % len(CHATS)]))
        else:
            place = half if tokenizer.chat_template else index
            prompts.append(list(tokenizer(OPENINGS[place % len(OPENINGS)])["input_ids"]))
    return prompts


def sampled(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> Rows:
    """Continuations that the base model samples at temperature 1, each behind its prompt."""
    what = "The base model writes text"
    padding = padding_id(model, tokenizer)
    device = device_of(model)
    ends = end_ids(model, tokenizer)
    rows: list[tuple[int, ...]] = []
    progress(what, 0, len(prompts))
    devices = [device] if device.type == "cuda" else []
    with adapters_off(model), evaluating(model), torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            given, mask = padded(batch, padding, "left")
            output = continued(
                model, given.to(device), mask.to(device), do_sample=True, num_beams=1,
                max_new_tokens=tokens, pad_token_id=padding, use_cache=True,
                eos_token_id=sorted(ends) or None,
                # The model's own distribution, untouched: every setting that a checkpoint may ship is reset.
                temperature=1.0, top_k=0, top_p=1.0, min_p=None, typical_p=1.0, repetition_penalty=1.0,
            )  # fmt: skip
            for prompt, written in zip(batch, output.tolist(), strict=True):
                stop = next((place + 1 for place, token in enumerate(written) if token in ends), len(written))
                rows.append((*prompt, *written[:stop]))
            progress(what, len(rows), len(prompts))
    return tuple(rows)


def _read(file: Path, starts: tuple[int, ...]) -> Rows | None:
    """The text kept in a file; None if there is none or it is damaged, so that it is made again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = tuple(tuple(int(token) for token in row) for row in content["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = len(rows) == len(starts) and all(len(row) > start for row, start in zip(rows, starts, strict=True))
    return rows if whole else None


def _write(file: Path, text: OwnText) -> None:
    """Keep the text; a cache that cannot be written is no reason to stop."""
    content = json.dumps({"fingerprint": text.fingerprint, "seed": text.seed, "rows": text.rows})
    try:
        write_file(file, content)
    except OSError:
        return
