"""A language model, an encoder and a tokenizer of a few kilobytes, so that the examples run offline in seconds.

Put your own in their place: ``AutoModelForCausalLM.from_pretrained(...)`` and ``AutoTokenizer.from_pretrained(...)``.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEXTS = [f"The number after {number} is {number + 1}." for number in range(16)]


def tokenizer() -> Any:
    """One token per byte, and three special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def causal_model() -> Any:
    """A Llama with two layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def encoder() -> Any:
    """A BERT with two layers."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return transformers.BertModel(config)


def batches(count: int = 6, size: int = 4) -> list[dict[str, torch.Tensor]]:
    """Batches of token ids with labels, for loops of one's own."""
    words = tokenizer()
    ids = words(TEXTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt")["input_ids"]
    labels = ids.masked_fill(ids == 0, -100)
    chosen = [torch.arange(step * size, (step + 1) * size) % len(TEXTS) for step in range(count)]
    return [{"input_ids": ids[rows], "labels": labels[rows]} for rows in chosen]
