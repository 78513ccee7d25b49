"""Preparing `retain`: the base model writes text, and the adapter's layers read it, before the first step.

One forward and one backward pass of the base model over the text give each adapted layer the second moments of its
inputs and of the gradients at its outputs ([`adapter.retain`][dynalora.adapter.retain]). They are added up as
sketches, so memory does not grow with the text; layers that read the same tensor share the moment of their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from dynalora.adapter.curvature import Curvature
from dynalora.adapter.layer import AdapterLayer, adapter_layers
from dynalora.adapter.retain import BANK_ROWS, Retain
from dynalora.common.devices import device_of
from dynalora.common.processes import from_first
from dynalora.common.progress import Progress, late_progress, silent
from dynalora.driver import Driver, drivers_of
from dynalora.errors import TrainingError, UnsupportedError
from dynalora.evaluation.files import is_text, passages, read_rows, texts_of
from dynalora.evaluation.generation import batches_by_length, evaluating
from dynalora.evaluation.padding import padded
from dynalora.forgetting.base_model import adapters_off
from dynalora.forgetting.budget import TextMeter, hold_budget, retain_part
from dynalora.forgetting.texts import MeasuredText, anchor_text, given_text
from dynalora.spectral.second_moment import OVERSAMPLING, MomentSketch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_retain(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: MeasuredText | None = None,
    *,
    bf16: bool = False,
    progress: Progress = silent,
) -> None:
    """Make the adapters of a model ready for training with `retain`: a bare loop's one call.

    With `max_forgetting`, call [`hold_budget`][dynalora.forgetting.budget.hold_budget] after the last step.

    Args:
        model: A causal language model whose adapters have `retain`; others are left alone.
        tokenizer: The model's.
        text: What to keep; None: the configuration's `retain_on`, or else text that the base model writes itself
            ([`anchor_text`][dynalora.forgetting.texts.anchor_text]), once per base model, kept in the user's cache.
        bf16: Read the text under autocast to bfloat16, as transformers' Trainer does with its setting of that name.
        progress: Called with the number of texts that were written and read.

    Raises:
        DataError: The file that `retain_on` names cannot be read.
        UnsupportedError: The model is no causal language model, or has an adapter merged into its weights.
    """
    own: MeasuredText | None = None
    for driver, _, part in _retaining(model):
        config: Any = driver.config
        if text is not None:
            anchors = text
        elif config.retain_on is not None:
            anchors = given_text(_texts(config.retain_on), tokenizer)
        else:
            own = anchors = own or from_first(anchor_text(model, tokenizer, progress=progress))
        part.meter = TextMeter(model, anchors)
        if config.retain_mode != "replay":
            with torch.autocast(device_of(model).type, torch.bfloat16, enabled=bf16):
                read_curvature(model, anchors, driver.adapter, progress=progress)


def _retaining(model: nn.Module) -> list[tuple[Driver, list[AdapterLayer], Retain]]:
    """The adapters that have `retain`, with their layers."""
    return [(driver, layers, part) for driver, layers in drivers_of(model) if (part := retain_part(driver)) is not None]


def _texts(source: str | Sequence[str]) -> list[str]:
    """The texts that `retain_on` gives or names: passages of a plain text file, or a field of a data file's rows."""
    if not isinstance(source, str):
        return list(source)
    path = Path(source).expanduser()
    if is_text(path):
        return list(passages(path))
    rows, name = read_rows(source)
    return [text for text in texts_of(rows, None, name) if text]


class RetainCallback(TrainerCallback):
    """Prepares `retain` at the beginning of training and ends budgets; one of transformers' default callbacks."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        if model is None:
            return
        adapters = _retaining(model)
        for driver, layers, part in adapters:
            part.ends_itself = True
            if state.global_step == 0:
                part.forget_run(layers[0], driver.adapter)
        unread = any(not part.ready(driver.config, layers, driver.adapter) for driver, layers, part in adapters)
        if unread and hasattr(processing_class, "all_special_ids"):  # or else the first step says what is missing
            with late_progress() as progress:
                prepare_retain(model, processing_class, bf16=args.bf16, progress=progress)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        if model is not None:
            with late_progress() as progress:
                hold_budget(model, progress=progress)
            for _driver, _layers, part in _retaining(model):
                part.ends_itself = False


RANK = 128
"""Rank to which second moments are kept, beside their diagonal."""
BANK = 1024
"""Inputs that are stored for updates that depend on them."""


def read_curvature(
    model: nn.Module,
    text: MeasuredText,
    adapter: str = "default",
    *,
    rank: int = RANK,
    bank: int = BANK,
    batch_size: int = 4,
    progress: Progress = silent,
) -> None:
    """Let the layers of an adapter read text of the base model; afterwards they carry its curvature.

    Memory: (rank + 17) float32 numbers for each value of an input or output, and while reading three times that; `bank`
    inputs in the model's dtype where an update depends on the input.

    Args:
        model: A causal language model with the adapter, which is off while the text is read.
        text: The text; the positions that predict its tokens from `starts` on count.
        adapter: The adapter's name.
        rank: Rank of the second moments beside their diagonal.
        bank: Number of inputs to store where they are needed.
        batch_size: Texts per pass.
        progress: Called with the number of texts read.

    Raises:
        UnsupportedError: The model is no causal language model.
    """
    layers = adapter_layers(model, adapter)
    reader = _Reader(layers, adapter, rank, bank, text.tokens)
    what = "Reading the base model's text"
    with adapters_off(model), evaluating(model), torch.enable_grad(), reader.listening(model):
        for batch in batches_by_length([len(row) for row in text.rows], batch_size, what, progress):
            _read(model, text, batch, reader)
    reader.hand_out()


def _read(model: nn.Module, text: MeasuredText, batch: list[int], reader: _Reader) -> None:
    """One forward and one backward pass."""
    device = device_of(model)
    tokens, mask = padded([text.rows[index] for index in batch], 0, "left")
    length = tokens.shape[1]
    predicts = torch.zeros_like(mask, dtype=torch.bool)  # positions whose next token counts
    for row, index in enumerate(batch):
        predicts[row, length - 1 - (len(text.rows[index]) - text.starts[index]) : length - 1] = True
    tokens, mask, predicts = tokens.to(device), mask.to(device), predicts.to(device)
    reader.predicts = predicts
    output: Any = model(input_ids=tokens, attention_mask=mask, use_cache=False)
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim != 3 or logits.shape[1] != length:
        raise UnsupportedError(
            f"`retain` needs a causal language model, whose own text can be kept; {type(model).__name__} gives no "
            "logits for every token. Leave it out, or follow what is lost with RetentionMonitor."
        )
    targets = tokens.roll(-1, dims=1)[predicts]
    F.cross_entropy(logits[predicts].float(), targets, reduction="sum").backward()
    reader.end_batch()


class _Reader:
    """Adds up what the hooks on the layers see."""

    def __init__(self, layers: Mapping[str, AdapterLayer], adapter: str, rank: int, bank: int, tokens: int) -> None:
        self.layers, self.adapter, self.rank, self.bank = list(layers.values()), adapter, rank, bank
        self.predicts = torch.zeros(0, dtype=torch.bool)
        # Which layer's input a layer reads: its own, or that of an earlier layer with the same tensor.
        self.source: dict[AdapterLayer, AdapterLayer] = {}
        self.inputs: dict[AdapterLayer, MomentSketch] = {}
        self.outputs: dict[AdapterLayer, MomentSketch] = {}
        self.stored: dict[AdapterLayer, list[torch.Tensor]] = {}
        self.stores = any(layer.depends_on_input(adapter) for layer in self.layers)
        # Every so many-th token is stored, so that all kinds of text are.
        self.stride = max(1, tokens // bank)
        self._batch: dict[int, tuple[AdapterLayer, torch.Tensor]] = {}

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        handles = [layer.register_forward_hook(self._see) for layer in self.layers]
        # Base weights are frozen: the graph begins at the embeddings.
        handles.append(embedding.register_forward_hook(_begin_graph))
        trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trains:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in trains:
                parameter.requires_grad_(True)

    def _see(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        assert isinstance(layer, AdapterLayer)
        predicts = self.predicts.to(output.device)
        x = args[0].detach()
        first, _ = self._batch.setdefault(id(args[0]), (layer, args[0]))  # held, so that its id stays its own
        source = self.source.setdefault(layer, first)
        if source is layer:
            rows = x[predicts]
            if layer not in self.inputs:
                self.inputs[layer] = MomentSketch(layer.in_features, self.rank, device=x.device)
            self.inputs[layer].add(rows)
            if self.stores:
                self.stored.setdefault(layer, []).append(rows[:: self.stride].clone())
        if layer not in self.outputs:
            self.outputs[layer] = MomentSketch(layer.out_features, self.rank, device=output.device)
        sketch = self.outputs[layer]
        output.register_hook(lambda gradient: sketch.add(gradient.detach()[predicts.to(gradient.device)]))

    def end_batch(self) -> None:
        """Let go of the batch's tensors."""
        self._batch.clear()

    def hand_out(self) -> None:
        """Give every layer its curvature.

        Raises:
            TrainingError: The passes gave what is no number, as the penalty then would be.
        """
        for layer in self.layers:
            seen = {"inputs": self.inputs.get(layer), "gradients at the outputs": self.outputs.get(layer)}
            for what, sketch in seen.items():
                if sketch is not None and not bool(sketch.squares.isfinite().all()):
                    raise TrainingError(
                        f"the text that retain is to keep gives NaN or infinite {what} of {layer.name!r} in the base "
                        "model, so nothing can be learned from it; hold the base model in float32 or bfloat16 in place "
                        "of float16, or give other text with retain_on."
                    )
        inputs = {layer: sketch.result() for layer, sketch in self.inputs.items()}
        stored = {layer: torch.cat(parts)[: self.bank] for layer, parts in self.stored.items()}
        for layer in self.layers:
            source = self.source.get(layer)
            if source is None:  # the text did not come by, so nothing of it depends on this layer
                layer.curvatures[self.adapter] = Curvature(
                    MomentSketch(layer.in_features, 1).result(),
                    MomentSketch(layer.out_features, 1).result(),
                    torch.zeros(1, layer.in_features),
                )
                continue
            layer.curvatures[self.adapter] = Curvature(inputs[source], self.outputs[layer].result(), stored.get(source))


@dataclass(frozen=True)
class RetainCost:
    """What `retain` costs an adapter, from its shapes.

    Attributes:
        bytes: Memory of the curvature while training.
        reading_bytes: Memory of the sketches while the text is read, besides the model's own passes.
        multiplications: Of one step's penalty and its gradient.
        base_multiplications: Of a forward pass and the backward pass to the inputs, per token, in the adapted layers.
    """

    bytes: int
    reading_bytes: int
    multiplications: int
    base_multiplications: int

    def share(self, tokens: int) -> float:
        """The penalty's part of a step over so many tokens, in multiplications; other layers make it smaller."""
        return self.multiplications / (tokens * self.base_multiplications)


def retain_cost(model: nn.Module, adapter: str = "default", *, rank: int = RANK, bank: int = BANK) -> RetainCost:
    """What `retain` costs, before paying it: the model may be on the meta device and have no weights.

    Args:
        model: A causal language model with the adapter; it makes one pass over two tokens.
        adapter: The adapter's name.
        rank: Rank of the second moments.
        bank: Number of stored inputs, where updates depend on them.
    """
    layers = adapter_layers(model, adapter)
    seen: dict[int, tuple[AdapterLayer, torch.Tensor]] = {}  # the tensors are held, so that ids stay theirs

    def see(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, AdapterLayer)
        seen.setdefault(id(args[0]), (layer, args[0]))

    handles = [layer.register_forward_pre_hook(see) for layer in layers.values()]
    try:
        with adapters_off(model), evaluating(model), torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    inputs = [(layer.in_features, x.element_size()) for layer, x in seen.values()]
    outputs = [layer.out_features for layer in layers.values()]
    widths = [*(width for width, _ in inputs), *outputs]
    gated = any(layer.depends_on_input(adapter) for layer in layers.values())
    numbers = sum((min(rank, width) + 1) * width for width in widths)
    stored = sum(bank * width * size for width, size in inputs) if gated else 0
    reading = sum((2 * min(width, rank + OVERSAMPLING) + 1) * width for width in widths)
    products = 0
    for layer in layers.values():
        r = layer.sides(adapter)[0].shape[1]
        across = [layer.out_features] if layer.depends_on_input(adapter) else [layer.in_features, layer.out_features]
        products += sum(width * r * (min(rank, width) + r) for width in across)
        if layer.depends_on_input(adapter):
            width = sum(matrix.shape[0] for matrix in layer.projections(adapter))
            products += min(bank, BANK_ROWS) * (layer.in_features * width + r * r)
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    return RetainCost(4 * numbers + stored, 4 * reading + stored, 3 * products, 2 * weights)


def _begin_graph(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output if output.requires_grad else output.detach().requires_grad_(True)
