"""PEFT's own generic tests over dynalora's methods, with LoRA's rows beside them as control.

    git clone --depth 1 https://github.com/huggingface/peft FOLDER     # the tests are not in the wheel
    pip install diffusers                                              # which they import
    python benchmarks/peft_tests.py FOLDER [--file custom_models] [--methods lora,dira] [-- -k merge -x]

The matrices of those tests are lists. Their rows are replaced by LoRA's and by the same for each method; tests that
are no rows of a configuration are left out. Models of the Hub are replaced by tiny ones of the same architectures with
random weights. What follows `--` is for pytest. The result is a table by file and method of what passed, was skipped,
was refused by dynalora in a sentence (`UnsupportedError`, `CheckpointError`), and failed; and what was refused and
failed, by test and reason.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import dynalora

METHODS = {
    "lora": peft.LoraConfig,
    "dira": dynalora.DiraConfig,
    "disel": dynalora.DiselConfig,
    "dislora": dynalora.DisloraConfig,
    "pedyra": dynalora.PedyraConfig,
}
REFUSALS = ("dynalora.errors.UnsupportedError", "dynalora.errors.CheckpointError")
OUTCOMES = ("passed", "skipped", "refused", "failed")
FILES = ("custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models")
# What the shared settings are called; a row of LoRA with any other setting is about LoRA alone.
NAMES = {"lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init_weights"}
SHARED = {"target_modules", "modules_to_save", "exclude_modules", "trainable_token_indices", "r", "bias", "task_type"}
# What the rows of ours have besides: the length of the run, for methods with a schedule, and a first phase that ends
# within the tests' few steps; learning rates that are the tests' own, which are high; effects above their tolerances
# (alpha, half-open gates); and no more rank than the one output of their smallest layer, of which DisLoRA needs the
# singular triplets.
OURS = {
    "dira": {"total_steps": 20, "alpha": 32},
    "disel": {"gate_bias_init": 0.0, "alpha": 32, "match_step": False},
    "dislora": {"total_steps": 20, "r": 1, "warmup_steps": 1, "match_step": False},
    "pedyra": {"total_steps": 20, "match_step": False},
}

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
DECODER = {**TINY, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 64}
ENCODER = {**TINY, "intermediate_size": 32, "max_position_embeddings": 64, "type_vocab_size": 2}
PAIR = {"vocab_size": 128, "d_model": 16}
MODELS: dict[str, dict[str, Any]] = {
    "decoder_models": {
        "OPTForCausalLM": {**TINY, "ffn_dim": 32, "max_position_embeddings": 64, "word_embed_proj_dim": 16},
        "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64},
        "GPTJForCausalLM": {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 128,
            "n_positions": 64,
            "rotary_dim": 4,
        },
        "LlamaForCausalLM": DECODER,
        "Qwen2ForCausalLM": DECODER,
        "Gemma3ForCausalLM": {**DECODER, "head_dim": 4},
    },
    "encoder_decoder_models": {
        "T5ForConditionalGeneration": {**PAIR, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4},
        "BartForConditionalGeneration": {
            **PAIR,
            **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 32))},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64},
        },
    },
    "feature_extraction_models": {
        "BertModel": ENCODER,
        "RobertaModel": ENCODER,
        "DebertaModel": {**ENCODER, "pos_att_type": ["p2c", "c2p"], "relative_attention": True},
        "DebertaV2Model": {**ENCODER, "pos_att_type": ["p2c", "c2p"], "relative_attention": True},
    },
}


def tiny_models(file: str, folder: Path) -> list[str]:
    """Folders of tiny models of the architectures that a file's tests load, named after those."""
    paths = []
    for name, settings in MODELS.get(file, {}).items():
        torch.manual_seed(0)
        model_class = getattr(transformers, name)
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3, "decoder_start_token_id": 0}
        config = model_class.config_class(**settings, **special, initializer_range=0.2)
        path = folder / f"tiny-random-{name}"
        model_class(config).save_pretrained(path)
        paths.append(str(path))
    return paths


def row_for(config: Any, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of LoRA's row for a method; None where the row is about LoRA alone."""
    renamed = {NAMES.get(name, name): value for name, value in settings.items()}
    if config is peft.LoraConfig:
        return settings if renamed.keys() <= SHARED | set(NAMES.values()) else None
    if not renamed.keys() <= SHARED | set(NAMES.values()) or isinstance(renamed.get("init_weights"), str):
        return None
    return {**OURS[config.method], **renamed}


def replace_rows(module: Any, file: str, methods: list[str], folder: Path) -> None:
    """Replace the rows of a file's matrices, in place."""
    configs = [METHODS[name] for name in methods]
    if file == "custom_models":
        rows = [row for row in module.TEST_CASES if row[2] is peft.LoraConfig]
        module.TEST_CASES[:] = [
            (re.sub(r"\bLoRA\b", name, row[0]), row[1], METHODS[name], settings)
            for name in methods
            for row in rows
            if (settings := row_for(METHODS[name], row[3])) is not None
        ]
        module.ALL_PEFT_CONFIG_CLASSES[:] = configs
        return
    settings = [kwargs for config, kwargs in module.ALL_CONFIGS if config is peft.LoraConfig]
    module.ALL_CONFIGS[:] = [
        (config, made) for config in configs for kwargs in settings if (made := row_for(config, kwargs)) is not None
    ]
    for name, value in vars(module).items():
        if name.startswith("PEFT_") and name.endswith("_MODELS_TO_TEST"):
            value[:] = tiny_models(file, folder)


class Table:
    """Counts what becomes of the tests by file and method, and leaves out those that are of neither."""

    def __init__(self, methods: list[str]) -> None:
        self.names = {METHODS[name]: name for name in methods}
        self.method: dict[str, tuple[str, str]] = {}
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.failures: dict[tuple[str, str], Counter[str]] = {}

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep the rows."""
        kept, left = [], []
        for item in items:
            name = self.names.get(getattr(item, "callspec", None) and item.callspec.params.get("config_cls"))
            (left if name is None else kept).append(item)
            if name is not None:
                self.method[item.nodeid] = item.path.stem.removeprefix("test_"), name
        items[:] = kept
        config.hook.pytest_deselected(items=left)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test when it is over, or has failed to begin."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            (file, name), outcome = self.method[report.nodeid], report.outcome
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                message = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]
                outcome = "refused" if message.startswith(REFUSALS) else "failed"
                test = f"{file} {report.nodeid.rpartition('::')[2].partition('[')[0]}"
                self.failures.setdefault((test, message[:160]), Counter())[name] += 1
            self.counts[file, name, outcome] += 1

    def __str__(self) -> str:
        """A table in Markdown, and the failures."""
        files = sorted({file for file, _, _ in self.counts})
        lines = [
            ", ".join(OUTCOMES) + ":",
            "",
            "| tests | " + " | ".join(self.names.values()) + " |",
            "|---|" + "---|" * len(self.names),
        ]
        for file in files:
            cells = [
                " / ".join(str(self.counts[file, name, outcome]) for outcome in OUTCOMES)
                for name in self.names.values()
            ]
            lines.append(f"| {file} | " + " | ".join(cells) + " |")
        for (test, message), counts in sorted(self.failures.items()):
            lines.append(f"{test}: {', '.join(f'{n} {name}' for name, n in counts.items())}: {message}")
        return "\n".join(lines)


def main() -> int:
    """Run the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder with PEFT's tests")
    parser.add_argument("--file", action="append", choices=FILES, help="one of the files; may be given several times")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}, with commas")
    arguments, rest = parser.parse_known_args()
    methods = arguments.methods.split(",")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.chdir(arguments.checkout)
    sys.path.insert(0, os.getcwd())
    files = arguments.file or list(FILES)
    table = Table(methods)
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            replace_rows(importlib.import_module(f"tests.test_{file}"), file, methods, Path(folder))
        options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=line", "--show-capture=no", "-o", "addopts="]
        more = [part for part in rest if part != "--"]
        code = pytest.main([*(f"tests/test_{file}.py" for file in files), *options, *more], plugins=[table])
    print(table)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
