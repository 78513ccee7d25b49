"""Experts whose matrices lie in one parameter, (experts, ·, ·): each of them adapted as a linear layer of its own.

transformers 5 keeps the experts of a mixture in fused parameters. `AdaptedExperts` stands around such a module. For
every parameter that is adapted it has a list with a linear layer per expert (`ExpertMatrix`), which has no weight but
reads its part of the parameter. Adapters wrap those as they wrap any linear layer, so ranks, scores, merging and the
landscape have nothing to know of experts, and ranks can move between them. In the forward pass, the module's own code
finds the lists in the place of its parameters: what it multiplies with `gate_up_proj[expert]` goes through the adapted
layer of that expert. No matrix of the experts' size is made, as it is where the parameter itself is given an update.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dynalora.adapter.parts import Parted, PartMatrix, acts, of_part
from dynalora.common.processes import process_count
from dynalora.errors import UnsupportedError

#: What the projections in a fused parameter are called where they are layers of their own; all of a row make it up.
#: In the order in which the module has them.
_LAYERS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("w2",),)}

#: The fused parameters whose order in their module is known.
FUSED = tuple(_LAYERS)


class ExpertMatrix(PartMatrix):
    """One expert's matrix in a fused parameter, as a linear layer, without its bias.

    Attributes:
        parameter_name: The parameter.
        index: The expert.
    """

    def __init__(self, experts: nn.Module, parameter_name: str, index: int) -> None:
        super().__init__(experts)
        self.parameter_name = parameter_name
        self.index = index

    @property
    def weight(self) -> torch.Tensor:
        """The expert's part of the parameter, (out, in): a view."""
        # Not by its name, under which the experts' code may find the lists of layers just now.
        parameter = self.owner._parameters[self.parameter_name]
        matrix: torch.Tensor = parameter[self.index]
        return matrix.t() if getattr(self.owner, "is_transposed", False) else matrix

    def extra_repr(self) -> str:
        """Parameter and expert, for `print(model)`."""
        return f"{self.parameter_name}[{self.index}]"


class ExpertList(nn.ModuleList):
    """The matrices of a fused parameter, one for each expert, adapted or not."""


class AdaptedExperts(Parted):
    """A module of experts, of which some parameters are adapted; the lists are called what the parameters are."""

    def adapt(self, parameter_name: str) -> None:
        """Make the layers of a fused parameter, for adapters to wrap."""
        if parameter_name not in self._modules:
            count = len(getattr(self.base_layer, parameter_name))
            layers = ExpertList(ExpertMatrix(self.base_layer, parameter_name, i) for i in range(count))
            setattr(self, parameter_name, layers)

    def lists(self) -> dict[str, ExpertList]:
        """The lists of layers by parameter."""
        return {name: module for name, module in self._modules.items() if isinstance(module, ExpertList)}

    def parts(self) -> Iterator[nn.Module]:
        """The layers of all experts."""
        for layers in self.lists().values():
            yield from layers

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What the experts compute, with the adapters of each; arguments and result are the experts' own.

        `adapter_names` are the adapters of the rows in a mixed batch, whose tokens come one row after the other.

        Raises:
            UnsupportedError: In a mixed batch, the experts are not given a number for each token of each row.
        """
        self.take_back_if_disabled()
        if adapter_names is not None:
            return self._row_by_row(adapter_names, args, kwargs)
        acting = {name: layers for name, layers in self.lists().items() if any(map(acts, layers))}
        if not acting:
            return self.base_layer(*args, **kwargs)
        result = self._one_by_one(acting, None, *args, **kwargs)
        if process_count() > 1 and torch.is_grad_enabled() and isinstance(result, torch.Tensor):
            # Data parallelism waits for a gradient of every parameter, also of experts that no token went to.
            own = [p.flatten()[:1].sum() for p in self.parameters() if p.requires_grad]
            result = result + 0 * torch.stack(own).sum().to(result) if own else result
        return result

    def _row_by_row(self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same for a mixed batch: the tokens of each adapter by themselves."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        counts = {len(tensor) for tensor in tensors if tensor.ndim}
        tokens = counts.pop() if len(counts) == 1 else 0
        if not tokens or tokens % len(names):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise UnsupportedError(
                f"adapter_names has {len(names)} names, and adapted experts (a {type(self.base_layer).__name__}) were "
                f"given tensors of shapes {shapes}, of which it cannot be told which token is of which row; give a "
                "name for each row, or use one adapter at a time (set_adapter)."
            )
        rows = torch.arange(tokens, device=tensors[0].device).view(len(names), -1)
        result: torch.Tensor | None = None
        for adapter in dict.fromkeys(names):
            mine = rows[[row for row, name in enumerate(names) if name == adapter]].flatten()

            def part(value: Any, mine: torch.Tensor = mine) -> Any:
                return value[mine.to(value.device)] if isinstance(value, torch.Tensor) and value.ndim else value

            some = [part(value) for value in args]
            more = {key: part(value) for key, value in kwargs.items()}
            acting = {
                name: layers
                for name, layers in self.lists().items()
                if any(acts(layer, (adapter,)) for layer in layers)
            }
            found = self._one_by_one(acting, adapter, *some, **more) if acting else self.base_layer(*some, **more)
            if result is None:
                result = found.new_empty(tokens, *found.shape[1:])
            result[mine] = found
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _one_by_one(self, acting: dict[str, ExpertList], adapter: str | None, *args: Any, **kwargs: Any) -> Any:
        # The form that goes from expert to expert; others gather or group whole parameters.
        forward: Callable[..., Any] = inspect.unwrap(type(self.base_layer).forward)
        with _in_place_of_parameters(self.base_layer, acting, adapter):
            return forward(self.base_layer, *args, **kwargs)


@contextmanager
def _in_place_of_parameters(experts: nn.Module, lists: dict[str, ExpertList], adapter: str | None) -> Iterator[None]:
    """Inside, the experts' code finds lists of layers in the place of its parameters.

    Args:
        experts: The module of experts.
        lists: The layers by parameter.
        adapter: In mixed batches, the adapter of the tokens; None for those that are active.
    """
    try:
        for name, layers in lists.items():
            # Attributes of the object come before those that nn.Module looks up.
            experts.__dict__[name] = _Matrices(layers, adapter)
        yield
    finally:
        for name in lists:
            experts.__dict__.pop(name, None)


class _Matrices:
    """Stands for a fused parameter; can be asked for one expert's matrix."""

    def __init__(self, layers: ExpertList, adapter: str | None) -> None:
        self._layers, self._adapter = layers, adapter

    def __getitem__(self, expert: Any) -> _Matrix:
        return _Matrix(self._layers[int(expert)], self._adapter)


class _Matrix:
    """Stands for one expert's matrix; can be multiplied with an input."""

    def __init__(self, layer: nn.Module, adapter: str | None) -> None:
        self._layer, self._adapter = layer, adapter

    def _times(self, x: torch.Tensor) -> torch.Tensor:
        """The product with an input, (tokens, in) → (tokens, out)."""
        return of_part(self._layer, x, None if self._adapter is None else [self._adapter] * len(x))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, matrix, *rest = args
        products = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm)
        if function not in products or not isinstance(matrix, _Matrix):
            raise UnsupportedError(
                f"the experts of this model use their matrices in {getattr(function, '__name__', function)}, which "
                "adapters of experts cannot take part in; leave the experts out with exclude_modules."
            )
        result = matrix._times(x)
        bias = rest[0] if rest else (kwargs or {}).get("bias")
        return result if bias is None else result + bias

    def __rmatmul__(self, x: torch.Tensor) -> Any:
        return self._times(x)


def fused_experts(model: nn.Module) -> dict[str, list[str]]:
    """The modules whose experts can be adapted, by name, each with its fused parameters.

    They are those of transformers that say how their parameters lie, and have a form that goes from expert to expert.
    """
    of_modules = (
        (name.removesuffix(".base_layer"), fused_parameters(module)) for name, module in model.named_modules()
    )
    return {name: fused for name, fused in of_modules if fused}


def fused_parameters(module: nn.Module | None) -> list[str]:
    """The fused parameters of one module whose experts can be adapted; empty for other modules, and around one."""
    if module is None or not hasattr(type(module).forward, "__wrapped__") or "is_transposed" not in vars(module):
        return []
    own = module.named_parameters(recurse=False)
    return [key for key, parameter in own if parameter.ndim == 3 and parameter.is_floating_point()]


def meant_parameters(fused: list[str], matches: Callable[[str], bool]) -> list[str]:
    """The fused parameters that target modules mean: by their own name, or by those of all layers that they hold.

    Args:
        fused: Names of the parameters.
        matches: Whether a name inside the module of experts is meant.
    """
    return [
        name for name in fused if matches(name) or any(all(map(matches, layers)) for layers in _LAYERS.get(name, ()))
    ]


def halves(fused: list[str], matches: Callable[[str], bool]) -> list[str]:
    """Names of layers that are meant, but of which a fused parameter holds more that are not."""
    meant = meant_parameters(fused, matches)
    rows = [layers for name in fused if name not in meant for layers in _LAYERS.get(name, ())]
    return [layer for layers in rows for layer in layers if matches(layer)]


def layer_names(fused: list[str]) -> list[str]:
    """Every name that fused parameters, or the layers that they hold, go by."""
    return [*fused, *(layer for name in fused for layers in _LAYERS.get(name, ()) for layer in layers)]
