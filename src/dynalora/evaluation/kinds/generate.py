"""Questions whose answers are generated and scored by metrics."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from dynalora.evaluation.generation import chat_prompt, generate
from dynalora.evaluation.heads import LANGUAGE_MODELS, Head
from dynalora.evaluation.kinds.base import Benchmark, Measuring, Prepared, Subject
from dynalora.evaluation.kinds.text import TextKind, right_answers
from dynalora.evaluation.results import TaskResult, TaskScore
from dynalora.evaluation.seq2seq import is_encoder_decoder, shortened
from dynalora.evaluation.windows import fitting

logger = logging.getLogger(__name__)


class GenerateKind(TextKind):
    """Questions whose answers are generated.

    Attributes:
        strip: Whether white space around an answer is removed.
        right_or_wrong: Names of numbers that say of every answer whether it is right.
    """

    heads: ClassVar[tuple[Head, ...]] = LANGUAGE_MODELS
    strip: ClassVar[bool] = True
    right_or_wrong: ClassVar[tuple[str, ...]] = ("accuracy", "strict", "pass@1")

    def judged(self, subject: Subject, prepared: Prepared, answers: Sequence[str]) -> Sequence[Any]:
        """What the metrics compare with the references, one per answer."""
        return answers

    def measure(self, subject: Subject, prepared: Prepared, how: Measuring) -> TaskResult:
        answers, too_long = self._answers(subject, prepared, how)
        return prepared.scored(self.judged(subject, prepared, answers), answers=answers, too_long=too_long)

    def score(self, subject: Subject, prepared: Prepared, how: Measuring) -> TaskScore:
        """The loss of all right answers, and the metrics of as many generated ones as `how` says."""
        task = prepared.task
        items = [self.item(example) for example in prepared.items]
        losses, too_long = right_answers(items, subject, task.name, how)
        asked = prepared.items[: 0 if how.losses_only else how.generated]
        if not asked:
            return TaskScore.of((), losses.sums, losses.counts, too_long=too_long)
        result = self.measure(subject, replace(prepared, items=asked), how)
        accuracy = result.main if self._says_right(task) else None
        correct = [bool(value) for value in result.values[accuracy]] if accuracy else []
        others = {name: interval.value for name, interval in result.scores.items() if name != accuracy}
        return TaskScore.of(correct, losses.sums, losses.counts, others, too_long=too_long)

    def _says_right(self, task: Benchmark) -> bool:
        """Whether the number that stands for the task says of every answer whether it is right."""
        first = task.metrics[0] if task.metrics else None
        return first is not None and first.items is not None and first.names[0] in self.right_or_wrong

    def _answers(self, subject: Subject, prepared: Prepared, how: Measuring) -> tuple[list[str], int]:
        """What the model says to each item, and how many items were too long to be asked, or to be asked in full."""
        task, items, model, tokenizer = prepared.task, prepared.items, subject.model, subject.tokenizer
        longest = task.max_new_tokens if how.generated_tokens is None else how.generated_tokens
        prompts = []
        for item in items:
            ids = chat_prompt(tokenizer, item.prompt, how.system)
            if item.prefix:
                ids += list(tokenizer(item.prefix, add_special_tokens=False)["input_ids"])
            prompts.append(ids)
        room = subject.room()
        too_long = 0
        if is_encoder_decoder(model):
            # Its answer has a window of its own, and of a long text the beginning is read, as everybody does.
            too_long = sum(len(ids) > room for ids in prompts)
            if too_long:
                logger.warning(
                    "%d of %d prompts of %s are longer than the model's window of %d tokens and lose their end.",
                    too_long, len(prompts), task.title, room,
                )  # fmt: skip
            prompts = [shortened(ids, room) for ids in prompts]
        else:
            room -= longest
        fits = fitting([len(ids) for ids in prompts], room, task.title)
        texts = generate(
            model, tokenizer, [prompts[index] for index in fits], max_new_tokens=longest, batch_size=how.batch_size,
            beams=how.beams, stop=task.stop, strip=self.strip, what=f"{task.title}: {subject.name}",
            progress=subject.progress,
        )  # fmt: skip
        answers = [""] * len(items)
        for index, text in zip(fits, texts, strict=True):
            answers[index] = text
        return answers, too_long + len(items) - len(fits)


GENERATE = GenerateKind()
