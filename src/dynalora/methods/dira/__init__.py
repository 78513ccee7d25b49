"""DiRA: a nuclear-norm penalty decides how much rank each layer gets.

    L = L_task + λ(t) Σ_l Σ_i ‖up_:,i‖₂ ‖down_i,:‖₂                                 (eq. 5, `penalty="product"`)
    L = L_task + λ(t)/2 Σ_l (‖up‖_F² + ‖down‖_F²)                              (App. B.2, `penalty="variational"`)

The sum is over the rank-1 components i of every adapted layer l, without the factor s. λ decays from
`penalty_weight` over the run. The penalty's gradient has a closed form in the factors,

    ∂/∂down_i = λ (‖up_i‖ / ‖down_i‖) down_i,     ∂/∂up_i = λ (‖down_i‖ / ‖up_i‖) up_i,

(λ·down and λ·up for the variational form), and is added right before the optimizer's step: the logged loss is the
task loss, and gradient accumulation or data parallelism cannot count the penalty twice.

Two things are not in the paper. With `penalty_mode="proximal"` the penalty acts after the optimizer's step instead
([`proximal`][dynalora.methods.dira.proximal]), so that components reach zero and stay there. With `target_rank` the
weight follows a budget of ranks or parameters ([`budget`][dynalora.methods.dira.budget]).

DiRA: Nuclear Norm Dynamic Rank Adaptation for Large Language Models (anonymous, under review or
withdrawn).
"""

from dynalora.methods.dira.method import Dira, DiraLayer
from dynalora.methods.dira.settings import DiraConfig

__all__ = ["Dira", "DiraConfig", "DiraLayer"]
