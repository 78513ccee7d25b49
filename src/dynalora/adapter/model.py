"""The PEFT tuner: which modules are wrapped, what is saved, what is checked. Written once for all methods."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
)
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.method import Method
from dynalora.adapter.ranks import fit
from dynalora.driver import Driver, check_driven
from dynalora.errors import CheckpointError, ConfigError, UnsupportedError


class AdapterModel(BaseTuner):
    """Wraps a model's linear layers with adapters of one method."""

    method: ClassVar[Method]
    tuner_layer_cls = AdapterLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    # Injection -------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the target modules of an adapter and give it its clock. Parameters as PEFT's.

        Raises:
            NoMatchingPeftModuleError: No module matches; the message names the linear layers that exist.
            UnsupportedError: A target is no linear layer.
        """
        config = self.peft_config[adapter_name]
        self._making = Driver(self.method, config, adapter_name)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(f"{error} {describe_linear_layers(model)}") from None
        finally:
            del self._making
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, AdapterLayer) and module.has_adapter(adapter_name)
        }
        for first in itertools.islice(layers.values(), 1):
            first.become_lead(adapter_name)
        if not (kwargs.get("low_cpu_mem_usage") or _weights_will_follow()):
            self.method.prepare(layers, adapter_name, config)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if (
            peft_config.target_modules is None
            and model_config.get("model_type") not in self.target_module_mapping
        ):
            raise ConfigError(
                f"{type(peft_config).__name__}: target_modules must be given for the architecture "
                f"{model_config.get('model_type')!r}, for which there is no default; name the linear "
                "layers, or pass 'all-linear'."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(AdapterConfig, peft_config)
        assert config.alpha is not None
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), current_key), config.r)
        alpha = config.alpha_pattern.get(
            get_pattern_key(list(config.alpha_pattern), current_key), config.alpha
        )
        layer = target
        if not isinstance(target, self.method.layer_class):
            if not AdapterLayer.supports(target):
                raise UnsupportedError(
                    f"module {current_key!r} is a {type(target).__name__}, which {self.method.name} cannot "
                    "adapt (it adapts "
                    "nn.Linear, transformers' Conv1D and quantised linear layers); leave it out with "
                    "exclude_modules."
                )
            layer = self.method.layer_class(target, get_quantization_kwargs(self.model))
            layer.set_adapter(self.active_adapters)
        assert isinstance(layer, AdapterLayer)
        layer.name = current_key
        layer.update_layer(
            adapter_name,
            config,
            r,
            alpha,
            self._making,
            inference_mode=bool(config.inference_mode),
            scaling_rank=config.scaling_ranks.get(get_pattern_key(list(config.scaling_ranks), current_key)),
        )
        if adapter_name not in self.active_adapters:  # adding one does not make it train
            for parameter in layer.adapter_parameters(adapter_name).values():
                parameter.requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's cast makes new parameters, all of them trainable: put back which ones were.
        layers = [module for module in self.model.modules() if isinstance(module, AdapterLayer)]
        trainable = [
            {role: p.requires_grad for role, p in layer.adapter_parameters(adapter_name).items()}
            for layer in layers
        ]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer, roles in zip(layers, trainable, strict=True):
            for role, parameter in layer.adapter_parameters(adapter_name).items():
                parameter.requires_grad_(roles[role])

        if not autocast_adapter_dtype:  # as they were wanted, whatever they were computed in
            for layer in layers:
                if layer.has_adapter(adapter_name):
                    layer._move_adapter_to_device_of_base_layer(adapter_name)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        for module in self.model.modules():  # before the first layer is touched
            if isinstance(module, AdapterLayer):
                for adapter in module.active_adapters:
                    if module.has_adapter(adapter):
                        module.static_factors(adapter)

    # Saving and loading ----------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        check_driven(model, "saving")
        state = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, AdapterLayer) and module.has_adapter(adapter_name)
        }
        for name, layer in layers.items():
            if not layer.reserved[adapter_name]:
                continue
            # Room that is reserved is this process's own affair: the file holds what is in use.
            state.pop(f"{name}.{layer.method_name}_rank.{adapter_name}", None)
            for role, dim in layer.rank_dims.items():
                key = f"{name}.{layer.method_name}_{role}.{adapter_name}"
                if key in state:
                    state[key] = fit(state[key], dim, layer.rank(adapter_name)).contiguous()
        # The configuration is written next: in memory it stays as the user made it, on disk it has the ranks that are.
        moved = any(
            layer.rank(adapter_name) != layer.scaling_ranks[adapter_name] for layer in layers.values()
        )
        config.result = _patterns(config, layers.values(), adapter_name) if moved else {}
        if isinstance(config.init_weights, str):
            # How the weights began: whoever loads them needs no decomposition of the base's.
            config.result["init_weights"] = True
        return state

    @property
    def rank_pattern(self) -> dict[str, int]:
        """The rank of every adapted matrix by module name, of the active adapter."""
        return {
            module.name: module.rank(self.active_adapters[0])
            for module in self.model.modules()
            if isinstance(module, AdapterLayer) and module.has_adapter(self.active_adapters[0])
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        saved: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in state_dict.items():
            owner, _, own = key.rpartition(".")
            saved.setdefault(owner.removeprefix("base_model.model."), {})[own] = tensor
        for name, module in model.named_modules():
            if isinstance(module, AdapterLayer) and module.has_adapter(adapter_name):
                # Names are matched by what the model has: it must have what the file has.
                module.expect(adapter_name, saved.get(name.removeprefix("base_model.model."), {}))
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        expected = {
            key
            for name, module in model.named_modules()
            if isinstance(module, AdapterLayer)
            for key in (
                f"{name}.{module.method_name}_{role}.{adapter_name}"
                for role in module.saved_tensors(adapter_name)
            )
        }
        missing = sorted(expected - remapped.keys())
        if missing and len(missing) < len(expected):
            raise CheckpointError(
                f"the saved {cls.method.name.upper()} adapter lacks {len(missing)} of {len(expected)} "
                "tensors (the first is "
                f"{missing[0]!r}); it is incomplete, or was made for other target modules."
            )
        if missing:
            some = next(iter(state_dict), "nothing")
            raise CheckpointError(
                f"the file holds no {cls.method.name.upper()} adapter for this model: it has {some!r}, "
                "while the model has "
                f"{missing[0]!r}; load it onto the base model it was trained on, with the method that made "
                "it."
            )
        return remapped


def _weights_will_follow() -> bool:
    """Whether an adapter is being made only to be filled from a file, so that its start need not be computed."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        if frame.f_code in _LOADERS:
            return True
        frame = frame.f_back
    return False


_LOADERS = frozenset(
    inspect.unwrap(getattr(loader, "__func__", loader)).__code__
    for loader in (PeftModel.from_pretrained, PeftModel.load_adapter, PeftAdapterMixin.load_adapter)
)


def _patterns(config: AdapterConfig, layers: Iterable[AdapterLayer], adapter: str) -> dict[str, Any]:
    """Settings with which a fresh adapter has the ranks that this one has come to, and its scaling."""

    def ranks(present: Callable[[AdapterLayer], int], usual: Callable[[AdapterLayer], int]) -> dict[str, int]:
        # PEFT reads the keys as regular expressions for the end of a module's name.
        return {f"^{re.escape(x.name)}": present(x) for x in layers if present(x) != usual(x)}

    layers = list(layers)
    return {
        "rank_pattern": ranks(lambda layer: layer.rank(adapter), lambda layer: config.r),
        "scaling_ranks": ranks(lambda layer: layer.scaling_ranks[adapter], lambda layer: layer.rank(adapter)),
    }


def describe_linear_layers(model: nn.Module) -> str:
    """A sentence that names the linear layers of a model, for messages."""
    kinds: dict[str, int] = {}
    for name, module in model.named_modules():
        if name and AdapterLayer.supports(module):
            kind = name.rpartition(".")[2]
            kinds[kind] = kinds.get(kind, 0) + 1
    if not kinds:
        return "This model has no linear layers."
    named = ", ".join(
        f"{kind} ({count})" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])[:20]
    )
    hint = "target_modules='all-linear' takes all but the output layer"
    return f"The linear layers of this model are named: {named}; {hint}."
