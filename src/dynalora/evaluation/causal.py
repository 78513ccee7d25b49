"""Forward passes of causal language models on left-padded batches, with whatever PEFT puts before the input.

Prompt learning (P-Tuning, prompt tuning) puts P virtual tokens before the text, so that there are P more logits, keys
and positions than tokens. PEFT's own forward pass drops the positions; padded on the left, a text would then stand
further from its prompt the more padding it has, and its numbers would depend on its batch. So the virtual tokens
are put there here, and everything that looks at logits by position comes by here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel

from dynalora.common.private import adapters_disabled
from dynalora.evaluation.seq2seq import is_encoder_decoder


def prompt_length(model: torch.nn.Module) -> int:
    """Number of virtual tokens before every input: 0 without prompt learning, and with the adapter disabled."""
    if not _learns_prompts(model) or adapters_disabled(model):
        return 0
    return int(model.active_peft_config.num_virtual_tokens)  # type: ignore[union-attr,arg-type]


def causal_pass(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    *,
    cache: Any = None,
    keep: int = 0,
    use_cache: bool = False,
) -> tuple[torch.Tensor, Any]:
    """Logits of a batch, and the cache of keys and values.

    Args:
        model: A causal language model, with or without adapter.
        tokens: The batch, (B, T), padded on the left, or, continuing a cache, on the right.
        mask: Where there is no padding, (B, C + T), with C tokens in the cache (virtual ones not counted).
        cache: What a pass with `use_cache` returned, to be continued.
        keep: Number of last positions to compute logits of; 0: all.
        use_cache: Whether to make, or to continue, a cache.

    Returns:
        Logits (B, keep or T, V) of the last positions, and the cache if there is one.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    virtual = prompt_length(model)
    inputs: dict[str, Any] = {"use_cache": use_cache}
    if virtual and cache is None:
        inputs["inputs_embeds"] = _with_prompt(model, tokens)
    else:
        inputs["input_ids"] = tokens
    inputs["attention_mask"] = mask = F.pad(mask, (virtual, 0), value=1)
    if cache is not None:
        inputs["past_key_values"] = cache
    accepted = inspect.signature(base.forward).parameters
    length = tokens.shape[1] + (virtual if cache is None else 0)
    if "position_ids" in accepted:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
    positions = keep or tokens.shape[1]
    if positions < length and "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = positions
    output = (base if virtual else model)(**inputs)
    return output.logits[:, -positions:], getattr(output, "past_key_values", None)


def continued(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor, **settings: Any) -> torch.Tensor:
    """What `generate` writes after a batch of prompts, (B, N), without the prompts.

    Args:
        model: A causal language model or an encoder-decoder, with or without adapter.
        tokens: The prompts, (B, T), padded on the left (of an encoder-decoder on the right).
        mask: Where they are no padding, (B, T).
        **settings: What transformers' `generate` takes.
    """
    caller: Any = model.get_base_model() if _learns_prompts(model) else model  # type: ignore[operator]
    virtual = prompt_length(model)
    sequences: torch.Tensor
    if virtual:
        # Given embeddings alone, generate returns new tokens alone.
        sequences = caller.generate(
            inputs_embeds=_with_prompt(model, tokens), attention_mask=F.pad(mask, (virtual, 0), value=1), **settings
        )
        return sequences
    sequences = caller.generate(input_ids=tokens, attention_mask=mask, **settings)
    # A decoder of its own begins with its start token.
    return sequences[:, 1 if is_encoder_decoder(model) else tokens.shape[1] :]


def _learns_prompts(model: torch.nn.Module) -> bool:
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def _with_prompt(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, P + T, hidden) of virtual tokens and tokens."""
    embedded: torch.Tensor = model.word_embeddings(tokens)
    prompt = model.get_prompt(batch_size=len(tokens)).to(embedded.device, embedded.dtype)
    return torch.cat([prompt, embedded], dim=1)
