"""Parameter budgets: how many parameters a configuration trains, and which rank trains as many as another method does.

A count needs no weights. The configuration is put on a copy of the model on the meta device, so nothing is computed,
no singular value decomposition least of all, and any method counts that PEFT knows.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dynalora.adapter.config import AdapterConfig
from dynalora.common.names import plain_name
from dynalora.errors import ConfigError

Make = Callable[[int, dict[str, int] | None], PeftConfig]
"""A configuration for a rank, and for ranks that differ from it, by module name as PEFT's `rank_pattern`."""

_LARGEST = 2**20
"""No rank beyond this is looked at."""


@dataclass(frozen=True)
class Matched:
    """A configuration whose number of trained parameters is as near to a target as it can be.

    Attributes:
        config: The configuration.
        r: Its rank; of mixed ranks the lower one.
        mixed: Whether some modules have rank r + 1.
        parameters: Number of parameters it trains.
        difference: (parameters − target) / target.
        within: Whether that is within the tolerance.
    """

    config: PeftConfig
    r: int
    mixed: bool
    parameters: int
    difference: float
    within: bool


def trainable_parameters(model: nn.Module, config: PeftConfig | None) -> int:
    """Number of parameters that a configuration trains on a model, when training begins; where ranks grow, at the end.

    Args:
        model: The base model, without adapters; one on the meta device will do. It is left as it was.
        config: The adapter's configuration, left as it was too; None: full fine-tuning, all parameters.

    Returns:
        The number, as `get_nb_trainable_parameters` of the adapted model gives it. Methods that learn ranks begin with
        more than they end with: AdaLoRA with `init_r`, 1.5 times the rank by default.
    """
    if config is None:
        return sum(parameter.numel() for parameter in model.parameters())
    return _count(on_meta(model, config))


def match_parameters(make: Make, model: nn.Module, target: int, tolerance: float = 0.02) -> Matched:
    """The rank at which a method trains as many parameters as wanted.

    The whole rank whose count is nearest is taken. Where that is not within the tolerance and the configuration has a
    `rank_pattern`, two neighbouring ranks are mixed, the higher one spread evenly over the depth and over the kinds of
    modules; `alpha_pattern` then keeps the scaling that a module has at its rank.

    Args:
        make: Makes the method's configuration from a rank, which it may use for any size: for P-Tuning, whose rank is
            the number of virtual tokens, the width of the encoder matches better.
        model: The base model, without adapters; one on the meta device will do. It is left as it was.
        target: Number of trained parameters.
        tolerance: Part of the target by which the count may differ.

    Returns:
        The nearest match; `within` is False where the method cannot train as many, or as few.

    Raises:
        ConfigError: Target below 1, tolerance below 0, or the method's settings are wrong at every rank.
    """
    if target < 1:
        raise ConfigError(f"target is {target}; give a number of parameters, at least 1.")
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise ConfigError(f"tolerance is {tolerance}; give a part of the target, at least 0.")
    skeleton = _skeleton(model)
    counts: dict[int, int | None] = {}
    reasons: list[Exception] = []

    def count(r: int) -> int | None:
        """Parameters at a rank; None if there can be no such rank."""
        if r not in counts:
            try:
                counts[r] = _count(on_meta(skeleton, make(r, None)))
            except (ValueError, ConfigError) as error:
                reasons.append(error)
                counts[r] = None
        return counts[r]

    r = _nearest(count, target)
    if r is None:
        raise ConfigError(f"No rank can be matched: {reasons[0]}") from reasons[0]
    config, mixed, parameters = make(r, None), False, counts[r]
    assert parameters is not None
    if abs(parameters - target) > tolerance * target and hasattr(config, "rank_pattern"):
        low = r if parameters < target else r - 1
        if count(low) is not None and count(low + 1) is not None:
            trial = _mixed(make, skeleton, low, target)
            number = _count(on_meta(skeleton, trial))
            # Some have the field for what training has come to, and do not begin with it.
            if abs(number - target) < abs(parameters - target):
                r, config, mixed, parameters = low, trial, True, number
    difference = (parameters - target) / target
    return Matched(config, r, mixed, parameters, difference, abs(difference) <= tolerance)


def _nearest(count: Callable[[int], int | None], target: int) -> int | None:
    """The rank whose count is nearest to the target, for counts that rise or fall with the rank (nearly)."""
    counts: dict[int, int] = {}

    def at(r: int) -> int | None:
        number = count(r)
        if number is not None:
            counts[r] = number
        return number

    first = next((r for r in (1, 2, 4, 8) if at(r) is not None), None)
    if first is None:
        return None
    beyond = next((r for r in (first + 1, 2 * first, 4 * first) if at(r) not in (None, counts[first])), None)
    if beyond is not None:
        falls = counts[beyond] < counts[first]

        def short(r: int) -> bool:
            """Whether the rank to be found is larger."""
            number = at(r)
            return number is not None and (number > target if falls else number < target)

        low, high = first, first + 1
        if not falls:
            # Nearly every count that rises is a straight line; where it is, this is the end of the search already.
            slope = (counts[beyond] - counts[first]) / (beyond - first)
            guess = min(_LARGEST, first + max(0, int((target - counts[first]) / slope)))
            if short(guess):
                low, high = guess, guess + 1
            else:
                low, high = max(first, guess - 1), guess
        while high < _LARGEST and short(high) and not (falls and counts[high] > counts[low]):
            low, high = high, 2 * high
        if not short(low):
            low = first
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if short(middle) else (low, middle)
        at(low)
        at(high)

    def off(r: int) -> int:
        return abs(counts[r] - target)

    best = min(counts, key=lambda r: (off(r), r))
    # Counts that fall do so by steps, and rise a little in between.
    while better := [r for r in (best - 1, best + 1) if r >= 1 and at(r) is not None and off(r) < off(best)]:
        best = min(better, key=off)
    return best


def _mixed(make: Make, model: nn.Module, low: int, target: int) -> PeftConfig:
    """A configuration with rank low + 1 in some modules and low in the others, as near to the target as that can be."""
    lower, upper = (on_meta(model, make(r, None)) for r in (low, low + 1))
    more = {name: number - _by_module(lower)[name] for name, number in _by_module(upper).items()}
    modules = _spread(more, target - _count(lower))
    # PEFT reads the keys as regular expressions for the end of a module's name.
    keys = [f"^{re.escape(name)}" for name in more if name in modules]
    config = make(low, dict.fromkeys(keys, low + 1))
    lower_alpha, upper_alpha = (_alpha(make(r, None)) for r in (low, low + 1))
    if lower_alpha != upper_alpha and hasattr(config, "alpha_pattern"):
        config.alpha_pattern = {**dict.fromkeys(keys, upper_alpha), **(config.alpha_pattern or {})}
    return config


def _spread(more: Mapping[str, int], missing: int) -> set[str]:
    """Modules that together have about as many parameters more as are missing; `more` is in the model's order."""
    share = min(1.0, max(0.0, missing / max(1, sum(more.values()))))
    modules: set[str] = set()
    kinds: dict[str, list[str]] = {}
    for name in more:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    for number, names in enumerate(kinds.values()):
        # Every so many of a kind; kinds begin at different depths, so that no layer gets all of it.
        offset = (0.5 + number * (math.sqrt(5) - 1) / 2) % 1
        for place, name in enumerate(names):
            if math.floor((place + 1) * share + offset) > math.floor(place * share + offset):
                modules.add(name)

    def off(changed: str | None = None) -> int:
        return abs(missing - sum(more[name] for name in modules ^ ({changed} if changed else set())))

    # Whole modules are rounded; single ones make up for it.
    while (best := min(more, key=off)) and off(best) < off():
        modules ^= {best}
    return modules


def _alpha(config: PeftConfig) -> Any:
    return getattr(config, "lora_alpha", getattr(config, "alpha", None))


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, ties kept; its weights are not copied."""
    memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def on_meta(model: nn.Module, config: PeftConfig) -> nn.Module:
    """A copy of a model on the meta device, which has no weights, with an adapter at the largest ranks it can have."""
    base: Any = _skeleton(model)
    fresh = copy.deepcopy(config.at_largest() if isinstance(config, AdapterConfig) else config)
    fresh.inference_mode = False
    if isinstance(fresh, peft.LoraConfig) and fresh.init_lora_weights == "corda":
        fresh.init_lora_weights = True  # of the same size, and needs no inputs
    # On the meta device no random number is drawn; the state is kept for methods that draw theirs on the CPU.
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return peft.get_peft_model(base, fresh)
        except (RuntimeError, NotImplementedError):  # a start that reads values
            base, fresh = _skeleton(model), copy.deepcopy(fresh)
            return peft.get_peft_model(base, fresh, low_cpu_mem_usage=True)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _by_module(model: nn.Module) -> dict[str, int]:
    """Trained parameters of every adapted module, by its name in the base model and in its order."""
    layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return {plain_name(name): _count(model.get_submodule(name)) for name in layers}
