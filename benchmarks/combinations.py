"""What people combine adapters with in TRL's `SFTTrainer`: whether it works, and what it does to a step's time.

python benchmarks/combinations.py [--methods lora,dira,disel,dislora,pedyra] [--steps 8] [--output FILE.md]

A small Llama with random weights trains on random text, once for every method and combination, in turns. A cell has the
median processor time of a step (torch's own threads not counted) as a ratio to the same method without the combination,
after the first two steps; for `torch.compile` also how many graphs were compiled. Losses must be those of the same
method without it, or the cell says how far they are apart. What cannot be had here says why: `not installed` or the
error's first line.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

import dynalora
from dynalora.lab.configs import adapter_config
from dynalora.lab.report import Table, markdown_table

WIDTH, VOCABULARY, LENGTH = 256, 512, 128
COMBINATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "activation offloading": {"activation_offloading": True, "needs": "an accelerator"},
    "packing": {"packing": True, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
    "bf16 autocast": {"bf16": True},
    "eager attention": {"attention": "eager"},
    "FlashAttention 2": {"attention": "flash_attention_2", "needs": "flash_attn"},
    "Liger": {"use_liger_kernel": True, "needs": "liger_kernel"},
    "torch.compile": {"torch_compile": True},
}
OTHER_LOSSES = ("packing", "bf16 autocast")
"""Combinations that change what is computed: other batches, or other rounding."""


class Clock(TrainerCallback):
    """Notes the processor time of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self._began = time.thread_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.times.append(time.thread_time() - self._began)


def model_of(attention: str) -> Any:
    """A small Llama with the same random weights every time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def texts() -> Dataset:
    """Random tokens, of lengths from a half to all of `LENGTH`."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(LENGTH // 2, LENGTH, (64,), generator=generator).tolist()
    return Dataset.from_list(
        [{"input_ids": torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]
    )


def tokenizer_of() -> Any:
    """A tokenizer for tokens that are numbers already."""
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="t2"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="t0", eos_token="t1", unk_token="t2")


def train(method: str, options: dict[str, Any], steps: int) -> tuple[float, list[float], int]:
    """Train with a combination.

    Returns:
        The median time of a step in seconds, the losses, and the number of graphs that were compiled.
    """
    options = dict(options)
    attention = options.pop("attention", "sdpa")
    extra: dict[str, Any] = {"max_rank": 10, "adjust_start": 2, "adjust_interval": 2, "adjust_end": steps - 1}
    config = adapter_config(method, r=8, options={**extra, "adjust_size": 2} if method == "pedyra" else {})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    clock = Clock()
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=3,
            **{"bf16": False, "gradient_checkpointing": False, "max_length": LENGTH, **options},
        )
        trainer = SFTTrainer(
            model_of(attention),
            given,
            train_dataset=texts(),
            processing_class=tokenizer_of(),
            peft_config=config,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return statistics.median(clock.times[2:]), losses, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def cell(name: str, method: str, plain: tuple[float, list[float], int], steps: int) -> str:
    """What a combination comes to with a method."""
    options = dict(COMBINATIONS[name])
    needs = options.pop("needs", None)
    if needs == "an accelerator" and not torch.cuda.is_available():
        return "needs an accelerator"
    if needs and " " not in needs and importlib.util.find_spec(needs) is None:
        return "not installed"
    try:
        seconds, losses, graphs = train(method, options, steps)
    except Exception as error:  # a combination that does not work is a finding
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:80]
    text = f"{seconds / plain[0]:.2f}"
    apart = max(abs(a - b) for a, b in zip(losses, plain[1], strict=True))
    if apart > 2e-3 and name not in OTHER_LOSSES:
        text += f", losses {apart:.2g} apart"
    return f"{text}, {graphs} graphs" if "compile" in name else text


def main() -> None:
    """Print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="lora,dira,disel,dislora,pedyra")
    parser.add_argument("--combinations", default=",".join(COMBINATIONS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    methods = args.methods.split(",")
    known = dynalora.methods.METHODS
    plain = {method: train(method, {}, args.steps) for method in methods}
    rows: list[list[Any]] = [["plain (ms)", *(f"{1000 * plain[method][0]:.0f}" for method in methods)]]
    for name in args.combinations.split(","):
        if name != "plain":
            rows.append([name, *(cell(name, method, plain[method], args.steps) for method in methods)])
            print(rows[-1], flush=True)
    titles = [known[method].title if method in known else "LoRA" for method in methods]
    text = markdown_table(Table(["", *titles], rows))
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
