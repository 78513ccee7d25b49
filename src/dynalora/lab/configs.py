"""Configurations of adapters by the method's name, dynalora's and PEFT's, and the modules that they adapt."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from dynalora.adapter.targets import leave_out_head, names_to_target, targeted_modules
from dynalora.common.names import did_you_mean
from dynalora.errors import ConfigError
from dynalora.lab.baselines import BASELINES, check_start, config_from_file, corda_config, prompt_only
from dynalora.lab.choices import MOST_RANK, is_config_file
from dynalora.lab.settings import coerce, names_or_pattern
from dynalora.methods import METHODS, config_class
from dynalora.methods import method_names as dynalora_methods

logger = logging.getLogger(__name__)


def method_names() -> list[str]:
    """Methods whose adapters can be trained: dynalora's, and PEFT's to compare with."""
    return [*dynalora_methods(), *(name for name, baseline in BASELINES.items() if baseline.config is not None)]


def compared_names() -> list[str]:
    """Methods that can be compared: those of `method_names`, and `full` fine-tuning."""
    return [*method_names(), *(name for name, baseline in BASELINES.items() if baseline.config is None)]


def method_name(config: PeftConfig) -> str:
    """The name of a configuration's method, in lower case."""
    return str(config.peft_type).rpartition(".")[2].lower()


def title_of(method: str) -> str:
    """A method's name as its paper writes it."""
    titles = {name: item.title for name, item in BASELINES.items()}
    titles |= {name: item.title for name, item in METHODS.items()}
    return titles.get(method) or method


def compared_config(
    method: str,
    *,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> PeftConfig | None:
    """As [`adapter_config`][dynalora.lab.configs.adapter_config], and None for full fine-tuning, which has no rank.

    Raises:
        ConfigError: As `adapter_config`; alpha, dropout or options are given for full fine-tuning.
    """
    name = method.lower()
    if not is_config_file(method) and name not in compared_names():
        raise _unknown(method, compared_names())
    baseline = BASELINES.get(name)
    if baseline is None or baseline.config is not None:
        return adapter_config(method, r=r, alpha=alpha, dropout=dropout, options=options, **more)
    baseline.fields(r, alpha, dropout)
    if options:
        raise ConfigError(f"Method '{method}' has no adapter and no option '{next(iter(options))}'; leave it out.")
    return None


def adapter_config(
    method: str,
    *,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: list[str] | str = "all-linear",
    options: Mapping[str, Any] | None = None,
    task_type: str = "CAUSAL_LM",
) -> PeftConfig:
    """The configuration of an adapter, by the method's name.

    Args:
        method: One of [`method_names`][dynalora.lab.configs.method_names], or a `.json` or `.yaml` file as
            PEFT's `adapter_config.json`, to which `r`, `alpha` and `dropout` do not apply.
        r: Rank; for `randlora` that of each random basis, of which there are the fewer the larger it is; for
            `p-tuning` the number of virtual tokens.
        alpha: The update is scaled by alpha / r; None: the method's default, for LoRA twice the rank.
        dropout: On the adapter's input.
        target_modules: Names, a regular expression, or `all-linear`; means nothing to `p-tuning`, and to a file that
            names its own.
        options: Further fields of the method's configuration.
        task_type: PEFT's name of what the model does.

    Raises:
        ConfigError: An unknown method, an unknown option (lists the valid ones), or a value that cannot be.
    """
    targets = names_or_pattern(target_modules)
    if is_config_file(method):
        config: PeftConfig = config_from_file(method, target_modules=targets, options=options, task_type=task_type)
        check_start(config)
        leave_out_head(config)
        return config
    name = method.lower()
    if name not in method_names():
        if name in BASELINES:
            raise ConfigError(
                f"Method '{method}' has no adapter and cannot be used here; choose one of {', '.join(method_names())}."
            )
        raise _unknown(method, method_names())
    if r < 1:
        raise ConfigError(f"The rank r is {r}; give a whole number of at least 1.")
    if r > MOST_RANK:
        raise ConfigError(f"r is {r}; give at most {MOST_RANK}, which is more than any layer is wide.")
    common: dict[str, Any] = {"task_type": task_type, "target_modules": targets}
    preset: dict[str, Any] = {}
    if name in BASELINES:
        baseline = BASELINES[name]
        kind: Any = baseline.config
        baseline_fields = baseline.fields(r, alpha, dropout)
        preset = {key: baseline_fields.pop(key) for key in {*baseline.options, *baseline.more(r)}}
        common |= baseline_fields
        if not baseline.adapts_modules:
            del common["target_modules"]
        valid = {item.name for item in fields(kind)} - {item.name for item in fields(PeftConfig)}
    else:
        kind = config_class(name)
        common |= {"r": r, "alpha": alpha, "dropout": dropout}
        valid = set(kind.own_fields())
    valid -= set(common)
    values = dict(options or {})
    for option in values:
        if option in common:
            own = option in ("r", "alpha", "dropout", "target_modules")
            place = f"give it as `{option}`" if own else "give it there"
            raise ConfigError(f"'{option}' is a setting of its own; {place} and not among the method's options.")
        if option not in valid:
            raise ConfigError(f"Method '{name}' has no option '{option}'; {did_you_mean(option, sorted(valid))}.")
    if values.get("init_lora_weights") == "corda":
        values["corda_config"] = corda_config(values.get("corda_config"))
    try:
        config = kind(**common, **{**preset, **_typed(kind, values, strictly=name in BASELINES)})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The settings of method '{name}' do not fit together: {error}") from error
    check_start(config)
    leave_out_head(config)
    return config


def _unknown(method: str, known: list[str]) -> ConfigError:
    return ConfigError(f"Unknown method '{method}'; {did_you_mean(method, known)}.")


def method_options(method: str) -> list[tuple[str, str, str]]:
    """The fields of a method's configuration that are no settings of their own: name, default and description.

    Args:
        method: One of [`method_names`][dynalora.lab.configs.method_names].
    """
    name = method.lower()
    baseline = BASELINES.get(name)
    kind: Any = config_class(name) if baseline is None else baseline.config
    if baseline is None:
        listed = set(kind.own_fields()) - {"r", "alpha", "dropout", "target_modules"}
    else:
        listed = {item.name for item in fields(kind)} - {item.name for item in fields(PeftConfig)}
        listed -= {"r", baseline.rank, baseline.alpha, baseline.dropout, "target_modules"}
    rows = []
    for item in fields(kind):
        if item.name not in listed or not item.init:
            continue
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        text = " ".join(str(item.metadata.get("help", "")).split())
        rows.append((item.name, "" if default is MISSING else str(default), text))
    return rows


def _typed(kind: type, options: Mapping[str, Any], *, strictly: bool) -> dict[str, Any]:
    """Numbers that came as text, as YAML 1.1 has it for `1e-4`, as the numbers the field wants.

    Args:
        kind: The configuration's class.
        options: Its fields.
        strictly: Refuse what is no truth value for a field of truth values, where the class itself takes anything.

    Raises:
        ConfigError: `strictly`, and a value is none.
    """
    try:
        hints = get_type_hints(kind)
    except NameError:  # a field annotated with a type that is imported for type checkers only
        return dict(options)

    def typed(name: str, value: Any) -> Any:
        if strictly and hints[name] is bool:
            return coerce(value, hints[name], name)
        try:
            return coerce(value, hints[name], name) if isinstance(value, str) else value
        except ConfigError:
            return value  # the configuration says itself what it wants

    return {name: typed(name, value) for name, value in options.items()}


def check_targets(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names of the modules that an adapter would wrap; none for methods that train virtual tokens instead.

    A model on the meta device will do.

    Raises:
        ConfigError: Nothing matches, or one of the listed names matches nothing; says which linear modules exist.
    """
    if prompt_only(config):
        return []
    linear = {name: module for name, module in model.named_modules() if isinstance(module, _LINEAR)}
    targets: Any = getattr(config, "target_modules", None)
    if targets is None:
        return list(linear)  # PEFT's own choice for the architecture
    kinds = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear)) or "none"
    exist = f"the model's linear modules are {kinds}"
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ConfigError(f"target_modules '{targets}' is not a valid regular expression ({error}).") from None
    else:
        everything = names_to_target(model)
        for target in sorted(targets):
            if not any(name == target or name.endswith(f".{target}") for name in everything):
                raise ConfigError(f"target_modules '{target}' matches nothing; {exist}.")
    matched = targeted_modules(model, config)
    if not matched:
        names = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        raise ConfigError(f"target_modules '{names}' matches nothing; {exist}.")
    return matched


def check_rank(model: nn.Module, config: PeftConfig, matched: Sequence[str]) -> None:
    """Refuse a rank that none of the adapted matrices can have; warn of one that some cannot have.

    Args:
        model: The model without the adapter; one on the meta device will do.
        config: The adapter's configuration.
        matched: Names of the adapted modules, as [`check_targets`][dynalora.lab.configs.check_targets] returns them.

    Raises:
        ConfigError: No matrix has so many rows and columns.
    """
    rank = next((value for name in _RANKS if isinstance(value := getattr(config, name, None), int)), 0)
    modules = dict(model.named_modules())
    shapes = {name: tuple(modules[name].weight.shape) for name in matched if isinstance(modules[name], _LINEAR)}
    small = [name for name, shape in shapes.items() if min(shape) < rank]
    if not small:
        return
    largest = max(shapes, key=lambda name: min(shapes[name]))
    if len(small) == len(shapes):
        rows, columns = shapes[largest]
        raise ConfigError(
            f"r is {rank}, but no update of the adapted matrices can have so high a rank: the largest, '{largest}', is "
            f"{rows} × {columns}; give at most {min(rows, columns)}."
        )
    if not getattr(config, "rank_pattern", None):
        logger.warning(
            "The rank %d is above what %d of the %d adapted matrices can have (such as '%s'): more parameters there "
            "bring nothing.", rank, len(small), len(shapes), small[0],
        )  # fmt: skip


_LINEAR = (nn.Linear, Conv1D)
_RANKS = ("target_r", "r")
"""Fields of configurations that hold the rank, those of the rank at the end first."""
