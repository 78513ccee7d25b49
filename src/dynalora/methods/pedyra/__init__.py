"""PE-DyRA: ranks move during training, from where they matter least to where they matter most.

    y = W0·x + s · up( e ⊙ down(x) ),      e trained, s = alpha / r with r the rank at the start

A triple is a rank-1 component G_i = (down_i, e_i, up_i). Every few steps the k triples of lowest score in the whole
model are removed, and the k layers of highest mean score get a new one each (Algorithm 2): the total never changes.
Both factors are kept near orthonormal by γ (‖down·downᵀ − I‖_F² + ‖upᵀ·up − I‖_F²) (eq. 2), whose gradient
4γ (down·downᵀ − I) down, and likewise for up, is added right before the optimizer's step.

A triple's score (Algorithm 1) mixes two parts:

* gradients, per entry w with I = |w·∂L/∂w| (eq. 3–5): Ī ← β1·Ī + (1−β1)·I, Ū ← β2·Ū + (1−β2)·|I − Ī|, S(w) = Ī·Ū;
  S_grad = ω_e S(e_i) + ω_down mean S(down_i) + ω_up mean S(up_i), ω being the gradients' shares in the layer's norms;
* inputs (eq. 6): S_inp = |e_i| · Σ_k |down_ik| m_k · ‖up_i‖, with m the moving average of the inputs' mean squares.

Where the paper leaves a choice: both parts are divided by their mean over all triples before they are mixed; scores
belong to the weights that the gradients were taken at; a layer's score (eq. 7) is the mean over the triples it had
before pruning; the inputs' average decays with β1; a new triple has e = 0 and random unit directions orthogonal to
its layer's others, so that the function does not change. Equal scores are ordered by layer and index. A layer keeps
one triple at least, and has min(in, out) at most, since there are no further orthogonal directions.

PE-DyRA: Dynamic Rank Adaptation for Parameter-Efficient Fine-Tuning via Importance-Aware Pruning and Expansion
(anonymous, under review or withdrawn).
"""

from dynalora.methods.pedyra.adjustment import choose
from dynalora.methods.pedyra.layer import PedyraLayer
from dynalora.methods.pedyra.method import Pedyra, adjustments
from dynalora.methods.pedyra.record import Adjustment
from dynalora.methods.pedyra.settings import AdjustmentPlan, PedyraConfig

__all__ = ["Adjustment", "AdjustmentPlan", "Pedyra", "PedyraConfig", "PedyraLayer", "adjustments", "choose"]
