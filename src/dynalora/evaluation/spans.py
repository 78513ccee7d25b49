"""Extractive question answering: a model marks its answer in a passage, or says that the passage has none.

A question-answering head gives every token of the input two numbers, a score as the first token of the answer and one
as its last (Devlin et al., 2019, sections 4.2 and 4.3). Both training and answering need to know which token of the
input is which character of the passage.

**Windows.** A passage that does not fit into the model's input together with its question is read in several windows,
which overlap by up to 128 tokens. A window that does not hold the whole answer is trained on as one without answer.

**Answers.** The score of a possible answer is the sum of its two numbers. "No answer" is marked at the window's
`[CLS]` token (or the first token where there is none), and its score is the sum of that token's two numbers. Over all
windows of a question the best answer is compared with the lowest score of "no answer", and the better of the two is
the model's answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from dynalora.common.devices import device_of
from dynalora.common.progress import Progress, silent
from dynalora.errors import ConfigError
from dynalora.evaluation.generation import batches_by_length, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynalora.evaluation.kinds.base import Example

LONGEST_QUESTION = 64
"""Tokens of a question, as in BERT's own script; longer ones lose their end."""
LONGEST_ANSWER = 30
"""Tokens of an answer, as in BERT's own script."""
_OVERLAP = 128
_AT_ONCE = 256  # questions, so that not all windows of a large set are in memory


@dataclass(frozen=True)
class Window:
    """A question with a part of its passage.

    Attributes:
        item: Index of the question.
        inputs: Token ids and what else the model takes, one number per token.
        places: Per token its characters in the passage, (first, one behind the last); None for all else.
        silence: Index of the token that stands for "no answer".
        marks: Indices of the answer's first and last token; both `silence` where the window does not hold all of it.
        cut: Whether the question was longer than 64 tokens (or half a window) and lost its end.
    """

    item: int
    inputs: Mapping[str, list[int]]
    places: tuple[tuple[int, int] | None, ...]
    silence: int
    marks: tuple[int, int]
    cut: bool = False

    def training_row(self) -> dict[str, Any]:
        """What a model with a question-answering head trains on."""
        return {**self.inputs, "start_positions": self.marks[0], "end_positions": self.marks[1]}


def read_windows(tokenizer: PreTrainedTokenizerBase, items: Sequence[Example], max_length: int) -> Iterator[Window]:
    """Questions with their passages as a model reads them, in the order of the items.

    Args:
        tokenizer: A fast one, which knows where its tokens lie in the text.
        items: Question (`prompt`), passage (`second`), and the answer's place in it (`span`; None: no answer).
        max_length: Tokens of a window.

    Raises:
        ConfigError: The tokenizer does not know where its tokens lie, or a window has no room for a passage.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} does not tell where its tokens lie in a text, which marking answers needs; "
            "load the fast tokenizer of the model."
        )
    special = tokenizer.num_special_tokens_to_add(pair=True)
    longest = min(LONGEST_QUESTION, (max_length - special) // 2)
    if longest < 1:
        raise ConfigError(f"A window of {max_length} tokens has no room for a question and a passage; give more.")
    for begin in range(0, len(items), _AT_ONCE):
        part = range(begin, min(begin + _AT_ONCE, len(items)))
        offsets = tokenizer(
            [items[index].prompt for index in part], add_special_tokens=False, return_offsets_mapping=True
        )["offset_mapping"]
        by_overlap: dict[int, list[tuple[int, str, bool]]] = {}
        for index, tokens in zip(part, offsets, strict=True):
            cut = len(tokens) > longest
            question = items[index].prompt[: tokens[longest - 1][1]] if cut else items[index].prompt
            room = max_length - special - min(len(tokens), longest)
            by_overlap.setdefault(min(_OVERLAP, room // 2), []).append((index, question, cut))
        groups = [_windows(tokenizer, items, group, max_length, overlap) for overlap, group in by_overlap.items()]
        yield from sorted(itertools.chain.from_iterable(groups), key=lambda window: window.item)


def _windows(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Example],
    questions: Sequence[tuple[int, str, bool]],
    max_length: int,
    overlap: int,
) -> Iterator[Window]:
    """The windows of items, each given with its question and whether that lost its end, at one overlap."""
    encoded = tokenizer(
        [question for _, question, _ in questions], [items[index].second for index, *_ in questions],
        truncation="only_second", max_length=max_length, stride=overlap, return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )  # fmt: skip
    names = [name for name in encoded if name not in ("offset_mapping", "overflow_to_sample_mapping")]
    for number, sample in enumerate(encoded["overflow_to_sample_mapping"]):
        index, _, cut = questions[sample]
        of_passage = [part == 1 for part in encoded.sequence_ids(number)]
        places = tuple(
            (int(first), int(behind)) if inside and behind > first else None
            for inside, (first, behind) in zip(of_passage, encoded["offset_mapping"][number], strict=True)
        )
        inputs = {name: list(encoded[name][number]) for name in names}
        ids, first = inputs["input_ids"], tokenizer.cls_token_id
        silence = ids.index(first) if first in ids else 0
        yield Window(index, inputs, places, silence, _marks(places, items[index].span, silence), cut)


def _marks(places: Sequence[tuple[int, int] | None], span: tuple[int, int] | None, silence: int) -> tuple[int, int]:
    """The tokens in which an answer's first and last character lie, if both do in this window."""
    if span is None:
        return silence, silence
    first, last = span[0], span[1] - 1
    starts = [index for index, place in enumerate(places) if place and place[0] <= first < place[1]]
    ends = [index for index, place in enumerate(places) if place and place[0] <= last < place[1]]
    return (starts[0], ends[-1]) if starts and ends else (silence, silence)


@dataclass(frozen=True)
class Marked:
    """What a model says to questions about passages.

    Attributes:
        answers: Words of the passage, or empty for no answer.
        losses: Per question, negative log-likelihood of the right answer's start and of its end, their mean over both
            and over the question's windows; what training minimises.
        cut: How many questions lost their end.
    """

    answers: list[str]
    losses: list[float]
    cut: int


def mark_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Example],
    *,
    max_length: int,
    batch_size: int = 16,
    what: str = "Answering",
    progress: Progress = silent,
) -> Marked:
    """Answer questions by marking words of their passages.

    Args:
        model: With a question-answering head; left in the mode it was in.
        tokenizer: The model's.
        items: Question (`prompt`), passage (`second`) and the right answer's place (`span`).
        max_length: Tokens of a window.
        batch_size: Windows per batch.
        what: Description given to `progress`.
        progress: Called with the number of windows done.

    Raises:
        ConfigError: As [`read_windows`][dynalora.evaluation.spans.read_windows], or the tokenizer has no padding token.
    """
    windows = list(read_windows(tokenizer, items, max_length))
    if tokenizer.pad_token_id is None and batch_size > 1:
        raise ConfigError("The tokenizer has no padding token, which batches need; set it, or take batch_size 1.")
    device = device_of(model)
    best = [(float("-inf"), "")] * len(items)
    silence = [float("inf")] * len(items)
    losses: list[list[float]] = [[] for _ in items]
    with evaluating(model), torch.inference_mode():
        for batch in batches_by_length([len(window.places) for window in windows], batch_size, what, progress):
            rows = [dict(windows[index].inputs) for index in batch]
            inputs = tokenizer.pad(rows, padding=len(batch) > 1, padding_side="right", return_tensors="pt").to(device)
            said = model(**inputs)
            starts, ends = (part.float().cpu() for part in (said.start_logits, said.end_logits))
            for row, index in enumerate(batch):
                window = windows[index]
                length = len(window.places)
                start, end = starts[row, :length], ends[row, :length]
                nats = [float(F.cross_entropy(start, torch.tensor(window.marks[0])))]
                nats.append(float(F.cross_entropy(end, torch.tensor(window.marks[1]))))
                losses[window.item].append(sum(nats) / 2)
                silence[window.item] = min(silence[window.item], float(start[window.silence] + end[window.silence]))
                worth, place = _best(start, end, window.places)
                if place is not None and worth > best[window.item][0]:
                    best[window.item] = worth, items[window.item].second[slice(*place)].strip()
    answers = [text if worth > none else "" for (worth, text), none in zip(best, silence, strict=True)]
    cut = len({window.item for window in windows if window.cut})
    return Marked(answers, [sum(of_question) / len(of_question) for of_question in losses], cut)


def _best(
    start: torch.Tensor, end: torch.Tensor, places: Sequence[tuple[int, int] | None]
) -> tuple[float, tuple[int, int] | None]:
    """The worth of the best answer of up to 30 tokens of the passage, and its characters."""
    inside = torch.tensor([place is not None for place in places])
    none = torch.tensor(float("-inf"))
    worth = torch.where(inside, start, none)[:, None] + torch.where(inside, end, none)[None, :]
    length = torch.arange(len(places))
    length = length[None, :] - length[:, None]  # of an answer less one
    worth = torch.where((length >= 0) & (length < LONGEST_ANSWER), worth, none)
    at = int(worth.argmax())
    first, last = places[at // len(places)], places[at % len(places)]
    if first is None or last is None:  # a window without a token of the passage
        return float("-inf"), None
    return float(worth.flatten()[at]), (first[0], last[1])
