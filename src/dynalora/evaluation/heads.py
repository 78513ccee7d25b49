"""The kinds of models that tasks take, told apart by their last layer: what loads one, and how PEFT calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from dynalora.evaluation.seq2seq import is_encoder_decoder


@dataclass(frozen=True)
class Head:
    """A kind of model.

    Attributes:
        model_class: What follows `AutoModelFor` in the name of the class of transformers that loads such a model.
        description: What it is, in the singular.
        plural: The same in the plural.
        task_type: PEFT's name of what such a model does.
        encoder_decoder: Whether it is an encoder-decoder; None: it may be.
        new: What the last layer is called where no pre-trained model has it, so that it is trained with the adapter;
            empty: pre-trained models have it.
        labelled: Whether the last layer has as many outputs as the task has classes.
        learns_prompts: Whether adapters that learn virtual tokens alone can be measured with it.
        retained: Which tasks show what such a model has kept of its pre-training, in words.
    """

    model_class: str
    description: str
    plural: str
    task_type: str
    encoder_decoder: bool | None = None
    new: str = ""
    labelled: bool = False
    learns_prompts: bool = True
    retained: str = "masked-LM perplexity (wikitext2_masked)"

    def fits(self, model: torch.nn.Module) -> bool:
        """Whether a model, with or without adapter, is of this kind."""
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        name = type(base).__name__
        if self.encoder_decoder is None:
            return self.model_class in name
        return is_encoder_decoder(base) == self.encoder_decoder and not any(other in name for other in _OTHER_CLASSES)


_OTHER_CLASSES = (
    "SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "MultipleChoice",
)  # fmt: skip

CAUSAL_LM = Head(
    "CausalLM", "a causal language model", "causal language models", "CAUSAL_LM", encoder_decoder=False,
    retained="tasks of language models",
)  # fmt: skip
SEQ2SEQ_LM = Head(
    "Seq2SeqLM", "an encoder-decoder", "encoder-decoders", "SEQ_2_SEQ_LM", encoder_decoder=True, learns_prompts=False,
    retained="benchmarks that are answered by generation",
)  # fmt: skip
LANGUAGE_MODELS = (CAUSAL_LM, SEQ2SEQ_LM)
MASKED_LM = Head("MaskedLM", "a masked language model", "masked language models", "FEATURE_EXTRACTION")
CLASSIFIER = Head(
    "SequenceClassification", "a model with a classification head", "models that classify texts", "SEQ_CLS",
    new="classification", labelled=True,
)  # fmt: skip
MARKER = Head(
    "QuestionAnswering", "a model with a question-answering head", "models that mark answers", "QUESTION_ANS",
    new="question-answering", learns_prompts=False,
)  # fmt: skip


ALL_HEADS = (CAUSAL_LM, SEQ2SEQ_LM, MASKED_LM, CLASSIFIER, MARKER)
"""All kinds."""


def head_of(config: Any, heads: Sequence[Head]) -> Head | None:
    """The first of several kinds of models that a model with this configuration can be; None: none of them."""
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    return next((head for head in heads if head.encoder_decoder in (None, encoder_decoder)), None)


def common_heads(needs: Sequence[Sequence[Head]]) -> tuple[Head, ...]:
    """The kinds of models that serve several tasks at once.

    Args:
        needs: For each task the kinds of models that serve it; at least one task.

    Returns:
        Those that serve all, in the order of the first task's; empty: none does.
    """
    return tuple(head for head in needs[0] if all(head in heads for heads in needs))


def described(heads: Sequence[Head]) -> str:
    """Kinds of models in words, with the classes that load them."""
    return " or ".join(f"{head.description} (AutoModelFor{head.model_class})" for head in heads)
