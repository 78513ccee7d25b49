"""ms-swift: `--tuner_type disel`, with this file among its plugins.

    swift sft --tuner_type disel --external_plugins "$(python -m dynalora.integrations.ms_swift)" …

prints the path of this file for `--external_plugins`. ms-swift's `--lora_rank`, `--lora_alpha`, `--lora_dropout` and
`--target_modules` apply; further settings of the method are read from the environment variable `DYNALORA_OPTIONS`, a
JSON object: `DYNALORA_OPTIONS='{"retain": 3000}'`.
"""

from __future__ import annotations

from typing import Any

from dynalora.methods import method_names


def register() -> None:
    """Tell ms-swift our methods."""
    import torch
    from peft import get_peft_model
    from swift.tuner_plugin import PeftTuner, tuners_map

    from dynalora.integrations import options_from_environment, tool_config

    def tuner(method: str) -> type[Any]:
        class DynaloraTuner(PeftTuner):  # type: ignore[misc]
            @staticmethod
            def prepare_model(args: Any, model: torch.nn.Module) -> torch.nn.Module:
                config = tool_config(
                    method,
                    r=args.lora_rank,
                    alpha=args.lora_alpha,
                    dropout=args.lora_dropout,
                    target_modules=args.target_modules,
                    options=options_from_environment(),
                )
                return get_peft_model(model, config)

        return DynaloraTuner

    for method in method_names():
        tuners_map.setdefault(method, tuner(method))


if __name__ == "__main__":
    print(__file__)
else:
    register()
