"""Tasks with a training set and a held-out set, generated from fixed seeds by reasoning-gym.

Item i of reasoning-gym's seed s is item i − 1 of its seed s + 1: neighbouring seeds give nearly the same questions.
The two sets are therefore drawn from seeds that lie farther apart than any set is long, every question is used once,
and that no held-out question is also a training question is checked again at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dynalora.common.extras import require
from dynalora.common.names import did_you_mean
from dynalora.errors import ConfigError, DataError, check_least

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

SEED_DISTANCE = 10_000_000
"""Distance between the seeds of the training and the held-out set, and between two runs' seeds: no set is as long."""

_MOST_DRAWS = 1_000_000


@dataclass(frozen=True)
class Item:
    """One question with its one right answer."""

    question: str
    answer: str

    def conversation(self, system: str = "") -> list[Any]:
        """The item as chat messages: the question from the user, the answer from the assistant.

        Args:
            system: A system message before both; empty: none, so that a chat template may add its own.
        """
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True)
class Task:
    """A generated task.

    Attributes:
        name: Reasoning-gym's name of it.
        options: The generator's options that differ from its defaults.
        seed: What both sets were made from.
        train: The training items, no question twice.
        held_out: The held-out items, no question twice and none that is in `train`.
    """

    name: str
    options: Mapping[str, Any]
    seed: int
    train: tuple[Item, ...]
    held_out: tuple[Item, ...] = field(repr=False)

    @property
    def majority(self) -> float:
        """Held-out accuracy of always giving the training set's most frequent answer: the floor to compare with."""
        most, _ = Counter(item.answer for item in self.train).most_common(1)[0]
        return sum(item.answer == most for item in self.held_out) / len(self.held_out)


def load_task(
    name: str, *, train_size: int, held_out_size: int, seed: int = 0, options: Mapping[str, Any] | None = None
) -> Task:
    """Generate a task's training and held-out sets.

    Args:
        name: A task of reasoning-gym, such as `"family_relationships"`.
        train_size: Number of training items.
        held_out_size: Number of held-out items.
        seed: Equal seeds give equal sets; different seeds give different ones.
        options: Options of the task's generator, such as `{"max_words": 5}`.

    Returns:
        The task. The held-out set depends on `seed` and `options` alone, not on `train_size`.

    Raises:
        ConfigError: An unknown task, a size below 1, a negative seed, or options the generator rejects.
        DataError: The generator has too few different questions for the two sets.
        UnsupportedError: Reasoning-gym is not installed.
    """
    for what, size in (("train_size", train_size), ("held_out_size", held_out_size)):
        if not 1 <= size <= _MOST_DRAWS:
            raise ConfigError(f"{what} is {size}; give a number from 1 to {_MOST_DRAWS}.")
    check_least(0, seed=seed)
    options = dict(options or {})
    first = 2 * SEED_DISTANCE * seed
    held_out = _draw(name, options, first + SEED_DISTANCE, held_out_size, set())
    train = _draw(name, options, first, train_size, {_key(item.question) for item in held_out})
    check_disjoint(train, held_out)
    return Task(name, options, seed, tuple(train), tuple(held_out))


def task_names() -> list[str]:
    """Names of all tasks that the installed reasoning-gym can generate.

    Raises:
        UnsupportedError: Reasoning-gym is not installed.
    """
    _reasoning_gym()
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def check_disjoint(train: Sequence[Item], held_out: Sequence[Item]) -> None:
    """Make sure that no question occurs twice, within a set or across both.

    Questions that differ only in case or white space count as the same.

    Raises:
        DataError: One does; the sentence quotes it.
    """
    seen: dict[str, str] = {}
    for where, items in (("training", train), ("held-out", held_out)):
        for item in items:
            key = _key(item.question)
            if key in seen:
                also = f"twice in the {where} set" if seen[key] == where else "in the training and the held-out set"
                raise DataError(f"The question {item.question[:80]!r} is {also}; draw the sets from distant seeds.")
            seen[key] = where


def _key(question: str) -> str:
    return " ".join(question.split()).casefold()


def _draw(name: str, options: Mapping[str, Any], seed: int, size: int, taken: set[str]) -> list[Item]:
    """The first `size` items of a seed whose questions are not in `taken` and not repeated."""
    seen = set(taken)
    items: list[Item] = []
    draws = 0
    for item in _items(_dataset(name, options, seed)):
        draws += 1
        key = _key(item.question)
        if key not in seen:
            seen.add(key)
            items.append(item)
        if len(items) == size:
            return items
        if draws >= 50 * size + 1000:
            break
    raise DataError(
        f"The task '{name}' has only {len(items)} different questions in {draws} draws where {size} are needed; "
        "ask for fewer items, or set options that allow more questions."
    )


def _items(dataset: ProceduralDataset) -> Iterator[Item]:
    for index in range(min(len(dataset), _MOST_DRAWS)):
        entry = dataset[index]
        yield Item(str(entry["question"]).strip(), str(entry["answer"]).strip())


def _dataset(name: str, options: Mapping[str, Any], seed: int) -> ProceduralDataset:
    gym = _reasoning_gym()
    names = task_names()
    if name not in names:
        raise ConfigError(f"There is no task '{name}'; {did_you_mean(name, names, brief=True)}.")
    for reserved in ("seed", "size"):
        if reserved in options:
            raise ConfigError(f"The task option '{reserved}' is set by load_task itself; use its arguments instead.")
    try:
        dataset: ProceduralDataset = gym.create_dataset(name, seed=seed, size=_MOST_DRAWS, **options)
    except (TypeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"The task '{name}' rejects the options {dict(options)} ({reason}).") from error
    return dataset


def _reasoning_gym() -> Any:
    return require("reasoning_gym", "A generated task", "demo")
