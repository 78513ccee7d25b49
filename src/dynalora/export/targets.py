"""What PEFT's LoRA knows as one target: a layer, or all experts of a fused parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dynalora.adapter.attention import PROJECTIONS
from dynalora.adapter.experts import FUSED, layer_names
from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.ranks import fit
from dynalora.common.names import plain_name
from dynalora.errors import UnsupportedError

#: up (out, r), down (r, in) and the scaling.
Factors = tuple[torch.Tensor, torch.Tensor, float]
_EXPERT = re.compile(r"(.*\bexperts)\.(\w+)\.(\d+)")
_ATTENTION = re.compile(rf"(.*)\.projections\.({'|'.join(PROJECTIONS)})")


@dataclass(frozen=True)
class Target:
    """A target of a plain LoRA.

    Attributes:
        rank: Its rank; of experts, each one's.
        scaling: The factor in front of its update.
        tensors: What is written of it, by PEFT's name behind that of the model.
        parameter: Whether it is a parameter (`target_parameters`), not a module.
    """

    rank: int
    scaling: float
    tensors: dict[str, torch.Tensor]
    parameter: bool = False


def targets_of(
    layers: Mapping[str, AdapterLayer], factors: Mapping[str, Factors], mixture: bool = False
) -> dict[str, Target]:
    """Put factors into PEFT's form, exactly.

    Beside experts, PEFT takes layers that are called what parts of fused parameters are for these parts, whose rank and
    place it then changes; named as parameters (`target_parameters`), they stay what they are.

    Experts of a fused parameter have one rank and one scaling there: the largest rank, with zeros behind the others'
    components, and the first one's scaling, by which the others' `up` is multiplied.

    Args:
        layers: The adapted layers.
        factors: The factors of each by its plain name.
        mixture: Whether the model has experts in fused parameters, adapted or not.

    Raises:
        UnsupportedError: A layer's update has no such form.
    """
    targets: dict[str, Target] = {}
    experts: dict[str, dict[str, dict[int, Factors]]] = {}
    mixture = mixture or any(_EXPERT.fullmatch(name) for name in factors)
    taken = set(layer_names(list(FUSED))) if mixture else set()
    for name, layer in layers.items():
        key = plain_name(name)
        up, down, scaling = factors[key]
        if match := _EXPERT.fullmatch(key):
            owner, fused, index = match.groups()
            experts.setdefault(owner, {}).setdefault(fused, {})[int(index)] = factors[key]
        elif match := _ATTENTION.fullmatch(key):
            raise UnsupportedError(
                f"cannot export {match[1]!r} as a plain LoRA: of an nn.MultiheadAttention, PEFT's LoRA adapts all "
                "projections at once and adds the update of the output's twice, so it computes something else; keep "
                "the adapter, or merge it with merge_and_unload()."
            )
        elif layer.layer_kind is not None:
            tensors = layer.layer_kind.plain(key, down, up)
            targets[key] = Target(len(down), scaling, {f"{key}.{end}": part for end, part in tensors.items()})
        else:
            by_weight = key.rpartition(".")[2] in taken
            tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            targets[f"{key}.weight" if by_weight else key] = Target(len(down), scaling, tensors, by_weight)
    for owner, parameters in experts.items():
        for parameter, each in parameters.items():
            place = wrapper(owner, parameter, list(parameters))
            targets[f"{owner}.{parameter}"] = _fused(place, [each[index] for index in range(len(each))])
    return targets


def wrapper(owner: str, parameter: str, adapted: list[str]) -> str:
    """What PEFT's wrapper of a parameter is called: each stands around those of the parameters before it.

    Args:
        owner: The name of the module of experts.
        parameter: The parameter.
        adapted: All parameters of the module that are adapted.

    Raises:
        UnsupportedError: It is not known which parameter is the first.
    """
    if len(adapted) > 1 and (unknown := sorted(set(adapted) - set(FUSED))):
        raise UnsupportedError(
            f"cannot export the experts in {owner!r} as a plain LoRA: in which order PEFT wraps {', '.join(unknown)} "
            "is not known; keep the adapter, or merge it with merge_and_unload()."
        )
    order = [name for name in FUSED if name in adapted] or adapted
    return owner + ".base_layer" * (len(order) - 1 - order.index(parameter))


def _fused(place: str, experts: list[Factors]) -> Target:
    """All experts' factors in PEFT's order: A (experts · r, in) expert by expert, B (out, r · experts) rank by rank."""
    rank, scaling = max(len(down) for _, down, _ in experts), experts[0][2]
    downs = [fit(down, 0, rank) for _, down, _ in experts]
    ups = [fit(up if s == scaling else up * (s / scaling), 1, rank) for up, _, s in experts]
    tensors = {
        f"{place}.lora_A.weight": torch.cat(downs).contiguous(),
        f"{place}.lora_B.weight": torch.stack(ups, dim=-1).flatten(1).contiguous(),
    }
    return Target(rank, scaling, tensors, parameter=True)


def factors_in(
    state: Mapping[str, torch.Tensor], layers: Mapping[str, AdapterLayer], rank_of: Mapping[str, int]
) -> dict[str, tuple[str, torch.Tensor, torch.Tensor]]:
    """Every layer's factors in the tensors of a plain LoRA: the target that it belongs to, up (out, r), down (r, in).

    Args:
        state: The tensors by PEFT's name behind that of the model.
        layers: The adapted layers, by their names.
        rank_of: The rank of each target.
    """
    found = {}
    parameters: dict[str, list[str]] = {}
    for name in layers:
        if match := _EXPERT.fullmatch(plain_name(name)):
            adapted = parameters.setdefault(match[1], [])
            if match[2] not in adapted:
                adapted.append(match[2])
    for name in layers:
        key = plain_name(name)
        if match := _EXPERT.fullmatch(key):
            owner, parameter, index = match.groups()
            place, target = wrapper(owner, parameter, parameters[owner]), f"{owner}.{parameter}"
            down, up = (state[f"{place}.lora_{factor}.weight"] for factor in "AB")
            down = down.unflatten(0, (-1, rank_of[target]))[int(index)]
            up = up.unflatten(1, (rank_of[target], -1))[..., int(index)]
        elif f"{key}.lora_embedding_A" in state:
            target, down, up = key, state[f"{key}.lora_embedding_A"], state[f"{key}.lora_embedding_B"]
        else:
            target = key if key in rank_of else f"{key}.weight"
            down, up = (state[f"{key}.lora_{factor}.weight"].flatten(1) for factor in "AB")
        found[name] = target, up, down
    return found
