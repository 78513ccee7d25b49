"""What a method adds to the shared form: the contract of a file in ``dynalora.methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from dynalora.driver import Moment, OptimizerOverride

if TYPE_CHECKING:
    from dynalora.adapter.config import AdapterConfig
    from dynalora.adapter.layer import AdapterLayer


class Method:
    """A method: its configuration, its layer, and what it does around optimizer steps.

    Stateless: whatever changes during training lives in the layers (as parameters and buffers, so that it is saved)
    or in the driver's clock. Every hook has a default that does nothing, so a method states only its own part.
    """

    #: Lower-case name; PEFT knows the method by its upper-case form, parameters carry it as a prefix.
    name: ClassVar[str]
    #: The name as its paper writes it, for titles; empty: ``name``.
    title: ClassVar[str] = ""
    #: The method's configuration and layer classes.
    config_class: ClassVar[type[AdapterConfig]]
    layer_class: ClassVar[type[AdapterLayer]]

    @property
    def gated(self) -> bool:
        """Whether the layers have gates that can be recorded on text (a method ``gates``)."""
        return hasattr(self.layer_class, "gates")

    def needs_total_steps(self, config: Any) -> bool:
        """Whether the method cannot run without knowing how many optimizer steps there will be."""
        return False

    def needs_driving(self, config: Any) -> bool:
        """Whether training without the driver would silently be something else than this method."""
        return True

    def optimizer_overrides(self, config: Any) -> dict[str, OptimizerOverride]:
        """Parameter roles (``"gate_weight"``, …) that the optimizer must treat differently."""
        return {}

    def before_step(self, moment: Moment) -> None:
        """Act when all gradients are there and the optimizer is about to step (under ``no_grad``)."""

    def after_step(self, moment: Moment) -> None:
        """Act right after a step that was taken (under ``no_grad``)."""

    def metrics(self, moment: Moment) -> dict[str, float]:
        """Numbers for the trainer's log; must be cheap."""
        return {}

    def report(self, moment: Moment) -> dict[str, Any]:
        """What the adapter is doing now, for :func:`dynalora.state_report`; may be slow."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        return self
