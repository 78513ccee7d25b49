"""What acts around optimizer steps, and the driver runs: methods, and what adapters of any method may have besides."""

from __future__ import annotations

from typing import Any, ClassVar

from dynalora.driver.moment import Moment, OptimizerOverride


class Part:
    """Acts around optimizer steps: the method first, then the other parts in the driver's order.

    Every hook has a default that does nothing, so a part states only what it is for.
    """

    #: The setting that asks for the part, or the method.
    name: ClassVar[str]

    #: The ways to spread weights over processes that its rules know: `"FSDP1"` (flat vectors), `"FSDP2"` (shards),
    #: `"ZeRO"` (an optimizer of copies, with the groups of [`param_groups`][dynalora.driver.groups.param_groups]).
    sharding: tuple[str, ...] = ()

    def needs_driving(self, config: Any) -> bool:
        """Whether training without the driver would silently be something else."""
        return True

    def needs_whole_steps(self, config: Any) -> bool:
        """Whether it acts on all gradients of a step together, which an optimizer within `backward` does not have."""
        return False

    def exchanges(self, config: Any) -> bool:
        """Whether processes that train together must all take part in its steps: they exchange numbers or ranks."""
        return False

    def gathers(self, config: Any) -> bool:
        """Whether layers add something up over the passes of a step (`AdapterLayer.end_passes`, `forget_passes`)."""
        return False

    def optimizer_overrides(self, config: Any, layer: Any, adapter: str) -> dict[str, OptimizerOverride]:
        """Parameter roles of a layer that the optimizer must treat differently; these go before the method's."""
        return {}

    def before_step(self, moment: Moment) -> None:
        """Act when all gradients are there and the optimizer is about to step (under `no_grad`)."""

    def after_step(self, moment: Moment) -> None:
        """Act right after a step that was taken (under `no_grad`)."""

    def metrics(self, moment: Moment) -> dict[str, float]:
        """Numbers for the trainer's log; must be cheap."""
        return {}

    def report(self, moment: Moment) -> dict[str, Any]:
        """What it is doing now, for `dynalora.state_report`; may be slow."""
        return {}

    def check_finished(self, moment: Moment, when: str) -> None:
        """Warn, once, of what a run has left to do, where it has ended or the adapter is saved.

        Args:
            moment: The present moment.
            when: What the user is doing, for the message.
        """
