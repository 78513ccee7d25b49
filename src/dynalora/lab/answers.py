"""What an adapter answers, and what its base model would have answered."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dynalora.common.progress import Progress, silent
from dynalora.errors import DataError
from dynalora.evaluation.causal import prompt_length
from dynalora.evaluation.generation import generate
from dynalora.evaluation.tokens import PLAIN, Conversation, prompt_ids
from dynalora.evaluation.windows import model_window
from dynalora.forgetting.base_model import adapters_off
from dynalora.lab.data.prompts import Prompt

_PART = 0.3
"""Part of a plain text, in words, that is given to be gone on with."""


def answers_to(
    prompts: Sequence[Prompt],
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: bool = False,
    system: str = "",
    max_new_tokens: int = 256,
    batch_size: int = 8,
    plain: bool = False,
    progress: Progress = silent,
) -> list[str]:
    """The likeliest answer to every prompt.

    Args:
        prompts: What is asked.
        model: The adapter on its base model.
        tokenizer: Its tokenizer.
        base: Whether the base model answers, with the adapter switched off.
        system: System message before every prompt that has none; empty: none.
        max_new_tokens: Number of tokens after which an answer is broken off.
        batch_size: Number of prompts that are answered at once.
        plain: Whether to leave out the chat format.
        progress: Called with the number of prompts answered.

    Raises:
        DataError: A prompt is longer than the model's window.
    """
    ids = []
    for prompt in prompts:
        turns = prompt.conversation
        if system and turns[0]["role"] not in ("system", PLAIN):
            turns = [{"role": "system", "content": system}, *turns]
        ids.append(prompt_ids(turns, tokenizer, plain=plain))
    room = model_window(model, tokenizer) - prompt_length(model)
    longest = max(len(row) for row in ids)
    if longest >= room:
        raise DataError(
            f"A prompt has {longest:,} tokens, and the model can take {room:,} together with its answer; shorten that "
            "prompt, or leave it out."
        )
    with adapters_off(model) if base else contextlib.nullcontext():
        return generate(
            model, tokenizer, ids, max_new_tokens=min(max_new_tokens, room - longest), batch_size=batch_size,
            what="Generating the base model's answers" if base else "Generating answers", progress=progress,
        )  # fmt: skip


def prompt_of(conversation: Conversation) -> Prompt:
    """What a conversation to learn asks before its last answer; of plain text the beginning, to be gone on with."""
    *before, last = conversation
    if before:
        return Prompt(before, last["content"])
    words = last["content"].split(" ")
    given = max(1, round(_PART * len(words)))
    start: Conversation = [{"role": PLAIN, "content": " ".join(words[:given])}]
    return Prompt(start, " ".join(words[given:]) or None)
