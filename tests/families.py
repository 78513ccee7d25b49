"""One tiny model, built from its configuration, of each family of architectures that people adapt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.toys import VOCAB, Toy, tokens

ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _made(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A function that builds transformers' class ``model``, always the same."""

    def build() -> nn.Module:
        torch.manual_seed(17)
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        for module in built.modules():
            if hasattr(module, "is_transposed"):  # experts: adapted ones go one by one, grouped ones round otherwise
                module.config._experts_implementation = "eager"  # type: ignore[union-attr]
        return built

    return build


def _text(seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(2, 5, seed=seed)}


def _pair(seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(2, 5, seed=seed), "decoder_input_ids": tokens(2, 4, seed=seed + 1)}


def _image(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


_BART = {
    **SPECIAL,
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "init_std": 0.2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_VIT = {
    **{name: value for name, value in ENCODER.items() if name not in ("vocab_size", "max_position_embeddings")},
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 40,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    **SPECIAL,
}
_CLASSIFIER = {**ENCODER, "num_labels": 3, "pad_token_id": 0}

FAMILIES: dict[str, Toy] = {
    toy.name: toy
    for toy in (
        Toy(
            "bert",
            _made("BertForSequenceClassification", "BertConfig", **_CLASSIFIER),
            ("query", "value"),
            _text,
            "SEQ_CLS",
        ),
        Toy(
            "roberta",
            _made("RobertaForSequenceClassification", "RobertaConfig", **_CLASSIFIER),
            ("query", "value"),
            _text,
            "SEQ_CLS",
        ),
        Toy(
            "deberta",
            _made("DebertaForSequenceClassification", "DebertaConfig", **_CLASSIFIER),
            ("in_proj", "dense"),
            _text,
            "SEQ_CLS",
        ),
        Toy(
            "deberta-v2",
            _made("DebertaV2ForSequenceClassification", "DebertaV2Config", **_CLASSIFIER),
            ("query_proj", "value_proj"),
            _text,
            "SEQ_CLS",
        ),
        Toy(
            "bart",
            _made("BartForConditionalGeneration", "BartConfig", **_BART),
            ("q_proj", "v_proj"),
            _pair,
            "SEQ_2_SEQ_LM",
        ),
        Toy("t5", _made("T5ForConditionalGeneration", "T5Config", **_T5), ("q", "v"), _pair, "SEQ_2_SEQ_LM"),
        Toy(
            "vit",
            _made("ViTForImageClassification", "ViTConfig", **_VIT),
            ("q_proj", "v_proj", "query", "value"),  # transformers has renamed them
            _image,
        ),
        Toy("gpt2", _made("GPT2LMHeadModel", "GPT2Config", **_GPT2), ("c_attn",), _text, "CAUSAL_LM"),
        Toy("llama", _made("LlamaForCausalLM", "LlamaConfig", **DECODER), ("q_proj", "v_proj"), _text, "CAUSAL_LM"),
        Toy(
            "qwen",
            _made("Qwen3ForCausalLM", "Qwen3Config", head_dim=4, **DECODER),
            ("q_proj", "v_proj"),
            _text,
            "CAUSAL_LM",
        ),
        Toy(
            "mistral", _made("MistralForCausalLM", "MistralConfig", **DECODER), ("q_proj", "v_proj"), _text, "CAUSAL_LM"
        ),
        Toy(
            "qwen3-moe",
            _made(
                "Qwen3MoeForCausalLM",
                "Qwen3MoeConfig",
                **{**DECODER, "head_dim": 4, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2},
            ),
            ("q_proj", "gate_up_proj", "down_proj"),
            _text,
            "CAUSAL_LM",
        ),
        Toy(
            "mixtral",
            _made("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=4, num_experts_per_tok=2),
            ("q_proj", "w1", "w3", "w2"),
            _text,
            "CAUSAL_LM",
        ),
        Toy(
            "gpt-oss",  # whose parameters are (experts, in, out), with biases
            _made(
                "GptOssForCausalLM",
                "GptOssConfig",
                **{**DECODER, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
            ),
            ("q_proj", "gate_up_proj", "down_proj"),
            _text,
            "CAUSAL_LM",
        ),
        Toy(
            "deepseek",  # a dense block, then experts beside a shared one
            _made(
                "DeepseekV3ForCausalLM",
                "DeepseekV3Config",
                **{
                    **DECODER,
                    "num_key_value_heads": 4,
                    "moe_intermediate_size": 12,
                    "n_routed_experts": 4,
                    "num_experts_per_tok": 2,
                    "n_group": 1,
                    "topk_group": 1,
                    "first_k_dense_replace": 1,
                    "q_lora_rank": 8,
                    "kv_lora_rank": 8,
                    "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 4,
                    "v_head_dim": 4,
                },
            ),
            ("gate_proj", "up_proj", "down_proj"),
            _text,
            "CAUSAL_LM",
        ),
    )
}
