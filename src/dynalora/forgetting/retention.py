"""How much of the base model an adapted model still is, measured without any data.

The yardstick is text that the base model itself wrote; other text can be named too. With p the base model, q the
adapted model and x a text drawn from p, token by token at temperature 1 after a short opening:

    KL          (1/N) Σ_t Σ_v p(v | x_<t) · (log p(v | x_<t) − log q(v | x_<t))
    loss shift  (1/N) Σ_t (log p(x_t | x_<t) − log q(x_t | x_<t))

t runs over the N tokens that p wrote; tokens of the openings are context only. Both are in nats per token and 0 for
an unchanged model. Because x is drawn from p, the loss shift estimates the same quantity as KL, with more noise: it is
the number that any tool computing a language-modelling loss would see. KL sums over the whole vocabulary v and is never
negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dynalora.common.devices import device_of
from dynalora.common.notebook import Shown
from dynalora.common.private import outside_trainers_autocast
from dynalora.common.progress import Progress, silent
from dynalora.common.statistics import ratio
from dynalora.errors import ConfigError, check_least
from dynalora.evaluation.generation import batches_by_length, evaluating
from dynalora.evaluation.padding import padded
from dynalora.evaluation.scoring import last_logits
from dynalora.forgetting.base_model import adapters_off, fingerprint, refuse_merged
from dynalora.forgetting.texts import MeasuredText, OwnText


@dataclass(frozen=True)
class Retention(Shown):
    """Distance of an adapted model from its base model on a text. All in nats per token.

    Attributes:
        kl: KL(base ‖ tuned), mean over the tokens.
        loss_shift: Loss of the tuned model minus loss of the base model.
        base_loss: Loss of the base model on the text.
        tokens: Number of tokens the means are over.
        kl_error: Standard error of `kl` over the texts (0 for a single text).
    """

    kl: float
    loss_shift: float
    base_loss: float
    tokens: int
    kl_error: float

    @property
    def tuned_loss(self) -> float:
        """Loss of the adapted model on the text."""
        return self.base_loss + self.loss_shift


@dataclass(frozen=True)
class BasePredictions:
    """The base model's log-probabilities on a text, kept so that they are computed once for many adapters.

    Attributes:
        text: The text they belong to.
        log_probs: One tensor per text, (tokens that count, V), on the CPU: log-probabilities, or logits, which differ
            from them by a constant per token; None for a text whose predictions were not kept and are made anew.
    """

    text: MeasuredText
    log_probs: tuple[torch.Tensor | None, ...]

    @property
    def complete(self) -> bool:
        """Whether the predictions of all texts were kept, so that no base model is needed."""
        return all(part is not None for part in self.log_probs)

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return sum(part.numel() * part.element_size() for part in self.log_probs if part is not None)


def retention(
    model: torch.nn.Module,
    text: MeasuredText,
    *,
    base: BasePredictions | torch.nn.Module | None = None,
    batch_size: int = 8,
    chunk: int = 256,
    name: str = "the model",
    progress: Progress = silent,
) -> Retention:
    """KL(base ‖ tuned) and loss shift on the base model's own text, as defined at the top of this module.

    On other text than the base model's own the two are different things: KL still says how far the predictions moved,
    and the loss shift is negative where the tuned model has become better at that text.

    The base model is the same model with its adapters switched off; no second copy is needed. Memory: the logits of
    `batch_size` texts, once for each model, and four float32 blocks of `chunk` × V.

    Args:
        model: A PEFT model; its active adapters are what is measured. Without any, all distances are 0.
        text: From `own_text`, written by this very base model, or from `given_text`.
        base: From `base_predictions`, to leave the base model's pass out; or the base model itself, where switching
            adapters off does not give it back (full fine-tuning, PiSSA). With complete predictions of the base model no
            base model is needed.
        batch_size: Texts per batch.
        chunk: Positions of which all V probabilities are held in float32 at a time.
        name: Of the model, for `progress`.
        progress: Called with the number of texts done.

    Returns:
        The distances.

    Raises:
        ConfigError: Batch_size or chunk below 1; the text was written by another model; or `base` is for another text.
        UnsupportedError: An adapter is merged into the weights.
    """
    apart = base if isinstance(base, torch.nn.Module) else None
    predictions = base if isinstance(base, BasePredictions) else None
    if predictions is not None and predictions.text != text:
        raise ConfigError("The base predictions were made on another text; make them again with base_predictions().")
    _check(model, text, batch_size, chunk, writer=apart, written=predictions is not None and predictions.complete)
    what = f"Retention: {name}"
    totals = [torch.zeros(3, dtype=torch.float64) for _ in text.rows]  # Σ KL, Σ base loss, Σ tuned loss
    lengths = [len(row) for row in text.rows]
    # Not inference_mode: a model in training may keep what it computes here, such as rotary frequencies.
    with _measuring(model), evaluating(apart or model), torch.no_grad():
        for batch in batches_by_length(lengths, batch_size, what, progress):
            kept = [predictions.log_probs[index] for index in batch] if predictions else []
            reference = [part for part in kept if part is not None]
            if len(reference) < len(batch):
                reference = continuation_logits(apart or model, text, batch, off=True)
            tuned = continuation_logits(model, text, batch, off=False)
            for index, first, second in zip(batch, reference, tuned, strict=True):
                targets = torch.tensor(text.rows[index][text.starts[index] :], device=second.device)
                totals[index] = _distances(first, second, targets, chunk)
    counts = [len(row) - start for row, start in zip(text.rows, text.starts, strict=True)]
    kl, base_loss, tuned_loss = (ratio(sums, counts) for sums in torch.stack(totals).T.tolist())
    return Retention(kl.value, tuned_loss.value - base_loss.value, base_loss.value, text.tokens, kl.error)


def base_predictions(
    model: torch.nn.Module,
    text: MeasuredText,
    *,
    batch_size: int = 8,
    dtype: torch.dtype | None = torch.float32,
    max_bytes: int | None = None,
    progress: Progress = silent,
) -> BasePredictions:
    """The base model's log-probabilities on a text, to be used for many adapters or checkpoints.

    Takes `text.tokens` × V numbers of memory: 300 MB for 1500 tokens and a vocabulary of 50,000 in float32.

    Args:
        model: The base model, with or without adapters.
        text: From `own_text`, written by this very base model, or from `given_text`.
        batch_size: Texts per batch. With the same one, `retention` gives bit for bit what it would give without.
        dtype: What to keep them in. Half precision halves the memory and costs accuracy below about 1e-3 nats. None
            keeps the model's logits as they are: exact, and half the size for a model in half precision.
        max_bytes: Keep no more than this, in whole batches, those of long texts first; `retention` makes the rest
            anew each time. None keeps all.
        progress: Called with the number of texts done.

    Raises:
        ConfigError: Batch_size below 1, max_bytes below 0, or the text was written by another model.
        UnsupportedError: An adapter is merged into the weights.
    """
    _check(model, text, batch_size, 1)
    check_least(0, max_bytes=max_bytes)
    what = "Predictions of the base model"
    kept: dict[int, torch.Tensor | None] = {}
    used = 0
    lengths = [len(row) for row in text.rows]
    with _measuring(model), torch.no_grad():
        for batch in batches_by_length(lengths, batch_size, what, progress):
            parts = continuation_logits(model, text, batch, off=True)
            size = dtype.itemsize if dtype is not None else parts[0].element_size()
            used += size * sum(part.numel() for part in parts)
            if max_bytes is not None and used > max_bytes:
                progress(what, len(lengths), len(lengths))
                break  # what follows would fit only in part
            for index, logits in zip(batch, parts, strict=True):
                if dtype is not None:
                    kept[index] = F.log_softmax(logits.float(), dim=-1).to("cpu", dtype)
                else:
                    kept[index] = logits.to("cpu", copy=True)  # a view would keep the whole batch alive
    return BasePredictions(text, tuple(kept.get(index) for index in range(len(text.rows))))


def predictions_within(
    model: torch.nn.Module,
    texts: Mapping[str, MeasuredText],
    max_bytes: int,
    *,
    batch_size: int = 8,
    progress: Progress = silent,
) -> dict[str, BasePredictions]:
    """The base model's exact predictions on several texts, those of the first ones kept while memory lasts.

    What does not fit into `max_bytes` is made anew each time.
    """
    predictions = {}
    for name, text in texts.items():
        predictions[name] = base_predictions(
            model, text, batch_size=batch_size, dtype=None, max_bytes=max_bytes, progress=progress
        )
        max_bytes -= predictions[name].bytes
    return predictions


@contextmanager
def _measuring(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation in the data type of the weights: a trainer's autocast would add its rounding to the KL."""
    with evaluating(model), outside_trainers_autocast(model):
        yield


def _check(
    model: torch.nn.Module,
    text: MeasuredText,
    batch_size: int,
    chunk: int,
    writer: torch.nn.Module | None = None,
    *,
    written: bool = False,
) -> None:
    """Refuse what cannot be measured; `written`: that the base model wrote the text has been checked before."""
    check_least(1, batch_size=batch_size, chunk=chunk)
    refuse_merged(model)
    if isinstance(text, OwnText) and not written and fingerprint(writer or model) != text.fingerprint:
        raise ConfigError("The text was written by another base model; write it anew with own_text().")


def continuation_logits(
    model: torch.nn.Module, text: MeasuredText, batch: Sequence[int], *, off: bool
) -> list[torch.Tensor]:
    """For each text of a batch the logits (tokens written, V) that predict the tokens the model wrote."""
    device = device_of(model)
    tokens, mask = padded([text.rows[index] for index in batch], 0, "left")
    counts = [len(text.rows[index]) - text.starts[index] for index in batch]
    with adapters_off(model) if off else nullcontext():
        logits = last_logits(model, tokens.to(device), mask.to(device), max(counts) + 1)
    return [row[-count - 1 : -1] for row, count in zip(logits, counts, strict=True)]


def _distances(base: torch.Tensor, tuned: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    """Sums of KL, base loss and tuned loss over the positions of one text, (3,), float64 on the CPU.

    Args:
        base: Logits or log-probabilities (T, V); the difference cancels in the softmax.
        tuned: Logits (T, V).
        targets: The tokens that follow, (T,).
        chunk: Positions at a time.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        p = F.log_softmax(base[part].to(tuned.device).float(), dim=-1)
        q = F.log_softmax(tuned[part].float(), dim=-1)
        aim = targets[part, None]
        losses = (-p.gather(1, aim).double().sum(), -q.gather(1, aim).double().sum())
        # A token that p rules out (a masked vocabulary entry) adds nothing, whatever q says.
        kl = torch.where(torch.isneginf(p), torch.zeros_like(p), p.exp() * (p - q)).sum(dim=-1).double().sum()
        sums += torch.stack([kl, *losses]).cpu()
    return sums
