"""Questions with listed options, answered by likelihood: the option that the model finds likeliest is its answer.

With x a question in the model's chat format and o an option of n tokens

    log p(o | x) = Σ_t log p(o_t | x, o_<t)        raw, in nats
    log p(o | x) / n                               normalised, in nats per token

and the model answers right if the right option has the largest of these. The raw sum favours short options, the
normalised one does not, so both are given. The token that ends the turn is not part of an option: whether a model
would stop there says little about which option it holds for true.

Small models can be measured so that cannot follow "answer with the letter", and nothing has to be generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from dynalora.common.devices import device_of
from dynalora.common.names import IGNORED_LABEL
from dynalora.common.progress import Progress, silent
from dynalora.common.statistics import Estimate, Interval, ratio, wilson
from dynalora.errors import DataError, UnsupportedError, check_least
from dynalora.evaluation.causal import causal_pass
from dynalora.evaluation.generation import batches_by_length, chat_prompt, evaluating, padding_id
from dynalora.evaluation.padding import padded
from dynalora.evaluation.scoring import AnswerLoss, answer_loss
from dynalora.evaluation.tasks import Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Choice:
    """A question with its options, one of them right.

    Attributes:
        question: As it is put to the model; it does not list the options.
        options: The options' texts, at least two, none empty.
        right: Index of the right one.

    Raises:
        DataError: Fewer than two options, an empty one or an empty question, or `right` names none of them.
    """

    question: str
    options: tuple[str, ...]
    right: int

    def __post_init__(self) -> None:
        problem = choice_problem(self.question, self.options, self.right)
        if problem is not None:
            raise DataError(f"{problem[0].upper()}{problem[1:]}.")

    @property
    def item(self) -> Item:
        """The question with the right option's text as its answer, for training."""
        return Item(self.question, self.options[self.right])


def choice_problem(question: str, options: Sequence[str], right: int) -> str | None:
    """What is wrong with a question and its options, and what to do about it, as part of a sentence; None: nothing."""
    if not question.strip():
        return "the question is empty; give its text"
    if len(options) < 2:
        return f"the question has {len(options)} options; give at least two"
    for number, option in enumerate(options, start=1):
        if not option.strip():
            return f"option {number} is empty; give its text"
    if not 0 <= right < len(options):
        return f"the right option has index {right}; give one from 0 to {len(options) - 1}"
    return None


@dataclass(frozen=True)
class OptionScores:
    """How likely a model finds each option of each question.

    Attributes:
        sums: Log-likelihoods in nats: one tuple per question, one number per option.
        counts: Numbers of tokens, likewise.
        right: For each question the index of the right option.
    """

    sums: tuple[tuple[float, ...], ...]
    counts: tuple[tuple[int, ...], ...]
    right: tuple[int, ...]

    def chosen(self, *, normalised: bool = True) -> tuple[int, ...]:
        """For each question the index of the likeliest option; of equally likely ones the first.

        Args:
            normalised: Compare log-likelihoods per token; False: their sums.
        """
        picked = []
        for sums, counts in zip(self.sums, self.counts, strict=True):
            values = [total / count for total, count in zip(sums, counts, strict=True)]
            picked.append(_first_largest(values if normalised else sums))
        return tuple(picked)

    def correct(self, *, normalised: bool = True) -> tuple[bool, ...]:
        """For each question whether the likeliest option is the right one."""
        chosen = self.chosen(normalised=normalised)
        return tuple(choice == right for choice, right in zip(chosen, self.right, strict=True))

    def accuracy(self, *, normalised: bool = True) -> Interval:
        """Share of questions answered right, with Wilson's 95 % interval."""
        correct = self.correct(normalised=normalised)
        return wilson(sum(correct), len(correct))

    @property
    def right_losses(self) -> tuple[float, ...]:
        """For each question the negative log-likelihood of the right option, in nats."""
        return tuple(-sums[right] for sums, right in zip(self.sums, self.right, strict=True))

    @property
    def right_counts(self) -> tuple[int, ...]:
        """For each question the number of tokens of the right option."""
        return tuple(counts[right] for counts, right in zip(self.counts, self.right, strict=True))

    @property
    def right_loss(self) -> Estimate:
        """Mean negative log-likelihood of the right option, in nats per question."""
        return ratio(self.right_losses, [1] * len(self.right))


def option_scores(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    choices: Sequence[Choice],
    *,
    share_prompt: bool = True,
    system: str = "",
    batch_size: int = 8,
    name: str = "the model",
    progress: Progress = silent,
) -> OptionScores:
    """Score every option of every question.

    A question is computed once and its keys and values are shared by all its options. Questions of similar length
    share a batch. Scores depend on the batching only as far as floating-point sums do.

    Args:
        model: A causal language model, with or without adapter. It is left in the mode (train or eval) it was in.
        tokenizer: The model's; without a chat template the bare question is the prompt.
        choices: The questions.
        share_prompt: False computes the prompt again with every option, which takes longer and needs no cache of keys
            and values.
        system: A system message before every question; empty: none, so that a chat template may add its own.
        batch_size: Questions per batch (options, if `share_prompt` is False).
        name: Of the model, for `progress`.
        progress: Called with the number of questions done (options, if `share_prompt` is False).

    Returns:
        The scores, in the order of the questions.

    Raises:
        ConfigError: Batch_size below 1.
        DataError: No questions, or a prompt or an option without any token.
        UnsupportedError: The model keeps no cache whose rows can be repeated, and `share_prompt` is True.
    """
    check_least(1, batch_size=batch_size)
    if not choices:
        raise DataError("There are no questions to measure on; give at least one.")
    prompts = [chat_prompt(tokenizer, choice.question, system) for choice in choices]
    options = [
        [list(tokenizer(option, add_special_tokens=False)["input_ids"]) for option in choice.options]
        for choice in choices
    ]
    for index, (prompt, listed) in enumerate(zip(prompts, options, strict=True)):
        if not prompt or not all(listed):
            raise DataError(f"Question {index} has a prompt or an option without any token; give it a text.")
    what = f"Measuring {name}"
    if share_prompt:
        padding = padding_id(model, tokenizer)
        sums = _shared(model, prompts, options, padding, batch_size, what, progress)
    else:
        sums = _apart(model, prompts, options, batch_size, what, progress)
    return OptionScores(
        tuple(sums),
        tuple(tuple(len(option) for option in listed) for listed in options),
        tuple(choice.right for choice in choices),
    )


def option_lengths(tokenizer: PreTrainedTokenizerBase, choices: Sequence[Choice], *, system: str = "") -> list[int]:
    """Tokens of every question with its longest option, as `option_scores` puts them."""
    return [
        len(chat_prompt(tokenizer, choice.question, system))
        + max(len(tokenizer(option, add_special_tokens=False)["input_ids"]) for option in choice.options)
        for choice in choices
    ]


def right_option_losses(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    choices: Sequence[Choice],
    *,
    system: str = "",
    batch_size: int = 8,
    name: str = "the model",
    progress: Progress = silent,
) -> AnswerLoss:
    """Negative log-likelihood of the right options alone: the `right_losses` of `option_scores`, to rounding.

    Args:
        model: A causal language model, with or without adapter.
        tokenizer: The model's.
        choices: The questions.
        system: A system message before every question.
        batch_size: Questions per batch.
        name: Of the model, for `progress`.
        progress: Called with the number of questions done.

    Raises:
        ConfigError: Batch_size below 1.
        DataError: No questions, or a prompt or a right option without any token.
    """
    rows = []
    for choice in choices:
        prompt = chat_prompt(tokenizer, choice.question, system)
        option = list(tokenizer(choice.options[choice.right], add_special_tokens=False)["input_ids"])
        rows.append({"input_ids": prompt + option, "labels": [IGNORED_LABEL] * len(prompt) + option})
    return answer_loss(model, rows, batch_size=batch_size, what=f"Measuring {name}", progress=progress)


def _apart(
    model: torch.nn.Module,
    prompts: Sequence[list[int]],
    options: Sequence[Sequence[list[int]]],
    batch_size: int,
    what: str,
    progress: Progress,
) -> list[tuple[float, ...]]:
    """Log-likelihoods with one sequence per option."""
    rows = [
        {"input_ids": prompt + option, "labels": [IGNORED_LABEL] * len(prompt) + option}
        for prompt, listed in zip(prompts, options, strict=True)
        for option in listed
    ]
    losses = iter(answer_loss(model, rows, batch_size=batch_size, what=what, progress=progress).sums)
    return [tuple(-next(losses) for _ in listed) for listed in options]


def _shared(
    model: torch.nn.Module,
    prompts: Sequence[list[int]],
    options: Sequence[Sequence[list[int]]],
    padding: int,
    batch_size: int,
    what: str,
    progress: Progress,
) -> list[tuple[float, ...]]:
    """Log-likelihoods with one sequence per question, whose cache the options then continue."""
    device = device_of(model)
    sums: list[tuple[float, ...]] = [()] * len(prompts)
    lengths = [len(prompt) + max(map(len, listed)) for prompt, listed in zip(prompts, options, strict=True)]
    with evaluating(model), torch.inference_mode():
        for batch in batches_by_length(lengths, batch_size, what, progress):
            tokens, mask = padded([prompts[index] for index in batch], padding, "left")
            rows = [option for index in batch for option in options[index]]
            owners = [place for place, index in enumerate(batch) for _ in options[index]]
            losses = _continuations(model, tokens.to(device), mask.to(device), rows, owners, padding)
            values = iter(losses.tolist())
            for index in batch:
                sums[index] = tuple(next(values) for _ in options[index])
    return sums


def _continuations(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    rows: Sequence[list[int]],
    owners: Sequence[int],
    padding: int,
) -> torch.Tensor:
    """Log-likelihoods (O,) of continuations of a batch of prompts.

    Args:
        model: In evaluation mode.
        tokens: The prompts, (B, T), padded on the left.
        mask: Where they are no padding, (B, T).
        rows: O continuations.
        owners: For each the row of `tokens` that it continues.
        padding: A token to pad with.
    """
    device = tokens.device
    owner = torch.tensor(owners, device=device)
    longest = max(map(len, rows))
    aims, present = (tensor.to(device) for tensor in padded(rows, padding, "right"))
    real = present.bool()
    logits, cache = causal_pass(model, tokens, mask, keep=1, use_cache=True)
    first = F.log_softmax(logits[:, -1].float(), dim=-1)
    total = first[owner, aims[:, 0]]
    if longest == 1:
        return total
    select = getattr(cache, "batch_select_indices", None)
    if select is None:
        raise UnsupportedError(
            f"The model ({type(model).__name__}) keeps no cache whose rows can be repeated; "
            "call option_scores with share_prompt=False."
        )
    select(owner)
    seen = torch.cat([mask[owner], real[:, :-1].to(mask.dtype)], dim=1)
    logits, _ = causal_pass(model, aims[:, :-1], seen, cache=cache, use_cache=True)
    scored = real[:, 1:]
    # Selected first, so that no float32 copy is made of logits behind an option's end.
    losses = torch.zeros(scored.shape, device=device)
    losses[scored] = F.cross_entropy(logits[scored].float(), aims[:, 1:][scored], reduction="none")
    return total - losses.sum(1)


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda place: values[place])
