"""Which modules of a model an adapter is for: how `target_modules` is resolved, by injection and by checks."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from dynalora.adapter.attention import PROJECTIONS, AdaptedAttention, AttentionMatrix, is_attention
from dynalora.adapter.base_weight import BaseWeight
from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.experts import (
    AdaptedExperts,
    ExpertList,
    ExpertMatrix,
    fused_experts,
    fused_parameters,
    halves,
    layer_names,
    meant_parameters,
)
from dynalora.adapter.parts import Parted
from dynalora.adapter.saved import HEADS
from dynalora.common.devices import offloaded_weights
from dynalora.common.private import resolve_all_linear
from dynalora.errors import ConfigError, UnsupportedError

#: What the layers of an expert are called where they are linear layers.
_EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

#: More names than these are not compared with a module's name one by one.
_MANY = 64
#: Of a longer list, the names that mean no module are left out: PEFT compares its entries with one another.
_MOST = 1000
#: Fields that hold names, or a regular expression.
_NAMING = ("target_modules", "exclude_modules")

Check = Callable[[nn.Module, str], None]
_P = TypeVar("_P", bound=Parted)


class NothingToAdaptError(ConfigError, NoMatchingPeftModuleError):
    """A configuration's targets match no module of the model."""


def check_trained_besides(model: nn.Module, config: Any) -> None:
    """Refuse modules and tokens to train besides the adapter that cannot be.

    Args:
        model: The base model, which may have other adapters.
        config: The adapter's configuration.

    Raises:
        ConfigError: A module in `modules_to_save` has an adapter, or `trainable_token_indices` names a module that is
            no embedding or a token that it does not have.
    """
    kind = type(config).__name__
    modules = dict(model.named_modules())
    for name in config.modules_to_save or ():
        adapted = next((key for key, each in modules.items() if key.endswith(name) and _is_layer(each)), None)
        if adapted is not None:
            raise ConfigError(
                f"{kind}: modules_to_save has {name!r}, but {adapted!r} has an adapter; train it in one way only."
            )
    tokens = config.trainable_token_indices or {}
    by_name = tokens.items() if isinstance(tokens, dict) else [("", tokens)]
    for name, ids in by_name:
        for key, module in modules.items() if name else [("the input embeddings", _input_embeddings(model))]:
            if name and not key.endswith(name):
                continue
            while isinstance(module, AuxiliaryTrainingWrapper):
                module = module.original_module
            if _is_layer(module) or not isinstance(module, (nn.Embedding, nn.Linear)):
                raise ConfigError(
                    f"{kind}: trainable_token_indices needs an embedding without an adapter, and {key!r} is a "
                    f"{type(module).__name__}; name another module, or leave it out of target_modules."
                )
            count = module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features
            if ids and max(ids) >= count:
                raise ConfigError(
                    f"{kind}: trainable_token_indices has {max(ids)}, but {key!r} has {count} tokens, from 0; resize "
                    "the model's vocabulary first (model.resize_token_embeddings)."
                )


def _is_layer(module: nn.Module | None) -> bool:
    return isinstance(module, BaseTunerLayer)


def _input_embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return next((each for key, each in model.named_modules() if key.endswith("embed_tokens")), None)


def wants_all_linear(config: Any) -> bool:
    """Whether a configuration says `target_modules="all-linear"`."""
    return str(getattr(config, "target_modules", None)).lower() == "all-linear"


def leave_out_head(config: Any) -> None:
    """Keep `all-linear` from the head of token classification and question answering, of PEFT's methods as of ours."""
    # PEFT would train them in full, but only after `all-linear` has taken them for layers to adapt.
    heads = HEADS.get(config.task_type, ()) if wants_all_linear(config) and hasattr(config, "exclude_modules") else ()
    if heads and not isinstance(config.exclude_modules, str):
        config.exclude_modules = sorted({*(config.exclude_modules or ()), *heads})


def targeted_modules(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names of the modules that an adapter would wrap, resolved as PEFT does when it is made.

    Args:
        model: The base model; one on the meta device will do.
        config: The adapter's configuration with target modules, of any of PEFT's methods; not changed.
    """
    config = copy.copy(config)
    leave_out_head(config)
    all_linear = wants_all_linear(config)
    config = resolve_all_linear(config, model)
    names = [name for name, _ in model.named_modules() if name and exists(config, name)]
    if not isinstance(config, AdapterConfig):
        return names
    for name, fused in fused_experts(model).items():
        meant = fused if all_linear else meant_parameters(fused, partial(_matches, config, name))
        names += [f"{name}.{key}" for key in meant]
    return names


def exists(config: Any, name: str) -> Any:
    """Whether a module is meant, and if not why, as PEFT's `check_target_module_exists` has it, whatever is listed.

    PEFT compares a name with every entry of a list. An entry means a name that it is, or that it is the end of behind
    a dot: so of long lists only such ends are looked up.

    Args:
        config: The adapter's configuration, of any of PEFT's methods.
        name: The module's name.
    """
    long = {
        field: value
        for field in _NAMING
        if isinstance(value := getattr(config, field, None), (set, list, tuple)) and len(value) > _MANY
    }
    if long:
        config = copy.copy(config)
    for field, value in long.items():
        setattr(config, field, {end for end in _ends(name) if end in value})
    return check_target_module_exists(config, name)


def _ends(name: str) -> list[str]:
    """A name, and what follows each of its dots."""
    parts = name.split(".")
    return [".".join(parts[index:]) for index in range(len(parts))]


def _leave_out_unknown(model: nn.Module, config: Any) -> None:
    """Take the names that mean no module of a model out of lists that are longer than any list of its modules.

    Of a list in which there is no other, a few are left, for PEFT to say so.
    """
    long = [
        field for field in _NAMING if not isinstance(value := getattr(config, field), str) and len(value or ()) > _MOST
    ]
    if not long:
        return
    names = set(names_to_target(model))
    for name, module in model.named_modules():
        if is_attention(module):
            names.update(f"{name}.{each}" for each in ("out_proj", *(f"projections.{side}" for side in PROJECTIONS)))
    for name, keys in fused_experts(model).items():
        names.update(f"{name}.{key}.{at}" for key in keys for at in range(len(getattr(_unparted(model, name), key))))
    names |= {name.replace(".base_layer", "") for name in names}
    known = {end for name in names for end in _ends(name)}
    for field in long:
        value = getattr(config, field)
        setattr(config, field, {each for each in value if each in known} or set(sorted(value)[:3]))


def settle_targets(model: nn.Module, config: Any, check: Check) -> None:
    """Replace `all-linear` by the layers that it means, and check what is named, before any layer is replaced.

    PEFT's `all-linear` knows adapted layers by a "Linear" in the name of their class, takes what no method of ours can
    adapt, and finds out in the middle of replacing layers. Here it takes adapted layers for what they are, and leaves
    out, with a warning, what would be refused if it were named.

    Args:
        model: The model, in which other adapters may be.
        config: The configuration of the adapter to come; its `target_modules` is set where it was `all-linear`.
        check: Raises where a module, given with its name, cannot be adapted with these settings.

    Raises:
        UnsupportedError: A module that is named cannot be adapted, or one that is meant is spread over processes.
        ConfigError: A module that is named cannot be adapted with these settings.
    """
    _leave_out_unknown(model, config)
    experts = meant_experts(model, config, check)
    attention = meant_attention(model, config, check)
    uncalled = uncalled_layers(model)

    def checked(name: str, module: nn.Module) -> None:
        if name in uncalled:
            raise UnsupportedError(
                f"module {name!r} is never called by {uncalled[name]}, which reads its weight, so an adapter would "
                "have no effect; leave it out with exclude_modules."
            )
        check(_base(module), name)

    if not wants_all_linear(config):
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for name, module in model.named_modules():
            if name and not name.startswith(inside) and is_target(model, config, name):
                BaseWeight.check_whole(_base(module), name)
                checked(name, module)
        _place(model, experts, attention)
        return
    modules = dict(model.named_modules())
    resolved: Any = resolve_all_linear(config, model)
    apart = tuple(f"{name}." for name, module in modules.items() if is_attention(module))
    names = {name for name in {*(resolved.target_modules or ()), *_adapted(model)} if not name.startswith(apart)}
    refused: dict[str, Exception] = {}
    for name in sorted(names):
        config.target_modules = {name}
        if not exists(config, name):
            continue  # excluded
        BaseWeight.check_whole(_base(modules[name]), name)
        try:
            checked(name, modules[name])
        except (UnsupportedError, ConfigError) as error:
            refused[name] = error
    parameters = {f"{name}.{key}" for name, keys in experts.items() for key in keys}
    config.target_modules = {*(names - refused.keys()), *parameters, *attention}
    if refused:
        some = ", ".join(map(repr, [*refused][:3])) + (", …" if len(refused) > 3 else "")
        warnings.warn(
            f"target_modules='all-linear' leaves out {len(refused)} of {len(names)} linear layers ({some}): "
            f"{next(iter(refused.values()))}",
            stacklevel=2,
        )
    _place(model, experts, attention)


def _base(module: nn.Module) -> nn.Module:
    """The layer below whatever adapts it."""
    base: nn.Module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base


def _adapted(model: nn.Module) -> set[str]:
    """Names of the adapted layers but for the output layer, which `all-linear` does not mean."""
    outputs: Any = getattr(model, "get_output_embeddings", None)
    output = None if outputs is None else outputs()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseWeight)
        and module.layer_kind is None
        and module is not output
        and not isinstance(_submodule(model, name.rpartition(".")[0]), ExpertList)
    }


def meant_experts(model: nn.Module, config: Any, check: Check) -> dict[str, list[str]]:
    """The fused parameters of experts that are meant, checked, by the name of their module.

    Where experts are meant that cannot be adapted, a warning says so, since only their neighbours would train.

    Args:
        model: The model.
        config: The configuration of the adapter to come; with `all-linear` it means all experts.
        check: As in `settle_targets`.
    """
    adaptable = fused_experts(model)
    wanted: dict[str, list[str]] = {}
    for name, fused in adaptable.items():
        matches = partial(_matches, config, name)
        wanted[name] = list(fused) if wants_all_linear(config) else meant_parameters(fused, matches)
        wanted[name] = [key for key in wanted[name] if _exclusion(config, name, f"{name}.{key}") is None]
        _check_whole_lists(config, model, name, wanted[name])
        if alone := halves(fused, matches):
            _warn(f"of the experts in {name!r}, {', '.join(alone)} cannot be adapted without the other half of "
                  "gate_up_proj, which holds both; name both, or gate_up_proj")  # fmt: skip
            break
    for name, module in model.named_modules():
        fused = [key for key, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
        known = name.removesuffix(".base_layer") in adaptable
        if fused and not known and "expert" in type(module).__name__.lower():
            meant = [key for key in (*fused, *_EXPERT_LAYERS) if _matches(config, name, key)]
            if meant or wants_all_linear(config):
                _warn(f"the experts in {name!r} and its like are not adapted: a {type(module).__name__} holds them in "
                      f"the parameters {', '.join(fused)}, in a form that is not known; only the other layers that "
                      "match train")  # fmt: skip
                break
    for name, parameters in wanted.items():
        for key in tuple(parameters):
            expert = ExpertMatrix(_unparted(model, name), key, 0)
            BaseWeight.check_whole(expert, f"{name}.{key}")
            try:
                check(expert, f"{name}.{key}.0")
            except (UnsupportedError, ConfigError) as error:
                if not wants_all_linear(config):
                    raise
                parameters.remove(key)
                _warn(f"target_modules='all-linear' leaves out {name}.{key}: {error}")
    return {name: parameters for name, parameters in wanted.items() if parameters}


def _check_whole_lists(config: Any, model: nn.Module, name: str, parameters: list[str]) -> None:
    """Refuse to leave out some of the experts of a parameter: a file of the adapter is told by all of them."""
    if not config.exclude_modules:
        return
    experts = _unparted(model, name)
    for key in parameters:
        for index in range(len(getattr(experts, key))):
            if _exclusion(config, f"{name}.{key}.{index}") is not None:
                raise ConfigError(
                    f"{type(config).__name__}: exclude_modules leaves out the single expert '{name}.{key}.{index}', "
                    f"and the experts of a parameter are adapted together; leave out all, with {key!r}, or give some "
                    "a small rank with rank_pattern."
                )


def count_of_experts(model: nn.Module) -> int:
    """How many matrices of experts lie in parameters of a model."""
    fused = fused_experts(model)
    return sum(len(getattr(_unparted(model, name), key)) for name, keys in fused.items() for key in keys)


def meant_attention(model: nn.Module, config: Any, check: Check) -> list[str]:
    """The modules of `nn.MultiheadAttention` of which projections are meant, checked.

    Args:
        model: The model.
        config: The configuration of the adapter to come; with `all-linear` it means all of them.
        check: As in `settle_targets`.
    """
    meant = []
    for name, module in model.named_modules():
        if not name or name.endswith(".base_layer") or not is_attention(module):
            continue
        projections = _meant_projections(config, name)
        if not projections:
            continue
        try:
            _check_attention(config, name, _unparted(model, name), projections, check)
            meant.append(name)
        except (UnsupportedError, ConfigError) as error:
            if not wants_all_linear(config):
                raise
            _warn(f"target_modules='all-linear' leaves out {name}: {error}")
    return meant


def _check_attention(config: Any, name: str, attention: nn.Module, projections: tuple[str, ...], check: Check) -> None:
    """Refuse an attention some projections of which cannot be adapted."""
    matrices = {f"{name}.projections.{each}": AttentionMatrix(attention, each) for each in projections}
    for place, matrix in matrices.items():
        BaseWeight.check_whole(matrix, place)
    if offloaded_weights(attention):
        raise UnsupportedError(
            f"module {name!r} is an nn.MultiheadAttention whose weights are offloaded, where they cannot be read; load "
            "the base model without offloading, or leave it out with exclude_modules."
        )
    for place, matrix in matrices.items():
        check(matrix, place)


def _meant_projections(config: Any, name: str) -> tuple[str, ...]:
    """The projections of an attention that are meant: all by the module's name, that of the output by its own."""
    meant: tuple[str, ...]
    if wants_all_linear(config):
        meant = () if _exclusion(config, name) is not None else PROJECTIONS
    elif exists(config, name):
        meant = PROJECTIONS
    else:
        meant = ("out",) if _matches(config, name, "out_proj") else ()
    return tuple(each for each in meant if _exclusion(config, *_names_of_projection(name, each)) is None)


def targets_naming(model: nn.Module, layers: Iterable[str]) -> tuple[set[str] | str, set[str] | None]:
    """`target_modules` and `exclude_modules` that mean some adapted layers and no others.

    Args:
        model: The model, in which the layers are adapted.
        layers: Their names.
    """
    targets: set[str] = set()
    left_out: set[str] = set()
    layers = set(layers)
    for name in layers:
        owner, _, last = name.rpartition(".")
        parted = _submodule(model, owner.rpartition(".")[0])
        if isinstance(parted, AdaptedAttention) and last in PROJECTIONS:
            targets.add(owner.rpartition(".")[0])
            left_out |= {f"{owner}.{each}" for each in PROJECTIONS} - layers
        else:
            targets.add(owner if isinstance(parted, AdaptedExperts) and last.isdigit() else name)
    ends = tuple(f".{name}" for name in targets)
    if any(name.endswith(ends) for name, _ in model.named_modules() if name not in targets):
        return "|".join(map(re.escape, sorted(targets))), left_out or None
    return targets, left_out or None


def _names_of_projection(attention: str, projection: str) -> list[str]:
    """What a projection is called: as a layer, and that of the output as torch has it."""
    named = [f"{attention}.projections.{projection}"]
    return [*named, f"{attention}.out_proj"] if projection == "out" else named


def _place(model: nn.Module, experts: dict[str, list[str]], attention: list[str]) -> None:
    """Put layers in the place of matrices that lie in parameters, for adapters to wrap."""
    for name, parameters in experts.items():
        adapted = _stand_around(model, name, AdaptedExperts)
        for key in parameters:
            adapted.adapt(key)
    for name in attention:
        _stand_around(model, name, AdaptedAttention)


def _stand_around(model: nn.Module, name: str, kind: type[_P]) -> _P:
    """What stands around a module, put there if need be."""
    module = model.get_submodule(name)
    if not isinstance(module, kind):
        module = kind(module)
        model.set_submodule(name, module)
    return module


def _unparted(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.base_layer if isinstance(module, Parted) else module


def is_target(model: nn.Module, config: Any, name: str) -> Any:
    """Whether a module is meant, as PEFT's `check_target_module_exists` has it; experts are by their parameter.

    An attention is not adapted as a whole, but the layers that stand for its projections are. What is left out with
    `exclude_modules` is told in PEFT's words, for it warns where nothing was left out.
    """
    owner, _, last = name.rpartition(".")
    lists, _, parameter = owner.rpartition(".")
    parted, module = _submodule(model, lists), _submodule(model, name)
    if isinstance(parted, AdaptedAttention) and parameter == "projections":
        return last in _meant_projections(config, lists) or _exclusion(config, *_names_of_projection(lists, last))
    if last.isdigit() and isinstance(parted, AdaptedExperts):
        meant = meant_parameters([parameter], partial(_matches, config, lists))
        return bool(meant) and parameter in parted.lists()
    if is_attention(module) or (owner and is_attention(_submodule(model, owner))):
        return _exclusion(config, name)
    if isinstance(module, ExpertList):
        return False
    owner = name.removesuffix(".base_layer")
    fused = fused_parameters(module)
    return exists(config, name) or _exclusion(config, name, *(f"{owner}.{key}" for key in fused))


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _matches(config: Any, owner: str, name: str) -> bool:
    return bool(exists(config, f"{owner}.{name}"))


def _exclusion(config: Any, *names: str) -> Any:
    """What PEFT says of a module that is left out, if one of these names is; None if none is. It counts as False."""
    named = copy.copy(config)
    named.layers_to_transform = None
    for name in names:
        named.target_modules = {name}
        if not (answer := exists(named, name)):
            return answer
    return None


def _warn(message: str) -> None:
    warnings.warn(f"{message}.", stacklevel=2)


def uncalled_layers(model: nn.Module) -> dict[str, str]:
    """Layers whose owner reads their weight and does not call them, with the owner's class, by name.

    An adapter on such a layer would train nothing, in silence: Mamba's kernels, which take the weights of the
    convolution and of the projections after it, and WavLM's attention.
    """
    uncalled: dict[str, str] = {}
    for name, owner in model.named_modules():
        parts: tuple[str, ...] = ()
        if hasattr(owner, "A_log") and hasattr(owner, "conv1d"):
            # Jamba normalises between them and calls the others.
            parts = ("dt_proj",) if hasattr(owner, "dt_layernorm") else ("x_proj", "dt_proj", "out_proj")
            parts = parts if hasattr(owner, "D") else ()  # gated delta nets have no D, and call theirs
            parts += ("conv1d",)  # not called by kernels, nor in generation
        elif hasattr(owner, "torch_multi_head_self_attention"):
            parts = ("q_proj", "k_proj", "v_proj", "out_proj")
        prefix = f"{name}." if name else ""
        uncalled |= {f"{prefix}{part}": type(owner).__name__ for part in parts if hasattr(owner, part)}
    return uncalled


def names_to_target(model: nn.Module) -> list[str]:
    """Every name in a model that target modules may mean: of its modules, and of what experts hold in parameters."""
    inside = [f"{name}.{key}" for name, fused in fused_experts(model).items() for key in layer_names(fused)]
    return [*(name for name, _ in model.named_modules() if name), *inside]


def describe_linear_layers(model: nn.Module) -> str:
    """A sentence that names the linear layers of a model, for messages."""
    kinds: dict[str, int] = {}
    for name, module in model.named_modules():
        adapted = isinstance(module, BaseWeight) and module.layer_kind is None
        linear = adapted or BaseWeight.multiplies(module) or is_attention(module)
        if name and not name.endswith(".base_layer") and linear:
            kind = name.rpartition(".")[2]
            kinds[kind] = kinds.get(kind, 0) + 1
    if not kinds:
        return "This model has no linear layers."
    named = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])[:20])
    hint = "target_modules='all-linear' takes all but the output layer"
    return f"The linear layers of this model are named: {named}; {hint}."
