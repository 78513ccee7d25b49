"""The penalty after the step: components shrink to exactly zero, and zero stays zero.

Adam divides a gradient by its own size, so a penalty in the gradient is rescaled with it, and components hover around
zero. Here the optimizer steps on the task's gradient alone. Then every component's product of norms
p_i = ‖up_i‖·‖down_i‖ is shrunk by rate × weight, the proximal step of λ Σ p_i in the products:

    p_i ← max(0, p_i − η·λ)

with η the learning rate of the component's factors (their mean, where they have different ones). Both factors are
scaled by √(p_new / p_i), so directions stay. A component that reaches zero becomes zero in both factors, with its
gradient and its optimizer state, so that neither gradient nor momentum moves it again. A component with p_i = 0 that
has not begun to grow (`up` is zero at the start) is left alone.
"""

from __future__ import annotations

import torch

from dynalora.driver import Moment
from dynalora.methods.dira.components import Components, remove, shrink


def shrunk(sizes: torch.Tensor, thresholds: torch.Tensor | float) -> torch.Tensor:
    """Products of norms after the proximal step, (n): max(0, p − η·λ).

    Args:
        sizes: Products of norms before, (n).
        thresholds: η·λ of every component, (n), or of all.
    """
    return (sizes - thresholds).clamp_min(0)


def proximal_step(moment: Moment, weight: float) -> None:
    """Shrink all components by rate × weight; those that reach zero stay zero."""
    components = Components.of(moment)
    sizes = shrunk(components.sizes, weight * rates(components, moment))
    shrink(components, sizes, moment.adapter)
    remove(components, (sizes == 0) & (components.sizes > 0), moment, cut=False)


def rates(components: Components, moment: Moment) -> torch.Tensor:
    """Learning rate of every component, (n): the mean of its factors'; 1 where an optimizer has none to tell.

    A layer of another optimizer than the one that steps now counts with the mean of those that step.
    """
    by_layer = []
    for layer in components.layers:
        factors = (layer.parameter(role, moment.adapter) for role in ("down", "up"))
        known = [rate for factor in factors if (rate := moment.rate(factor)) is not None]
        by_layer.append(sum(known) / len(known) if known else None)
    given = [rate for rate in by_layer if rate is not None]
    usual = sum(given) / len(given) if given else 1.0
    counts = torch.tensor([layer.rank(moment.adapter) for layer in components.layers], dtype=torch.int64)
    values = torch.tensor([usual if rate is None else rate for rate in by_layer], dtype=torch.float64)
    return values.repeat_interleave(counts)
