"""A tokenizer and a model of a few kilobytes, made on the spot, with a chat template as instruct models have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% if messages and messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(*, chat: bool = True, merges: list[tuple[str, str]] | None = None) -> Any:
    """One token per byte (and per merge), so that every text can be written."""
    merges = merges or []
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def model(vocabulary: int, *, layers: int = 2, width: int = 32) -> Any:
    torch.manual_seed(12)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=48 if width == 32 else 2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config)


def saved_model(folder: Path, *, chat: bool = True, width: int = 32) -> Path:
    """Model and tokenizer in a folder, as a user has them."""
    words = tokenizer(chat=chat)
    words.save_pretrained(folder)
    model(len(words), width=width).save_pretrained(folder)
    return folder


def rows(count: int = 24) -> list[dict[str, str]]:
    return [{"prompt": f"Say {number}.", "response": f"It is {number}!"} for number in range(count)]


def write_jsonl(path: Path, content: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path
