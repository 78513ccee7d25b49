"""How much every triple matters: Algorithm 1, and the moving averages that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import distributed

from dynalora.adapter.ranks import in_use
from dynalora.common import private
from dynalora.common.devices import in_turn
from dynalora.common.processes import grouped, process_count
from dynalora.driver import Moment
from dynalora.methods.pedyra.layer import ROLES, PedyraLayer
from dynalora.methods.pedyra.settings import PedyraConfig


def _gradient(layer: PedyraLayer, role: str, adapter: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient of a role's parameter as it stands; zero for a layer that took no part in this step."""
    gradient = parameter.grad
    return in_use(layer, role, adapter, torch.zeros_like(parameter) if gradient is None else gradient)


def update_averages(moment: Moment, layers: list[PedyraLayer], fresh: bool) -> None:
    """Eq. 3 for all layers at once, and the inputs' mean squares."""
    config, adapter = moment.config, moment.adapter

    def average(layer: PedyraLayer, role: str, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        mean = None if fresh else layer.running(role, adapter)
        if mean is None:
            dtype = torch.promote_types(layer.parameter("e", adapter).dtype, torch.float32)
            mean = torch.zeros(shape, dtype=dtype, device=device)
            layer.set_running(role, adapter, mean)
        return mean

    if config.uses_gradients:
        weights, gradients, sensitivity, uncertainty = [], [], [], []
        for layer in layers:
            parameters = layer.adapter_parameters(adapter)
            for role in ROLES:
                parameter = parameters[role]
                weight = in_use(layer, role, adapter, parameter.detach())
                weights.append(weight)
                gradients.append(_gradient(layer, role, adapter, parameter))
                sensitivity.append(average(layer, f"sensitivity_{role}", weight.shape, weight.device))
                uncertainty.append(average(layer, f"uncertainty_{role}", weight.shape, weight.device))
        every = list(zip(weights, gradients, sensitivity, uncertainty, strict=True))
        for part in in_turn(every, sum(weight.numel() for weight in weights), weights[0].device):
            _average_products(part, moment.grad_scale, config)
    if config.uses_inputs:
        means = [
            average(layer, "inputs", (layer.in_features,), layer.parameter("e", adapter).device) for layer in layers
        ]
        _average_inputs(layers, adapter, means, config.beta1)


def _average_products(
    tensors: Sequence[Sequence[torch.Tensor]], grad_scale: torch.Tensor | float, config: PedyraConfig
) -> None:
    """Eq. 3: I = |w·g|, Ī ← β1·Ī + (1 − β1)·I, Ū ← β2·Ū + (1 − β2)·|I − Ī|.

    Args:
        tensors: w, g, Ī and Ū of each parameter.
        grad_scale: What the gradients still carry.
        config: β1 and β2.
    """
    weights, gradients, sensitivity, uncertainty = (list(kind) for kind in zip(*tensors, strict=True))
    if any(weight.dtype != mean.dtype for weight, mean in zip(weights, sensitivity, strict=True)):
        weights = [weight.to(mean.dtype) for weight, mean in zip(weights, sensitivity, strict=True)]
        gradients = [gradient.to(mean.dtype) for gradient, mean in zip(gradients, sensitivity, strict=True)]
    products = list(private.foreach_mul(weights, gradients))
    private.foreach_abs_(products)
    if isinstance(grad_scale, torch.Tensor) or grad_scale != 1.0:
        private.foreach_div_(products, cast(Any, grad_scale))
    private.foreach_lerp_(sensitivity, products, 1 - config.beta1)
    private.foreach_sub_(products, sensitivity)
    private.foreach_abs_(products)
    private.foreach_lerp_(uncertainty, products, 1 - config.beta2)


def _average_inputs(layers: list[PedyraLayer], adapter: str, means: list[torch.Tensor], decay: float) -> None:
    """Let the averages, (in) by layer, learn this step's mean squares of the inputs, over all processes.

    A layer keeps its average where there was no input, or where a gradient scaler is about to skip a step for an
    overflow.
    """
    sums = []
    for layer, mean in zip(layers, means, strict=True):
        squares = layer.take_gathered(adapter)
        sums.append(mean.new_zeros(len(mean) + 1) if squares is None else squares.to(mean.device, mean.dtype))
    if process_count() > 1 and grouped():
        flat = torch.cat([total.to(means[0].device) for total in sums])
        distributed.all_reduce(flat)
        sums = [part.to(total.device) for part, total in zip(flat.split([len(s) for s in sums]), sums, strict=True)]
    by_device: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for mean, total in zip(means, sums, strict=True):
        held, new = by_device.setdefault(mean.device, ([], []))
        held.append(mean)
        new.append(total)
    for held, new in by_device.values():
        # In one piece, since a layer's part is small beside the time that an operation takes to begin.
        sizes = [len(mean) for mean in held]
        now = torch.cat([total[:-1] for total in new])
        now /= torch.cat([total[-1:].expand(size) for total, size in zip(new, sizes, strict=True)])
        before = torch.cat(held)
        after = before.lerp(torch.where(now.isfinite(), now, before), 1 - decay)
        private.foreach_copy_(held, list(after.split(sizes)))


def triple_scores(moment: Moment, layers: list[PedyraLayer], step: int) -> list[torch.Tensor]:
    """Every triple's score (Algorithm 1), float64 on the CPU, a tensor (r) per layer."""
    config: PedyraConfig = moment.config
    if config.importance == "random":
        generator = generator_for(config, step, 1)
        return [torch.rand(layer.rank(moment.adapter), generator=generator, dtype=torch.float64) for layer in layers]
    parts = []
    if config.uses_gradients:
        parts.append((config.score_mix, [_gradient_scores(layer, moment.adapter, config) for layer in layers]))
    if config.uses_inputs:
        parts.append((1 - config.score_mix, [_input_scores(layer, moment.adapter) for layer in layers]))
    total = [torch.zeros(layer.rank(moment.adapter), dtype=torch.float64) for layer in layers]
    for share, scores in parts:
        # In one piece: every transfer waits for the device.
        together = torch.cat([score.to(scores[0].device) for score in scores]).to("cpu", torch.float64)
        on_cpu = together.split([len(score) for score in scores])
        mean = float(together.mean()) if config.normalize_scores else 1.0
        for sum_so_far, score in zip(total, on_cpu, strict=True):
            sum_so_far.add_(score, alpha=share / mean if mean > 0 else 0.0)
    return total


def _gradient_scores(layer: PedyraLayer, adapter: str, config: PedyraConfig) -> torch.Tensor:
    """S_grad (eq. 4–5) of a layer's triples, (r)."""
    gradients = [_gradient(layer, role, adapter, layer.parameter(role, adapter)) for role in ROLES]
    norms = torch.stack([gradient.to(_wide(layer)).norm() for gradient in gradients])
    shares = norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)
    result = torch.zeros(layer.rank(adapter), dtype=norms.dtype, device=norms.device)
    for role, share in zip(ROLES, shares, strict=True):
        sensitivity, uncertainty = (
            cast(torch.Tensor, layer.running(f"{kind}_{role}", adapter)).to(norms.dtype)
            for kind in ("sensitivity", "uncertainty")
        )
        score = sensitivity * uncertainty
        if score.ndim == 2:
            score = score.mean(1 - layer.rank_dims[role])
        result += score * share if config.gradient_weighting else score
    return result


def _input_scores(layer: PedyraLayer, adapter: str) -> torch.Tensor:
    """S_inp (eq. 6) of a layer's triples, (r)."""
    down, e, up = (
        in_use(layer, role, adapter, layer.parameter(role, adapter).detach()).to(_wide(layer)) for role in ROLES
    )
    inputs = cast(torch.Tensor, layer.running("inputs", adapter)).to(down.dtype)
    score: torch.Tensor = e.abs() * (down.abs() @ inputs) * up.norm(dim=0)
    return score


def _wide(layer: PedyraLayer) -> torch.dtype:
    # Products of products of small numbers: in float32 they could vanish.
    return torch.float32 if next(layer.parameters()).device.type == "mps" else torch.float64


def shared_with_all(scores: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The first process's scores, (r) for each layer, so that no rounding can make another one decide differently."""
    if not (process_count() > 1 and grouped()):
        return scores
    flat = torch.cat(scores).to(device)
    distributed.broadcast(flat, 0)
    return list(flat.cpu().split([len(score) for score in scores]))


def generator_for(config: PedyraConfig, step: int, purpose: int) -> torch.Generator:
    """Random numbers made of seed and step alone: the same on every process, and after resuming."""
    return torch.Generator().manual_seed(((config.seed * 1_000_003 + step) * 2 + purpose) % 2**63)
