"""The table of costs in `docs/choosing.md`, computed as `dynalora finetune --dry-run` computes it; needs no weights.

python benchmarks/costs.py
"""

from __future__ import annotations

import torch
import transformers

import dynalora
from dynalora.lab.configs import adapter_config
from dynalora.lab.costs import amount, cost_of
from dynalora.lab.report import Table, markdown_table

# Shapes of the Llama 3 family: width, MLP, layers, heads.
SIZES = {"1B": (2048, 8192, 16, 32), "8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64)}
METHODS = ("lora", "dira", "disel", "dislora", "pedyra")


def model_of(size: str) -> torch.nn.Module:
    """A Llama of that size, without weights."""
    width, mlp, layers, heads = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=size == "1B",
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def table(size: str, methods: tuple[str, ...] = METHODS) -> Table:
    """Rows for the methods at r = 16 on all linear layers, with and without `retain`, and for full fine-tuning."""
    model = model_of(size)
    named = [(dynalora.methods.METHODS[m].title if m in dynalora.methods.METHODS else "LoRA", m, {}) for m in methods]
    named += [("DiRA with `retain`", "dira", {"retain": 1000.0}), ("DISeL with `retain`", "disel", {"retain": 1000.0})]
    rows = []
    for name, method, options in named:
        cost = cost_of(model, adapter_config(method, r=16, options=options), dtype=torch.bfloat16)
        rows.append((name, cost))
    rows.append(("full fine-tuning", cost_of(model, None, dtype=torch.bfloat16)))
    weights = amount(rows[0][1].base)
    return Table(
        [f"{size}, base weights {weights}", "trained parameters", "adapter", "gradients", "AdamW's state", "`retain`"],
        [
            [
                name, cost.trained, amount(cost.adapter) if cost.adapter else None, amount(cost.gradients),
                amount(cost.optimizer), amount(cost.retain) if cost.retain else None,
            ]
            for name, cost in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    for size in SIZES:
        print(markdown_table(table(size)))
