"""PE-DyRA in float64, one rank-1 triple and one number after the other, as eq. 1–7 and Algorithms 1–2 say.

The network is a chain of adapted linear layers with tanh between them. Triples hold everything that belongs to them:
their weights, the moving averages of eq. 3, and the optimizer's momentum.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

ROLES = ("down", "e", "up")


@dataclass
class Triple:
    """G_i = (down_i, e_i, up_i): (in), (1), (out)."""

    weight: dict[str, Tensor]
    sensitivity: dict[str, list[float]] = field(default_factory=dict)
    uncertainty: dict[str, list[float]] = field(default_factory=dict)
    momentum: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role, weight in self.weight.items():
            self.sensitivity[role] = [0.0] * len(weight)
            self.uncertainty[role] = [0.0] * len(weight)
            self.momentum[role] = torch.zeros_like(weight)


@dataclass
class Layer:
    weight: Tensor
    bias: Tensor
    scaling: float
    triples: list[Triple]
    inputs: list[float] = field(default_factory=list)
    limit: int = 10**6

    def __post_init__(self) -> None:
        self.inputs = [0.0] * self.weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """Eq. 1: W0·x + b + s Σ_i e_i up_i (down_i·x)."""
        y = x @ self.weight.t() + self.bias
        for triple in self.triples:
            w = triple.weight
            y = y + self.scaling * w["e"] * (x * w["down"]).sum(-1, keepdim=True) * w["up"]
        return y


@dataclass
class Settings:
    size: int
    mix: float
    beta1: float
    beta2: float
    gamma: float
    lr: float
    momentum: float
    mode: str
    weighting: bool
    normalize: bool
    mean_norm: bool = False


class Simulation:
    """A run, step by step. Directions of new triples are random, so they are handed in."""

    def __init__(self, layers: list[Layer], settings: Settings) -> None:
        self.layers, self.settings = layers, settings
        self.scores: list[list[float]] = []

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen = []
        for number, layer in enumerate(self.layers):
            if number:
                x = torch.tanh(x)
            seen.append(x)
            x = layer(x)
        return x, seen

    def orthogonality(self) -> Tensor:
        """Eq. 2 of every layer, summed; or the mean over all factors of the norms, as in AdaLoRA's code."""
        total = torch.zeros((), dtype=torch.float64)
        for layer in self.layers:
            for role in ("down", "up"):
                square = torch.zeros((), dtype=torch.float64)
                for i, one in enumerate(layer.triples):
                    for j, other in enumerate(layer.triples):
                        entry = (one.weight[role] * other.weight[role]).sum() - (1.0 if i == j else 0.0)
                        square = square + entry**2
                total = total + (square.sqrt() / (2 * len(self.layers)) if self.settings.mean_norm else square)
        return total

    def step(self, x: Tensor, target: Tensor) -> float:
        """One optimizer step of SGD with momentum; x (tokens, in), target (tokens, out)."""
        weights = [t.weight[role] for layer in self.layers for t in layer.triples for role in ROLES]
        for weight in weights:
            weight.requires_grad_(True)
        y, seen = self.forward(x)
        loss = (y - target).square().mean()
        task = {id(w): g for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)}
        total = self.settings.gamma * self.orthogonality()
        extra = torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)
        extra = [gradient.detach() for gradient in extra]  # torch 2.6 makes zeros that require gradients
        for weight in weights:
            weight.requires_grad_(False)
        self._average(task, seen)
        self.scores = self._scores(task)
        penalty = {id(w): g for w, g in zip(weights, extra, strict=True)}
        for layer in self.layers:
            for triple in layer.triples:
                for role in ROLES:
                    w = triple.weight[role]
                    velocity = triple.momentum[role]
                    velocity.mul_(self.settings.momentum).add_(task[id(w)] + penalty[id(w)])
                    w.sub_(self.settings.lr * velocity)
        return float(loss)

    def _average(self, task: dict[int, Tensor], seen: list[Tensor]) -> None:
        b1, b2 = self.settings.beta1, self.settings.beta2
        for layer, x in zip(self.layers, seen, strict=True):
            for triple in layer.triples:
                for role in ROLES:
                    w = triple.weight[role]
                    g = task[id(w)]
                    for n in range(len(w)):
                        now = abs(float(w[n]) * float(g[n]))
                        mean = b1 * triple.sensitivity[role][n] + (1 - b1) * now
                        triple.sensitivity[role][n] = mean
                        triple.uncertainty[role][n] = b2 * triple.uncertainty[role][n] + (1 - b2) * abs(now - mean)
            for j in range(x.shape[1]):
                square = sum(float(value) ** 2 for value in x[:, j].detach()) / x.shape[0]
                layer.inputs[j] = b1 * layer.inputs[j] + (1 - b1) * square

    def _scores(self, task: dict[int, Tensor]) -> list[list[float]]:
        """Algorithm 1."""
        gradient: list[list[float]] = []
        inputs: list[list[float]] = []
        for layer in self.layers:
            norm = {
                role: sum(float(task[id(t.weight[role])].square().sum()) for t in layer.triples) ** 0.5
                for role in ROLES
            }
            whole = sum(norm.values())
            gradient.append([])
            inputs.append([])
            for triple in layer.triples:
                score = 0.0
                for role in ROLES:
                    products = [a * b for a, b in zip(triple.sensitivity[role], triple.uncertainty[role], strict=True)]
                    share = 1.0
                    if self.settings.weighting:
                        share = norm[role] / whole if whole > 0 else 0.0
                    score += share * sum(products) / len(products)
                gradient[-1].append(score)
                down, e, up = (triple.weight[role] for role in ROLES)
                weighed = sum(abs(float(down[k])) * layer.inputs[k] for k in range(len(down)))
                inputs[-1].append(abs(float(e[0])) * weighed * float(up.square().sum()) ** 0.5)
        a = self.settings.mix
        if self.settings.normalize:
            gradient, inputs = _by_mean(gradient), _by_mean(inputs)
        return [
            [a * g + (1 - a) * i for g, i in zip(one, other, strict=True)]
            for one, other in zip(gradient, inputs, strict=True)
        ]

    def decide(self) -> tuple[list[tuple[int, int]], list[int]]:
        """Algorithm 2: what to prune, lowest first, and which layers to expand, highest first."""
        size = self.settings.size
        while True:
            pruned = self._lowest(size) if self.settings.mode != "expand" else []
            wanted = {"both": len(pruned), "expand": size, "prune": 0}[self.settings.mode]
            expanded = self._highest(wanted, pruned)
            if self.settings.mode != "both" or len(expanded) == len(pruned):
                return pruned, expanded
            size = len(expanded)

    def _lowest(self, size: int) -> list[tuple[int, int]]:
        chosen: list[tuple[int, int]] = []
        for _ in range(size):
            best = None
            for layer, scores in enumerate(self.scores):
                if len(scores) - sum(1 for p in chosen if p[0] == layer) <= 1:
                    continue
                for i, score in enumerate(scores):
                    if (layer, i) not in chosen and (best is None or score < self.scores[best[0]][best[1]]):
                        best = (layer, i)
            if best is None:
                break
            chosen.append(best)
        return chosen

    def _highest(self, size: int, pruned: list[tuple[int, int]]) -> list[int]:
        chosen: list[int] = []
        for _ in range(size):
            best = None
            for layer, scores in enumerate(self.scores):
                left = len(scores) - sum(1 for p in pruned if p[0] == layer)
                if layer in chosen or left >= self.layers[layer].limit:
                    continue
                mean = sum(scores) / len(scores)  # eq. 7
                if best is None or mean > sum(self.scores[best]) / len(self.scores[best]):
                    best = layer
            if best is None:
                break
            chosen.append(best)
        return chosen

    def adjust(self, new: dict[int, Triple]) -> tuple[list[tuple[int, int]], list[int]]:
        """Prune and expand; ``new`` holds the triples for the expanded layers."""
        pruned, expanded = self.decide()
        for number, layer in enumerate(self.layers):
            layer.triples = [t for i, t in enumerate(layer.triples) if (number, i) not in pruned]
            if number in expanded:
                layer.triples.append(new[number])
        return pruned, expanded


def _by_mean(scores: list[list[float]]) -> list[list[float]]:
    numbers = [score for layer in scores for score in layer]
    mean = sum(numbers) / len(numbers)
    return [[score / mean if mean > 0 else 0.0 for score in layer] for layer in scores]
