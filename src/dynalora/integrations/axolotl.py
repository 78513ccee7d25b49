"""Axolotl: `adapter: disel` in its YAML file.

```yaml
plugins:
  - dynalora.integrations.axolotl.DynaloraPlugin
adapter: disel # or another method
lora_r: 8
lora_target_linear: true
dynalora: # further settings of the method's configuration
  retain: 3000
```
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field

from dynalora.errors import ConfigError
from dynalora.integrations import tool_config
from dynalora.methods import method_names

# Settings of axolotl that are about a LoRA's form, which our methods have a form of their own for.
_UNUSED = (
    "peft_use_dora",
    "peft_use_rslora",
    "peft_init_lora_weights",
    "peft_layer_replication",
    "lora_target_parameters",
    "lora_fan_in_fan_out",
    "loraplus_lr_ratio",
)


class DynaloraArgs(BaseModel):
    """What the plugin adds to axolotl's settings."""

    dynalora: dict[str, Any] | None = Field(default=None, description="Further settings of a dynalora method.")


class DynaloraPlugin(BasePlugin):  # type: ignore[misc]
    """Makes the adapter that `adapter:` names, if it is one of ours."""

    def get_input_args(self) -> str:
        return f"{__name__}.{DynaloraArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in method_names()]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig | None] | None:
        """A fresh adapter, or the one in `lora_model_dir`.

        Raises:
            ConfigError: A setting that does not apply to our methods, or whose value cannot be.
        """
        if cfg.adapter not in method_names():
            return None
        for name in _UNUSED:
            if cfg.get(name):
                raise ConfigError(
                    f"{name} is {cfg.get(name)!r}, which is about PEFT's LoRA and does nothing for adapter "
                    f"'{cfg.adapter}'; leave it out, and put the method's own settings under dynalora."
                )
        if cfg.lora_model_dir and not config_only:
            adapted = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return adapted, adapted.peft_config["default"]
        options = {
            **(cfg.dynalora or {}),
            **{
                ours: cfg.get(theirs)
                for ours, theirs in (
                    ("modules_to_save", "lora_modules_to_save"),
                    ("rank_pattern", "lora_rank_pattern"),
                    ("alpha_pattern", "lora_alpha_pattern"),
                    ("layers_to_transform", "peft_layers_to_transform"),
                    ("layers_pattern", "peft_layers_pattern"),
                    ("trainable_token_indices", "peft_trainable_token_indices"),
                )
                if cfg.get(theirs)
            },
        }
        targets = "all-linear" if cfg.lora_target_linear else cfg.lora_target_modules
        config = tool_config(
            cfg.adapter,
            r=cfg.lora_r,
            alpha=cfg.lora_alpha,
            dropout=cfg.lora_dropout,
            target_modules=targets,
            options=options,
        )
        return (None, config) if config_only else (get_peft_model(model, config), config)
