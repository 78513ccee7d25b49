"""TRL's command line with one of our methods.

    python -m dynalora.integrations.trl sft --adapter disel --model_name_or_path Qwen/Qwen3-0.6B --dataset_name …
    accelerate launch -m dynalora.integrations.trl dpo --adapter dira --adapter_options '{"retain": 3000}' …

All else is as with `trl sft`, `trl dpo` and so on; its `--lora_r`, `--lora_alpha`, `--lora_dropout`,
`--lora_target_modules`, `--lora_modules_to_save` and `--lora_task_type` apply, as far as they are given.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from dynalora.integrations import parsed_options, tool_config
from dynalora.methods import method_names

SCRIPTS = ("sft", "dpo", "kto", "grpo", "rloo", "reward")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of TRL's training scripts.

    Args:
        arguments: The command line; None: the process's own.

    Raises:
        ConfigError: Options that are no JSON object, or that the method does not have.
    """
    parser = argparse.ArgumentParser(
        "python -m dynalora.integrations.trl",
        description="TRL's training scripts with a dynalora adapter; all further options are the script's own.",
    )
    parser.add_argument("script", choices=SCRIPTS, help="which of TRL's scripts")
    parser.add_argument("--adapter", required=True, choices=method_names(), help="the method")
    parser.add_argument(
        "--adapter_options", default="{}", metavar="JSON", help="further settings of the method's configuration"
    )
    own, rest = parser.parse_known_args(arguments)
    options = parsed_options(own.adapter_options, "--adapter_options")

    trl: Any = importlib.import_module("trl")
    script = importlib.import_module(f"trl.scripts.{own.script}")
    parts = script.make_parser(prog=f"trl {own.script}").parse_args_and_config(rest, fail_with_unknown_args=True)
    settings = next(part for part in parts if isinstance(part, trl.ModelConfig))
    config = _config(own.adapter, settings, options)
    theirs = trl.get_peft_config
    trl.get_peft_config = lambda _: config  # the script asks for it when it makes its trainer
    try:
        script.main(*parts)
    finally:
        trl.get_peft_config = theirs


def _config(method: str, settings: Any, options: dict[str, Any]) -> Any:
    """What TRL's settings say that differs from their defaults."""
    default = type(settings)()

    def given(name: str) -> Any:
        value = getattr(settings, name)
        return None if value == getattr(default, name) else value

    if settings.lora_modules_to_save:
        options = {**options, "modules_to_save": settings.lora_modules_to_save}
    return tool_config(
        method,
        r=given("lora_r"),
        alpha=given("lora_alpha"),
        dropout=given("lora_dropout"),
        target_modules=settings.lora_target_modules,
        options=options,
        task_type=settings.lora_task_type,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
