"""Answers in batches, token by token or by beam search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch

from dynalora.common.attention import attention_over_padding
from dynalora.common.devices import device_of
from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError, check_least
from dynalora.evaluation.causal import continued
from dynalora.evaluation.padding import padded
from dynalora.evaluation.seq2seq import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str, system: str = "") -> list[int]:
    """Token ids of a question in the model's chat format, up to where the answer begins.

    Without a chat template the question itself is encoded, behind the system message, with the tokenizer's own special
    tokens.

    Args:
        tokenizer: The model's.
        question: The user's message.
        system: A system message before it; empty: none, so that a chat template may add its own.
    """
    if not tokenizer.chat_template:
        asked = f"{system}\n\n{question}" if system else question
        return list(tokenizer(asked, verbose=False)["input_ids"])  # how long it may be is the caller's affair
    first = [{"role": "system", "content": system}] if system else []
    text = tokenizer.apply_chat_template(
        [*first, {"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    beams: int = 1,
    stop: Sequence[str] = (),
    strip: bool = True,
    what: str = "Generating answers",
    progress: Progress = silent,
) -> list[str]:
    """The model's most likely continuation of each prompt, token by token or by beam search.

    Prompts of similar length share a batch, padded on the left (for encoder-decoders on the right), and the longest
    come first, so that a batch which does not fit into memory fails at once. What is generated depends on the batching
    only as far as floating-point sums do.

    Args:
        model: A causal language model or an encoder-decoder, with or without adapter. It is left in the mode (train or
            eval) it was in.
        tokenizer: The model's.
        prompts: Questions, put into the chat format with `chat_prompt`, or token ids to be used as they are.
        max_new_tokens: Generation stops here, or at the end-of-turn token.
        batch_size: Prompts per batch.
        beams: Beams of a beam search; 1: always the likeliest token.
        stop: Texts that end an answer; an answer is cut before the first of them.
        strip: Whether white space around an answer is removed.
        what: Description given to `progress`.
        progress: Called with the number of prompts answered.

    Returns:
        One answer per prompt, in the prompts' order, without special tokens.

    Raises:
        ConfigError: Max_new_tokens, batch_size or beams below 1, or an empty prompt.
    """
    check_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size, beams=beams)
    ids = [chat_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    for index, prompt_ids in enumerate(ids):
        if not prompt_ids:
            raise ConfigError(f"Prompt {index} is empty; every prompt needs at least one token.")
    padding = padding_id(model, tokenizer)
    device = device_of(model)
    stopping = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    side: Literal["left", "right"] = "right" if is_encoder_decoder(model) else "left"
    answers = [""] * len(ids)
    with evaluating(model), torch.inference_mode():
        for batch in batches_by_length([len(prompt_ids) for prompt_ids in ids], batch_size, what, progress):
            tokens, mask = padded([ids[index] for index in batch], padding, side)
            written = continued(
                model, tokens.to(device), mask.to(device), do_sample=False, num_beams=beams,
                max_new_tokens=max_new_tokens, pad_token_id=padding, use_cache=True,
                eos_token_id=sorted(end_ids(model, tokenizer)) or None, **stopping,
                # Sampling settings that a checkpoint ships would only cause warnings here.
                temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                cut = min((place for end in stop if (place := text.find(end)) >= 0), default=len(text))
                answers[index] = text[:cut].strip() if strip else text[:cut]
    return answers


def end_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the tokenizer's end token and those of the model's generation settings."""
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        value = getattr(source, "eos_token_id", None)
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return ends


def batches_by_length(lengths: Sequence[int], batch_size: int, what: str, progress: Progress) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first; those done are told to a listener."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])  # equal lengths keep their order
    progress(what, 0, len(order))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
        progress(what, min(start + batch_size, len(order)), len(order))


def padding_id(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """A token to pad with: the tokenizer's, else the model's, else the end token, else 0 (it gets no attention)."""
    settings: list[Any] = [tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)]
    for name in ("pad_token_id", "eos_token_id"):
        for source in settings:
            value = getattr(source, name, None)
            if isinstance(value, list):
                value = value[0] if value else None
            if value is not None:
                return int(value)
    return 0


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval mode (no dropout), its key-value cache on, ready for padded batches; afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    model.eval()
    for module, _ in modes:
        # In eval mode bitsandbytes packs 4-bit weights on some CPUs for good, and no gradient passes them afterwards.
        if type(module).__name__ == "Linear4bit":
            module.training = True
    if cache is False:
        config.use_cache = True  # type: ignore[union-attr]  # trainers turn it off
    try:
        with attention_over_padding():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        if cache is False:
            config.use_cache = False  # type: ignore[union-attr]
