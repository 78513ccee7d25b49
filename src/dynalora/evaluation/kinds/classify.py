"""Texts, alone or in pairs, that a model with a classification head puts into classes, or values."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from dynalora.common.devices import device_of
from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError
from dynalora.evaluation.generation import batches_by_length, evaluating
from dynalora.evaluation.heads import CLASSIFIER
from dynalora.evaluation.kinds.base import Benchmark, Example, Measuring, Prepared, Subject
from dynalora.evaluation.kinds.encoder import EncoderKind, Outcome
from dynalora.evaluation.tasks import Item
from dynalora.evaluation.tokens import TokenizedSet, Tokens
from dynalora.evaluation.windows import model_window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LONGEST = 512


class ClassifyKind(EncoderKind):
    """Classification; with one label, a value, whose loss is its squared error and of which none is simply right."""

    heads = (CLASSIFIER,)
    noun = "classification"

    def item(self, example: Example) -> Item:
        return Item(example.prompt, str(example.reference))

    def training(
        self, task: Benchmark, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, system: str = "",
        max_length: int = 512,
    ) -> TokenizedSet:  # fmt: skip
        """The texts as token ids with their class; longer ones lose their end."""
        rows, cut = [], 0
        for example in examples:
            inputs = tokenizer(example.prompt, example.second or None, truncation=True, max_length=max_length)
            cut += len(inputs["input_ids"]) >= max_length
            label = float(example.reference) if task.labels == 1 else int(example.reference)
            rows.append({**inputs, "labels": label})
        return TokenizedSet(cast("list[Tokens]", rows), cut, 0)

    def outcome(self, subject: Subject, prepared: Prepared, how: Measuring, what: str) -> Outcome:
        logits, cut = class_logits(
            subject.model,
            subject.tokenizer,
            prepared.items,
            batch_size=how.batch_size,
            what=what,
            progress=subject.progress,
        )
        predicted: list[Any] = classes(logits)
        references = [item.reference for item in prepared.items]
        if prepared.task.labels == 1:
            values = torch.tensor([float(reference) for reference in references])
            return Outcome(predicted, ((logits[:, 0] - values) ** 2).tolist(), too_long=cut)
        labels = [int(reference) for reference in references]
        losses = F.cross_entropy(logits, torch.tensor(labels), reduction="none").tolist()
        correct = [answer == label for answer, label in zip(predicted, labels, strict=True)]
        return Outcome(predicted, losses, correct, too_long=cut)


def class_logits(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Example],
    *,
    batch_size: int = 16,
    what: str = "Classifying",
    progress: Progress = silent,
) -> tuple[torch.Tensor, int]:
    """What a model with a classification head says of every text.

    Texts longer than the model's window lose their end.

    Args:
        model: Left in the mode it was in.
        tokenizer: The model's.
        items: With one text or two.
        batch_size: Items per batch.
        what: Description given to `progress`.
        progress: Called with the number of items done.

    Returns:
        Logits (items, classes), or (items, 1) of a regression, float32 on the CPU; and how many texts were cut.

    Raises:
        ConfigError: The tokenizer has no padding token and batches have more than one item.
    """
    if tokenizer.pad_token_id is None and batch_size > 1:
        raise ConfigError(
            "The tokenizer has no padding token, which classification in batches needs; set tokenizer.pad_token and "
            "the model's config.pad_token_id, or take batch_size 1."
        )
    room = min(model_window(model, tokenizer), _LONGEST)
    lengths = [len(tokenizer(item.prompt, item.second or None)["input_ids"]) for item in items]
    cut = sum(length > room for length in lengths)
    if cut:
        logger.warning("%d of %d texts are longer than %d tokens and lose their end.", cut, len(items), room)
    device = device_of(model)
    rows: dict[int, torch.Tensor] = {}
    with evaluating(model), torch.inference_mode():
        for batch in batches_by_length(lengths, batch_size, what, progress):
            texts: Any = [[items[i].prompt for i in batch]]
            if items[batch[0]].second:
                texts.append([items[i].second for i in batch])
            inputs = tokenizer(
                *texts, truncation=True, max_length=room, padding=len(batch) > 1, return_tensors="pt"
            ).to(device)
            rows |= zip(batch, model(**inputs).logits.float().cpu(), strict=True)
    return torch.stack([rows[index] for index in range(len(items))]), cut


def classes(logits: torch.Tensor) -> list[int] | list[float]:
    """The likeliest class of every row of logits (items, classes), or the value itself where there is one output."""
    return logits[:, 0].tolist() if logits.shape[-1] == 1 else logits.argmax(-1).tolist()


CLASSIFY = ClassifyKind()
