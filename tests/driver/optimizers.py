"""The optimizers that all methods are tested with; printed as the table of `docs/optimizers.md`.

python -m tests.driver.optimizers
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Parameters = Sequence[nn.Parameter]

FOLLOWS = "follows"
ANEW = "starts anew"
WITHOUT = "–"


@dataclass(frozen=True)
class Tested:
    """An optimizer.

    Attributes:
        name: What the table calls it.
        module: Where the class is.
        make: Makes one, or several that share the parameters, of (the module, the parameters).
        state: What becomes of its state where ranks move: it follows, starts anew with a warning, or there is none.
        trainer: Names that transformers' `TrainingArguments(optim=...)` has for it.
        note: What a user must know.
        closure: Whether its step is given a closure.
        hessian: Whether its step differentiates the gradient once more.
        learns: Whether it makes the loss smaller in the tests' few steps with any method; not where it feels its way.
        resumes: Whether a run that goes on from its `state_dict` is the same run with a plain parameter, too.
    """

    name: str
    module: str
    make: Callable[[Any, Parameters], Any]
    state: str = FOLLOWS
    trainer: tuple[str, ...] = ()
    note: str = ""
    closure: bool = False
    hessian: bool = False
    learns: bool = True
    resumes: bool = True

    def optimizers(self, parameters: Parameters) -> list[torch.optim.Optimizer]:
        """Make it, or them, in the state for training.

        Args:
            parameters: What is trained.
        """
        made = self.make(importlib.import_module(self.module), parameters)
        optimizers = made if isinstance(made, list) else [made]
        for optimizer in optimizers:
            if callable(train := getattr(optimizer, "train", None)):  # schedule-free
                train()
        return optimizers


def plain(name: str, lr: float = 1e-2, **options: Any) -> Callable[[Any, Parameters], Any]:
    """An optimizer that takes parameters, a rate and options."""
    return lambda module, parameters: getattr(module, name)(parameters, lr=lr, **options)


def low_rank(name: str, **options: Any) -> Callable[[Any, Parameters], Any]:
    """One that projects the gradients of matrices; vectors are a group of their own."""

    def make(module: Any, parameters: Parameters) -> Any:
        matrices = {"params": [p for p in parameters if p.ndim == 2], "rank": 2, "update_proj_gap": 3, **options}
        vectors = [p for p in parameters if p.ndim != 2]
        return getattr(module, name)([matrices, *([{"params": vectors}] if vectors else [])], lr=1e-2)

    return make


def muon(module: Any, parameters: Parameters) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for vectors, as torch's documentation advises."""
    vectors = [p for p in parameters if p.ndim != 2]
    matrices = module.Muon([p for p in parameters if p.ndim == 2], lr=1e-2)
    return [matrices, *([module.AdamW(vectors, lr=1e-2)] if vectors else [])]


ONE_RATE = "multiples of the rate are applied to its steps"

OPTIMIZERS = (
    Tested("AdamW", "torch.optim", plain("AdamW", amsgrad=True), trainer=("adamw_torch",)),
    Tested("AdamW, fused", "torch.optim", plain("AdamW", fused=True), trainer=("adamw_torch_fused",)),
    Tested("AdamW, foreach", "torch.optim", plain("AdamW", foreach=True)),
    Tested("Adam", "torch.optim", plain("Adam")),
    Tested("NAdam", "torch.optim", plain("NAdam")),
    Tested("RAdam", "torch.optim", plain("RAdam")),
    Tested("Adamax", "torch.optim", plain("Adamax")),
    Tested("Adagrad", "torch.optim", plain("Adagrad", initial_accumulator_value=0.1), trainer=("adagrad",)),
    Tested("Adadelta", "torch.optim", plain("Adadelta", 1.0)),
    Tested("RMSprop", "torch.optim", plain("RMSprop", 1e-3, momentum=0.5, centered=True), trainer=("rmsprop",)),
    Tested("SGD", "torch.optim", plain("SGD", 0.05), WITHOUT, trainer=("sgd",)),
    Tested("SGD with momentum", "torch.optim", plain("SGD", 0.05, momentum=0.9, nesterov=True)),
    Tested("SGD with momentum, fused", "torch.optim", plain("SGD", 0.05, momentum=0.9, fused=True)),
    Tested("ASGD", "torch.optim", plain("ASGD", 0.05, t0=1), note="the average `ax` has new components' own values"),
    Tested("Rprop", "torch.optim", plain("Rprop"), note="new components begin with the step size of the start"),
    Tested("Adafactor", "torch.optim", plain("Adafactor")),
    Tested("Muon for matrices, AdamW for vectors", "torch.optim", muon, note="Muon itself refuses vectors"),
    Tested(
        "LBFGS",
        "torch.optim",
        plain("LBFGS", 0.03, max_iter=4),
        ANEW,
        closure=True,
        note="one vector of all parameters: a change of rank begins its history anew, without a warning; multiples of "
        "the rate have no effect, with one",
    ),
    Tested(
        "Adafactor",
        "transformers",
        plain("Adafactor", relative_step=False, scale_parameter=False, beta1=0.9),
        trainer=("adafactor",),
    ),
    Tested(
        "Adafactor with `relative_step`",
        "transformers",
        lambda module, p: module.Adafactor(p, lr=None, relative_step=True, warmup_init=True),
        note=ONE_RATE,
        learns=False,
    ),
    Tested("AdamW8bit", "bitsandbytes.optim", plain("AdamW8bit"), trainer=("adamw_bnb_8bit",)),
    Tested(
        "PagedAdamW8bit, PagedAdamW32bit",
        "bitsandbytes.optim",
        plain("PagedAdamW8bit"),
        trainer=("paged_adamw_8bit", "paged_adamw_32bit"),
    ),
    Tested("Lion8bit", "bitsandbytes.optim", plain("Lion8bit", 1e-3), trainer=("lion_8bit", "paged_lion_8bit")),
    Tested("Lion", "bitsandbytes.optim", plain("Lion", 1e-3), trainer=("lion_32bit", "paged_lion_32bit")),
    Tested("RMSprop8bit", "bitsandbytes.optim", plain("RMSprop8bit", 1e-3), trainer=("rmsprop_bnb_8bit",)),
    Tested("AdEMAMix", "bitsandbytes.optim", plain("AdEMAMix"), trainer=("ademamix", "paged_ademamix_32bit")),
    Tested(
        "AdEMAMix8bit",
        "bitsandbytes.optim",
        plain("AdEMAMix8bit"),
        trainer=("ademamix_8bit",),
        note="small matrices have 32 bits",
    ),
    Tested("Lion", "lion_pytorch", plain("Lion", 1e-3)),
    Tested("Prodigy", "prodigyopt", plain("Prodigy", 1.0), note=ONE_RATE, learns=False),
    Tested(
        "Prodigy with `slice_p`", "prodigyopt", plain("Prodigy", 1.0, slice_p=11), ANEW, note=ONE_RATE, learns=False
    ),
    Tested("DAdaptAdam", "dadaptation", plain("DAdaptAdam", 1.0), note=ONE_RATE, learns=False),
    Tested("DAdaptSGD", "dadaptation", plain("DAdaptSGD", 1.0), note=ONE_RATE, learns=False),
    Tested("DAdaptAdaGrad", "dadaptation", plain("DAdaptAdaGrad", 1.0), note=ONE_RATE, learns=False),
    Tested("DAdaptLion", "dadaptation", plain("DAdaptLion", 1.0), note=ONE_RATE, learns=False),
    Tested(
        "AdamWScheduleFree",
        "schedulefree",
        plain("AdamWScheduleFree"),
        trainer=("schedule_free_adamw",),
        note="`z` has new components' own values",
    ),
    Tested("SGDScheduleFree", "schedulefree", plain("SGDScheduleFree", 0.1), trainer=("schedule_free_sgd",)),
    Tested("RAdamScheduleFree", "schedulefree", plain("RAdamScheduleFree"), trainer=("schedule_free_radam",)),
    Tested("GaLoreAdamW", "galore_torch", low_rank("GaLoreAdamW", scale=1.0, proj_type="std"), ANEW),
    Tested(
        "APOLLOAdamW",
        "apollo_torch",
        low_rank("APOLLOAdamW", scale=1.0, proj_type="std", proj="random", scale_type="tensor"),
        ANEW,
    ),
    Tested(
        "GrokAdamW",
        "grokadamw",
        plain("GrokAdamW"),
        trainer=("grokadamw",),
        resumes=False,
        note="its state is not in its `state_dict`",
    ),
    Tested("StableAdamW", "optimi", plain("StableAdamW"), trainer=("stable_adamw",)),
    Tested("Ranger", "optimi", plain("Ranger"), note="lookahead's slow weights have new components' own values"),
    Tested("SophiaH", "pytorch_optimizer", plain("SophiaH"), hessian=True, note="`loss.backward(create_graph=True)`"),
    Tested(
        "SAM around AdamW",
        "pytorch_optimizer",
        lambda module, p: module.SAM(p, base_optimizer=torch.optim.AdamW, lr=1e-2),
        closure=True,
        resumes=False,
        note="a `state_dict` that is loaded leaves the optimizer within without its state",
    ),
    Tested(
        "Lookahead around AdamW",
        "pytorch_optimizer",
        lambda module, p: module.Lookahead(torch.optim.AdamW(p, lr=1e-2), k=2),
    ),
    Tested("CAME", "pytorch_optimizer", plain("CAME", 1e-3)),
    Tested("MADGRAD", "pytorch_optimizer", plain("MADGRAD", 1e-3)),
    Tested(
        "SPAM",
        "pytorch_optimizer",
        plain("SPAM"),
        ANEW,
        note="with `density` below 1, parameters whose rank has moved are stepped whole",
    ),
    Tested("StableSPAM", "pytorch_optimizer", plain("StableSPAM")),
    Tested("SOAP", "pytorch_optimizer", plain("SOAP"), ANEW),
    Tested("Kron (PSGD)", "pytorch_optimizer", plain("Kron", 1e-3), ANEW),
)
"""Each is run with every method, change of rank included, wherever its package is installed."""


def table() -> str:
    """The table, in Markdown."""
    lines = ["| optimizer | package | `optim=` of `Trainer` | state where ranks move | |", "|---|---|---|---|---|"]
    for row in OPTIMIZERS:
        package = row.module.partition(".")[0].replace("_", "-")
        names = ", ".join(f"`{name}`" for name in row.trainer)
        lines.append(f"| {row.name} | {package} | {names} | {row.state} | {row.note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
