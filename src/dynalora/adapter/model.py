"""The PEFT tuner: which modules are wrapped, what is saved, what is checked. Written once for all methods."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, Literal, cast

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
)
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn

from dynalora.adapter.combining import Combination
from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.layer import AdapterLayer, adapter_layers
from dynalora.adapter.matching import MatchedRates
from dynalora.adapter.method import Method
from dynalora.adapter.parts import Parted, PartMatrix, biases_of_parts, name_in_base_model
from dynalora.adapter.patterns import check_patterns, of_module
from dynalora.adapter.ranks import fit
from dynalora.adapter.retain import Retain
from dynalora.adapter.saved import check_further_tensors, check_known, read_shapes
from dynalora.adapter.shared_input import join_companions
from dynalora.adapter.targets import (
    NothingToAdaptError,
    check_trained_besides,
    count_of_experts,
    describe_linear_layers,
    is_target,
    leave_out_head,
    settle_targets,
    targets_naming,
)
from dynalora.common.names import plain_name
from dynalora.common.private import (
    after_failed_load,
    after_load_by_transformers,
    after_unread_method,
    loads_what_fits,
    name_base_weights,
    tie_modules_to_save,
)
from dynalora.driver import Driver, Part, check_driven, first_bad, first_bad_of, prepare_unloaded
from dynalora.errors import CheckpointError, ConfigError, UnsupportedError, first_line


class AdapterModel(BaseTuner):
    """Wraps a model's linear layers with adapters of one method."""

    method: ClassVar[Method]
    tuner_layer_cls = AdapterLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    # Injection -------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the target modules of an adapter and give it its clock. Parameters as PEFT's.

        Raises:
            NothingToAdaptError: No module matches; the message names the linear layers that exist.
            UnsupportedError: A target is no linear layer.
            ConfigError: Matching the names of the modules does not come to an end, or what is to be trained besides
                cannot be.
        """
        names = [name for name, _ in model.named_modules()]
        check_patterns(self.peft_config[adapter_name], names, count_of_experts(model))
        check_trained_besides(model, self.peft_config[adapter_name])
        vars(self.peft_config[adapter_name]).pop("modules_to_tie", None)  # of another model with the same configuration
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            # PEFT calls the hook itself for the adapter that a tuner is made with, but not for those added later.
            self._post_injection_hook(model, self.peft_config[adapter_name], adapter_name)
        except NoMatchingPeftModuleError as error:
            raise NothingToAdaptError(f"{error} {describe_linear_layers(model)}") from None
        except Exception as error:
            _take_back(model, adapter_name)
            if isinstance(error, TypeError) and "cannot be applied to modules" in str(error):  # PEFT's
                kind = type(self.peft_config[adapter_name]).__name__
                raise ConfigError(
                    f"{kind}: {first_line(error)}; train such a module in one way only, and in full or in some of its "
                    "tokens only what has weights of its own."
                ) from None
            if "Cannot ensure weight tying" in str(error):  # PEFT's
                raise ConfigError(
                    f"{type(self.peft_config[adapter_name]).__name__}: ensure_weight_tying=True, but "
                    "trainable_token_indices has different tokens for embeddings and a head that are one weight; give "
                    "both the same, or set ensure_weight_tying=False."
                ) from None
            raise

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        layers = {
            name: layer
            for name, layer in adapter_layers(model, adapter_name).items()
            if adapter_name not in layer.drivers
        }
        if not layers:
            return
        driver = Driver(self.method, config, adapter_name, _parts(config))
        for layer in layers.values():
            layer.drive(adapter_name, driver)
        next(iter(layers.values())).become_lead(adapter_name)
        join_companions(adapter_layers(model))
        self.method.join(layers, adapter_name, config)
        if config.may_be_loaded or config.inference_mode:
            for layer in layers.values():
                layer.unprepared[adapter_name] = layer.parameter("up", adapter_name)
        else:
            self.method.prepare(layers, adapter_name, config)

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        # PEFT adds to the list, which may be the user's own.
        peft_config.modules_to_save = list(peft_config.modules_to_save)
        tie_modules_to_save(self, peft_config, tied_weight_keys)

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        raise ConfigError(
            f"{type(peft_config).__name__}: ensure_weight_tying cannot tie adapters of the input embeddings and of "
            f"{', '.join(map(repr, tied_weight_keys))}, which act on different inputs; train the weight itself with "
            "modules_to_save or trainable_token_indices, or set ensure_weight_tying=False."
        )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and model_config.get("model_type") not in self.target_module_mapping:
            raise ConfigError(
                f"{type(peft_config).__name__}: target_modules must be given for the architecture "
                f"{model_config.get('model_type')!r}, for which there is no default; name the linear "
                "layers, or pass 'all-linear'."
            )
        leave_out_head(peft_config)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)

        def check(module: nn.Module, name: str) -> None:
            self.method.layer_class.check_base_layer(module, name, peft_config, self._rank(peft_config, name))

        settle_targets(model, peft_config, check)

    @staticmethod
    def _rank(config: AdapterConfig, name: str) -> int:
        return of_module(config.rank_pattern, name, config.r)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        return is_target(self.model, peft_config, key)

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
        r = self._rank(config, current_key)
        alpha = of_module(config.alpha_pattern, current_key, config.alpha)
        layer = target
        if not isinstance(target, self.method.layer_class):
            layer = self.method.layer_class(target, get_quantization_kwargs(self.model))
            layer.set_adapter(self.active_adapters)
        assert isinstance(layer, AdapterLayer)
        layer.name = current_key
        layer.read_by_owner = isinstance(parent, nn.TransformerEncoderLayer)
        layer.update_layer(
            adapter_name,
            config,
            r,
            alpha,
            inference_mode=bool(config.inference_mode),
            scaling_rank=of_module(config.scaling_ranks, current_key, None),
        )
        if adapter_name not in self.active_adapters:  # adding one does not make it train
            for parameter in layer.adapter_parameters(adapter_name).values():
                parameter.requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's reads ``child.weight``, which a classification head that is trained in full need not have. What else
        # it does is done: layers bring their adapters to the base layer's device by themselves.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's cast makes new parameters, all of them trainable: put back which ones were.
        layers = adapter_layers(self.model).values()
        trainable = [
            {role: p.requires_grad for role, p in layer.adapter_parameters(adapter_name).items()} for layer in layers
        ]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer, roles in zip(layers, trainable, strict=True):
            for role, parameter in layer.adapter_parameters(adapter_name).items():
                parameter.requires_grad_(roles[role])

        if not autocast_adapter_dtype:  # as they were wanted, whatever they were computed in
            for layer in layers:
                if layer.has_adapter(adapter_name):
                    layer._move_adapter_to_device_of_base_layer(adapter_name)
        for layer in layers:
            if adapter_name in layer.unprepared:
                layer.unprepared[adapter_name] = layer.parameter("up", adapter_name)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        for layer in adapter_layers(self.model).values():  # before the first layer is touched
            for adapter in filter(layer.has_adapter, layer.active_adapters):
                layer.factors(adapter)
                layer.check_mergeable()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, to be unmerged again. Parameters as PEFT's.

        Raises:
            UnsupportedError: The update depends on the input, or a weight is shared with a module that is not adapted.
        """
        for layer, others in self._tied(adapter_names):
            raise UnsupportedError(
                f"cannot merge into {layer.name!r}, whose weight is also that of {', '.join(map(repr, others))}, "
                "which would change with it; use merge_and_unload(), which gives it a weight of its own, or load "
                "the base model with tie_word_embeddings=False."
            )
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Make one adapter of several; see [`adapter.combining`][dynalora.adapter.combining]. Parameters as PEFT's.

        The new adapter is not active and does not train; it is of the same method, with the first one's settings.

        Args:
            adapters: Names of adapters of the model, whose updates are fixed matrices.
            weights: A weight for each, which may be negative.
            adapter_name: The new adapter's name.
            combination_type: `"cat"` for the exact sum of the updates, `"svd"` for its best approximation of a given
                rank, or another of `dynalora.adapter.combining.COMBINATIONS`.
            svd_rank: The rank of combinations with `svd`; None: the number of components of the adapter that has most.
            svd_clamp: Not supported; None.
            svd_full_matrices: Has no effect.
            svd_driver: Has no effect.
            density: The share of values that TIES, DARE and pruning keep, in (0, 1].
            majority_sign_method: How TIES elects signs, `"total"` or `"frequency"`.

        Raises:
            ConfigError: A setting is none that there is, or an adapter of this name is there already.
            UnsupportedError: An update depends on the input, is more than a matrix of low rank, or is trained together
                with other weights.
        """
        if svd_clamp is not None:
            raise ConfigError(f"add_weighted_adapter: svd_clamp={svd_clamp!r} is not supported; leave it out.")
        adapters = list(adapters)
        if len(adapters) != len(weights):
            raise ConfigError(
                f"add_weighted_adapter got {len(adapters)} adapters and {len(weights)} weights; give one for each."
            )
        how = Combination(
            tuple(zip(adapters, weights, strict=True)), combination_type, svd_rank, density, majority_sign_method
        )
        if adapter_name in self.peft_config:
            raise ConfigError(f"add_weighted_adapter: there is an adapter {adapter_name!r} already; choose a new name.")
        self._check_combined(adapters)
        layers = adapter_layers(self.model)
        factors = {name: made for name, layer in layers.items() if (made := how.of(layer)) is not None}
        targets, left_out = targets_naming(self.model, factors)
        ranks = {name: len(down) for name, (_, down) in factors.items()}
        r = max(ranks.values())
        others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
        config = cast(AdapterConfig, self.peft_config[adapters[0]]).combined(
            r=r, alpha=float(r), use_rslora=False, rank_pattern=others, alpha_pattern={},
            scaling_ranks=dict.fromkeys(others, r), target_modules=targets, exclude_modules=left_out,
            layers_to_transform=None, layers_pattern=None, inference_mode=True,
        )  # fmt: skip
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        config.inference_mode = config.may_be_loaded = False  # it was set so that no start is computed
        for name, (up, down) in factors.items():
            layers[name].take_factors(adapter_name, up, down)

    def _check_combined(self, adapters: Sequence[str]) -> None:
        """Refuse adapters of which no single one can be made."""
        instead = (
            f"activate them together with model.base_model.set_adapter({list(adapters)!r}), which adds their updates up"
        )
        for adapter in adapters:
            config = self.peft_config.get(adapter)
            if config is None:
                raise ConfigError(
                    f"add_weighted_adapter names {adapter!r}, but the model's adapters are "
                    f"{', '.join(map(repr, self.peft_config))}."
                )
            besides = [
                name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name) is not None
            ]
            if besides or config.bias != "none":  # type: ignore[attr-defined]
                raise UnsupportedError(
                    f"adapter {adapter!r} was trained with {(besides or ['bias'])[0]}, and weights that are trained "
                    f"besides cannot be combined; {instead}, or merge one adapter after the other."
                )
            layers = adapter_layers(self.model, adapter)
            if not self.method.layer_class.takes_factors:
                raise UnsupportedError(
                    f"adapters of {self.method.name.upper()} are not combined into one, whose form is not that of "
                    f"any matrix of low rank; {instead}, or export each with dynalora.export_lora and combine the "
                    "plain LoRAs with PEFT."
                )
            if any(layer.plain_extras(adapter) for layer in layers.values()):
                raise UnsupportedError(
                    f"adapter {adapter!r} scales the whole weight (use_dora=True), so its update cannot be combined "
                    "with others into one; merge one adapter after the other (merge_and_unload)."
                )
            if any(layer.depends_on_input(adapter) for layer in layers.values()):
                raise UnsupportedError(
                    f"the update of adapter {adapter!r} depends on the input (its gates are computed for every token), "
                    f"so it cannot be combined with others into one; {instead}, or export each with held gates "
                    "(export_lora(gates=record_gates(...))) and combine the plain LoRAs with PEFT."
                )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge_allowed()
            for layer, _ in self._tied(adapter_names):
                base = layer.get_base_layer()
                weight = cast(nn.Parameter, base.weight)
                base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def _tied(self, adapter_names: Sequence[str] | None) -> list[tuple[AdapterLayer, list[str]]]:
        """Layers of these adapters (None: the active ones) whose weight other modules have too, with their names."""
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
        tied = []
        for name, layer in adapter_layers(self.model).items():
            if any(map(layer.has_adapter, adapter_names or layer.active_adapters)):
                base = layer.get_base_layer()
                weight = None if isinstance(base, PartMatrix) else getattr(base, "weight", None)  # its owner has it
                sharing = owners.get(id(weight), [])
                others = [owner for owner in sharing if owner != f"{name}.base_layer"]
                if others:
                    tied.append((layer, others))
        return tied

    # Mixed batches -----------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, num_beams: int | None = None, **kwargs: Any
    ) -> Iterator[None]:
        # PEFT calls this around forward and generate, with what the user passed to them.
        if adapter_names is None:
            yield
            return
        names = self._check_adapter_names(adapter_names)
        # Beam search repeats every row; the encoder runs before that.
        repeated = [name for name in names for _ in range(num_beams or 1)]
        config = getattr(self.model, "config", None)
        encoder = self.model.get_encoder() if getattr(config, "is_encoder_decoder", False) else None
        unrepeated = set(encoder.modules()) if isinstance(encoder, nn.Module) else set()
        # What stands around others hands the names on to them, which may see tokens instead of rows.
        handed_on = {part for module in self.modules() if isinstance(module, Parted) for part in module.parts()}
        handles = [
            module.register_forward_pre_hook(
                partial(_with_adapter_names, names=names if module in unrepeated else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (AdapterLayer, AuxiliaryTrainingWrapper, Parted)) and module not in handed_on
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: Sequence[str]) -> list[str]:
        if self.training:
            raise ConfigError(
                "adapter_names cannot be used in training, where active adapters train; call model.eval() first."
            )
        if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
            raise ConfigError(
                f"adapter_names must be a list with one adapter name for each row, got {adapter_names!r}."
            )
        unknown = sorted(set(adapter_names) - {"__base__", *self.peft_config})
        if unknown:
            raise ConfigError(
                f"adapter_names names {', '.join(map(repr, unknown))}, but the model's adapters are "
                f"{', '.join(map(repr, self.peft_config))} (and '__base__', the base model)."
            )
        if merged := sorted({name for layer in adapter_layers(self.model).values() for name in layer.merged_adapters}):
            raise ConfigError(
                f"adapter_names cannot be used while {', '.join(merged)} is merged; call unmerge_adapter() first."
            )
        return list(adapter_names)

    # Saving and loading ----------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        prepare_unloaded(model)
        check_driven(model, "saving")
        state = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        layers = adapter_layers(model, adapter_name)
        if found := first_bad(list(layers.values()), adapter_name, gradients=False):
            warnings.warn(
                f"saving adapter {adapter_name!r} with {found[1]} of {found[0]!r}, and perhaps of other layers: "
                "training has diverged, and such an adapter cannot be loaded again; go back to an earlier checkpoint.",
                stacklevel=2,
            )
        elif found := first_bad_of(_saved_besides(model, layers, adapter_name)):
            warnings.warn(
                f"saving adapter {adapter_name!r} with {found[1]} in {found[0]!r}, which is saved or trained beside "
                "its weights: such an adapter cannot be loaded again; go back to an earlier checkpoint.",
                stacklevel=2,
            )
        for name, layer in layers.items():
            if not layer.reserved[adapter_name]:
                continue
            # Room that is reserved is this process's own affair: the file holds what is in use.
            state.pop(f"{name}.{layer.method_name}_rank.{adapter_name}", None)
            for role, axes in layer.rank_axes.items():
                key = f"{name}.{layer.method_name}_{role}.{adapter_name}"
                for dim in axes if key in state else ():
                    state[key] = fit(state[key], dim, layer.rank(adapter_name)).contiguous()
        config.follow(layers.values(), adapter_name)  # it is written next, if the state is to be saved
        return state

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, torch.Tensor], config: Any
    ) -> dict[str, torch.Tensor]:
        # PEFT looks for biases in the base layers, and those of parts lie in the module around them.
        biases = super()._get_learnable_bias_state_dict(model, state_dict, config)
        places = biases_of_parts(model) if config.bias.endswith("_only") else ()
        return {**biases, **{place: state_dict[place] for place in places if place in state_dict}}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Modules load one after the other, this one before its layers: so a refusal leaves none of them changed.
        for name, module in self.named_modules():
            for adapter in module.ranks if isinstance(module, AdapterLayer) else ():
                module.check(adapter, module.saved_here(state_dict, f"{prefix}{name}.", adapter))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """The rank of every adapted matrix by module name, of the active adapter."""
        adapter = self.active_adapters[0]
        return {layer.name: layer.rank(adapter) for layer in adapter_layers(self.model, adapter).values()}

    @classmethod
    def _check_saved(
        cls,
        model: nn.Module,
        config: Any,
        layers: Mapping[str, AdapterLayer],
        adapter: str,
        state: dict[str, torch.Tensor],
        saved: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        """Refuse tensors that are not all of an adapter and nothing else.

        Raises:
            CheckpointError: Some are missing, fit nowhere, or hold what cannot be meant.
        """
        prefix = f"{cls.method.name}_"
        expected = {
            f"{plain_name(name)}.{prefix}{role}"
            for name, layer in layers.items()
            for role in layer.saved_tensors(adapter)
        }
        missing = sorted(expected - {plain_name(key) for key in state})
        if missing and len(missing) < len(expected):
            raise CheckpointError(
                f"the saved {cls.method.name.upper()} adapter lacks {len(missing)} of {len(expected)} tensors (the "
                f"first is {missing[0]!r}); it is incomplete, or was made for other target modules."
            )
        if missing:
            some = next(iter(state), "nothing")
            raise CheckpointError(
                f"the file holds no {cls.method.name.upper()} adapter for this model: it has {some!r}, while the model "
                f"has {missing[0]!r}; load it onto the base model it was trained on, with the method that made it."
            )
        by_name = {plain_name(name): layer for name, layer in layers.items()}
        for owner, tensors in saved.items():
            ours = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if ours and owner in by_name:
                by_name[owner].check(adapter, ours)
            elif ours:
                raise CheckpointError(
                    f"the saved {cls.method.name.upper()} adapter does not fit the model (it has tensors for "
                    f"{owner!r}, which is not adapted here); load it onto the base model it was trained on."
                )
        check_further_tensors(model, config, by_name, adapter, state, prefix, what_fits=loads_what_fits())

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        saved: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in state_dict.items():
            owner, _, name = key.rpartition(".")
            saved.setdefault(plain_name(owner), {})[name] = tensor
        layers = adapter_layers(model, adapter_name)
        # All of it before the first layer changes, so that a load is all or nothing.
        cls._check_saved(model, config, layers, adapter_name, state_dict, saved)
        for name, layer in layers.items():
            # Names are matched by what the model has: it must have what the file has.
            layer.expect(adapter_name, saved.get(plain_name(name), {}))
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        return remapped


def _saved_besides(
    model: nn.Module, layers: Mapping[str, AdapterLayer], adapter: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """What goes into a file beside an adapter's parameters: what it remembers, and what is trained besides."""
    for name, layer in layers.items():
        for role in layer.buffer_roles:
            if (buffer := layer.running(role, adapter)) is not None:
                yield f"{name}.{layer.method_name}_{role}", buffer
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()


def _take_back(model: nn.Module, adapter: str) -> None:
    """Take an adapter that could not be made off the layers that have it already."""
    layers = adapter_layers(model, adapter)
    for layer in layers.values():
        layer.delete_adapter(adapter)
    _unwrap(model, layers)


def _unwrap(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """Put the base layers back where layers have no adapter left."""
    for name, layer in layers.items():
        if not layer.scaling:
            model.set_submodule(name, layer.base_layer)
    for name, module in list(model.named_modules()):
        if isinstance(module, Parted) and not module.is_used():
            model.set_submodule(name, module.base_layer)


def _withdraw(model: PeftModel, adapter: str, folder: str, error: Exception) -> Exception:
    """After a load that failed, take away the adapter that was made for it; returns the error to raise."""
    config = model.peft_config.get(adapter)
    if not isinstance(config, AdapterConfig):
        return error
    layers = adapter_layers(model, adapter)
    # One that was there before has weights.
    if layers and all(adapter in layer.unprepared for layer in layers.values()):
        if len(model.peft_config) > 1:
            model.delete_adapter(adapter)
            _unwrap(model, layers)
            _unwrap_unused(model)
        else:
            tuner: Any = model.base_model
            base = tuner.unload()
            for trace in ("peft_config", "_hf_peft_config_loaded"):
                base.__dict__.pop(trace, None)
    if os.path.isdir(folder) and not os.path.exists(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)):
        return CheckpointError(f"the adapter in {folder} has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter again.")
    if isinstance(error, SafetensorError):  # numbers of a kind that torch does not have
        return CheckpointError(
            f"the weights in {folder} cannot be read ({first_line(error)}); use another copy of the adapter."
        )
    if isinstance(error, KeyError):  # PEFT's, of a module that was trained in full
        return CheckpointError(f"the saved adapter lacks the tensor {first_line(error)!r}; use another copy of it.")
    return error


def _unwrap_unused(model: nn.Module) -> None:
    """Take away what PEFT puts around modules that are trained besides, where no adapter uses it any more."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper) and not any(
            len(attrgetter(trained)(module)) for trained in module.adapter_layer_names
        ):
            model.set_submodule(name, module.original_module)


def _tell_of_unread_method(folder: str) -> None:
    """Say what is wrong with the configuration of an adapter if its weights, or it, name one of our methods."""
    weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    kinds = [kind.method for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values() if issubclass(kind, AdapterConfig)]
    config = os.path.join(folder, CONFIG_NAME)
    text = b""
    if os.path.isfile(config):
        with open(config, "rb") as opened:
            text = opened.read(1 << 20)
    try:
        names = list(read_shapes(weights))
    except CheckpointError:
        names = []
    if any(f".{kind}_" in name for name in names for kind in kinds) or any(
        f'"{kind.upper()}"'.encode() in text for kind in kinds
    ):
        check_known(folder)


def _fill_in(model: nn.Module, adapter: str, read: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Take from an adapter's file what its layers had no place for when transformers loaded it: training's averages."""
    layers = adapter_layers(model, adapter)
    present = {role for layer in layers.values() for role, row in layer.buffer_roles.items() if row.saved == "present"}
    if not present:
        return
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read().items():
        name, _, tensor_name = key.removeprefix("base_model.model.").rpartition(".")
        saved.setdefault(name, {})[tensor_name] = tensor
    for name, layer in layers.items():
        tensors = saved.get(name, {})
        layer.check(adapter, tensors)
        device = layer.parameter("up", adapter).device
        for role in present:
            value = tensors.get(f"{layer.method_name}_{role}")
            if value is not None and layer.running(role, adapter) is None:
                layer.set_running(role, adapter, value.to(device))


def _parts(config: Any) -> list[Part]:
    """What an adapter has besides its method: rates first, which read their measurements, as `retain` runs layers."""
    parts: list[Part] = [MatchedRates()] if config.own_rates else []
    if config.retain is not None:
        parts.append(Retain(replays=config.retain_mode == "replay"))
    return parts


after_failed_load(_withdraw)
after_load_by_transformers(_fill_in)
after_unread_method(_tell_of_unread_method)
name_base_weights(name_in_base_model)


def _with_adapter_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]
) -> tuple[Any, dict[str, Any]]:
    """A pre-forward hook that tells a layer the adapter of every row."""
    return args, {**kwargs, "adapter_names": names}
