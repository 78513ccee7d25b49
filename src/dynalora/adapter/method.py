"""What a method adds to the shared form: the contract of a file in `dynalora.methods`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dynalora.driver import Moment, OptimizerOverride, Part

if TYPE_CHECKING:
    from dynalora.adapter.config import AdapterConfig
    from dynalora.adapter.layer import AdapterLayer


@dataclass(frozen=True)
class Panel:
    """One plot of a method's metrics over the optimizer steps.

    Attributes:
        title: What it shows.
        metrics: Names of the metrics, one curve each.
        log: Whether the axis is logarithmic.
    """

    title: str
    metrics: tuple[str, ...]
    log: bool = False


class Method(Part):
    """A method: its configuration, its layer, and what it does around optimizer steps.

    Stateless: whatever changes during training lives in the layers (as parameters and buffers, so that it is saved)
    or in the driver's clock. Around optimizer steps it does what any [`Part`][dynalora.driver.part.Part] may do. Every
    hook has a default that does nothing, so a method states only what is its own.
    """

    #: Lower-case name; PEFT knows the method by its upper-case form, parameters carry it as a prefix.
    name: ClassVar[str]
    #: The name as its paper writes it, for titles; empty: ``name``.
    title: ClassVar[str] = ""
    #: The method's configuration and layer classes.
    config_class: ClassVar[type[AdapterConfig]]
    layer_class: ClassVar[type[AdapterLayer]]

    #: What lives for one training step (`Moment.shared`): made anew, without arguments, at the start of each.
    shared_class: ClassVar[type[Any]] = object

    sharding: tuple[str, ...] = ("FSDP2",)

    #: How the metrics are drawn, in reading order; empty: not at all.
    panels: ClassVar[tuple[Panel, ...]] = ()

    @property
    def gated(self) -> bool:
        """Whether the method's adapters have gates that can be recorded on text, unless they are told otherwise."""
        return self.config_class().gated

    def join(self, layers: Mapping[str, AdapterLayer], adapter: str, config: Any) -> None:
        """Make what depends on which layers there are, once all of a new adapter are; also where weights are loaded.

        Args:
            layers: The adapted layers by module name.
            adapter: The adapter's name.
            config: Its configuration.
        """

    def prepare(self, layers: Mapping[str, AdapterLayer], adapter: str, config: Any) -> None:
        """Finish the start of a new adapter, once all its layers are there; not called when its weights are loaded.

        Args:
            layers: The adapted layers by module name.
            adapter: The adapter's name.
            config: Its configuration.
        """

    def needs_total_steps(self, config: Any) -> bool:
        """Whether the method cannot run without knowing how many optimizer steps there will be."""
        return False

    def needs_task_loss(self, config: Any) -> bool:
        """Whether the method acts on the value of the task loss (`Moment.task_loss`)."""
        return False

    def exchanges(self, config: Any) -> bool:
        """Whether processes that train together must all take part in its steps: they exchange numbers or ranks."""
        return self.needs_task_loss(config)

    def optimizer_overrides(self, config: Any, layer: AdapterLayer, adapter: str) -> dict[str, OptimizerOverride]:
        """Parameter roles (`"gate_weight"`, …) of a layer that the optimizer must treat differently."""
        return {}

    def keeps_components(self, moment: Moment, trains: bool) -> str:
        """Why components may not be removed from an adapter now, as the end of a sentence; empty if they may.

        Args:
            moment: The present moment.
            trains: Whether the adapter has parameters that train.
        """
        return ""

    def decided(self, layers: Mapping[str, AdapterLayer], adapter: str) -> list[dict[str, Any]]:
        """What the adapter decided, as rows of a table with names; empty where the ranks say it all.

        Args:
            layers: The adapted layers by module name.
            adapter: The adapter's name.
        """
        return []

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        return self
