"""LLaMA-Factory's version 1: `peft_config: {name: disel}` in its YAML file.

    USE_V1=1 python -m dynalora.integrations.llamafactory sft train.yaml
    USE_V1=1 torchrun --nproc-per-node 2 -m dynalora.integrations.llamafactory sft train.yaml

with the method and its settings in `train.yaml`:

```yaml
peft_config:
  name: disel # or another method
  r: 8
  target_modules: all-linear # or names
  retain: 3000 # any setting of the method's configuration
```

LLaMA-Factory has no list of plugins to import, so its command is started from here, after the methods are registered.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from dynalora.errors import ConfigError
from dynalora.integrations import tool_config
from dynalora.methods import method_names

_NAMED = ("name", "r", "lora_alpha", "lora_dropout", "target_modules", "adapter_name_or_path")


def register() -> None:
    """Tell LLaMA-Factory our methods."""
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin, load_adapter
    from peft import get_peft_model

    def maker(method: str) -> Any:
        def make(model: Any, config: dict[str, Any], is_train: bool = False) -> Any:
            if config.get("adapter_name_or_path"):
                return load_adapter(model, config["adapter_name_or_path"], is_train)
            targets = config.get("target_modules")
            made = tool_config(
                method,
                r=config.get("r"),
                alpha=config.get("lora_alpha"),
                dropout=config.get("lora_dropout"),
                target_modules=None if targets == "all" else targets,
                options={name: value for name, value in config.items() if name not in _NAMED},
            )
            made.inference_mode = not is_train
            return get_peft_model(model, made)

        return make

    for method in method_names():
        PeftPlugin(method).register()(maker(method))


def main() -> None:
    """Register, and go on as LLaMA-Factory's own command.

    Raises:
        ConfigError: It would start further processes, which would not know our methods.
    """
    from llamafactory.v1 import launcher
    from llamafactory.v1.accelerator.helper import get_device_count

    register()
    if "LOCAL_RANK" in os.environ:
        launcher.main()
        return
    if get_device_count() > 1:
        raise ConfigError(
            f"LLaMA-Factory would start {get_device_count()} processes that do not know dynalora's methods; start them "
            f"yourself: torchrun --nproc-per-node {get_device_count()} -m {__spec__.name} {' '.join(sys.argv[1:])}"
        )
    launcher.launch()


if __name__ == "__main__":
    main()
