"""The sandbox's parts by themselves: what crosses between a program and its tests, and which files count."""

from __future__ import annotations

import copy
import decimal
import fractions
import json
import os
import socket
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynalora.evaluation.sandbox_calls import Line, NoAnswerError, Remote, decode, encode, run_tests, serve
from dynalora.evaluation.sandbox_disk import Disk

ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=9), st.binary(max_size=9),
    st.complex_numbers(allow_nan=False), st.fractions(), st.decimals(allow_nan=False),
    st.binary(max_size=4).map(bytearray),
)  # fmt: skip
KEYS = st.one_of(st.integers(), st.text(max_size=4), st.tuples(st.integers(), st.text(max_size=2)))
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.lists(inner, max_size=3).map(deque),
        st.dictionaries(KEYS, inner, max_size=3), st.sets(KEYS, max_size=3), st.frozensets(KEYS, max_size=3),
    ),
    max_leaves=8,
)  # fmt: skip
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(),
        st.sampled_from(["object", "dict", "list", "type", "range", "Fraction", "Decimal", "iterator", "keys", "int"]),
        st.text(max_size=4),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=10,
)  # fmt: skip
OWN = (
    type(None), bool, int, float, str, bytes, bytearray, complex, list, tuple, set, frozenset, dict, deque, range, type,
    fractions.Fraction, decimal.Decimal, Remote, type({}.keys()), type({}.values()), type({}.items()), type(iter([])),
)  # fmt: skip


def never(value: Any) -> Any:
    raise AssertionError(f"{value!r} is no object")


def kinds(value: Any) -> set[type]:
    """The types of a value and of all that it holds."""
    if isinstance(value, dict):
        inside = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inside = list(value)
    else:
        inside = []
    return {type(value)}.union(*map(kinds, inside))


@settings(max_examples=300, deadline=None)
@given(value=VALUES)
def test_values_cross_as_what_they_are(value: Any) -> None:
    crossed = decode(json.loads(json.dumps(encode(value, never))), never)
    assert crossed == value
    assert kinds(crossed) == kinds(value)


@pytest.mark.parametrize("kind", [int, float, str, bytes, list, tuple, dict, set, frozenset, deque, complex])
def test_a_value_that_equals_everything_loses_that_on_the_way(kind: type) -> None:
    def always(self: Any, other: Any) -> bool:
        return True

    made = type("E", (kind,), {"__eq__": always, "__ne__": lambda self, other: False, "__hash__": lambda self: 0})()
    crossed = decode(encode(made, never), never)
    assert type(crossed) is kind
    assert crossed != "wanted"


@settings(max_examples=500, deadline=None)
@given(message=JSON)
def test_whatever_a_program_sends_arrives_as_values_of_pythons_own_or_not_at_all(message: Any) -> None:
    try:
        value = decode(message, lambda number: Remote(never, number))
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return
    assert kinds(value) <= set(OWN)


def judge(tests: str, program: Any) -> BaseException | None:
    """What tests raise against a program, a function of the socket at its end."""
    one, other = socket.socketpair()
    thread = threading.Thread(target=program, args=(other,))
    with one, other:
        thread.start()
        try:
            run_tests("", tests, ["f"], Line(one.fileno()))
        except BaseException as error:
            return error
        finally:
            one.shutdown(socket.SHUT_RDWR)
            thread.join()
    return None


def honest(end: socket.socket) -> None:
    serve({"f": lambda x: 2 * x}, Line(end.fileno()))


def test_tests_and_program_over_a_line() -> None:
    assert judge("assert f(3) == 6 and f([1]) == [1, 1]", honest) is None
    assert isinstance(judge("assert f(3) == 7", honest), AssertionError)
    assert isinstance(judge("f(None)", honest), TypeError)


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
def test_an_answer_does_not_end_a_loop_of_the_tests(kind: type[Exception]) -> None:
    def ending(x: int) -> None:
        raise kind

    for tests in ("assert all(a == b for a, b in zip(map(f, [1, 2]), [3, 4]))", "assert list(map(f, [1])) == []"):
        error = judge(tests, lambda end: serve({"f": ending}, Line(end.fileno())))
        assert isinstance(error, RuntimeError)


@settings(max_examples=60, deadline=None)
@given(
    answers=st.lists(st.one_of(JSON, JSON.map(lambda value: ["value", value])), max_size=4), junk=st.binary(max_size=20)
)
def test_no_answers_pass_for_the_right_one(answers: list[Any], junk: bytes) -> None:
    def hostile(end: socket.socket) -> None:
        text = b"".join(json.dumps(answer).encode() + b"\n" for answer in answers) + junk
        try:
            end.sendall(text)
            end.shutdown(socket.SHUT_WR)
        except OSError:
            return

    for tests in ("assert f(2) == 51234", "assert not f(2) != 51234", "assert 51234 in [f(2)]"):
        assert judge(tests, hostile) is not None


@pytest.mark.parametrize("message", [["raised", "KeyboardInterrupt", ""], ["raised", "SystemExit", "0"], ["done"], 3])
def test_a_program_cannot_end_its_tests(message: Any) -> None:
    def ending(end: socket.socket) -> None:
        for answer in (["value", ["object", 0]], message):
            end.sendall(json.dumps(answer).encode() + b"\n")

    error = judge("f(2)", ending)
    assert isinstance(error, (RuntimeError, NoAnswerError))


def test_files_count_by_their_size_and_by_their_number(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path), 20_000, 1000)
    assert not disk.exceeded()
    (tmp_path / "a").write_bytes(b"x" * 15_000)
    assert not disk.exceeded()
    for index in range(3):  # empty ones take a block each
        (tmp_path / f"empty {index}").touch()
    assert disk.exceeded()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's watches on files are Linux's")
def test_removed_files_count_until_nobody_holds_them(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path), 20_000, 10_000)
    disk.listen(os.open(os.devnull, os.O_RDONLY))
    try:
        held = [open(tmp_path / str(index), "w") for index in range(2)]  # noqa: SIM115
        disk._watch_all()  # as it is done before the program may remove one
        for index in range(2):
            os.unlink(tmp_path / str(index))
        assert disk.exceeded()
        held.pop().close()
        assert not disk.exceeded()
        held.pop().close()
        assert disk._removed() == 0
    finally:
        disk.close()


def test_a_program_is_not_asked_for_protocols_of_libraries() -> None:
    """NumPy would read the memory at an address that the program gives it."""
    asked: list[str] = []

    def ask(what: str, number: int, *args: Any, **kwargs: Any) -> Any:
        asked.append(str(args[0]) if args else what)
        if what == "getattr" and args[0] == "__array_interface__":
            return {"version": 3, "shape": (1,), "typestr": "<i8", "data": (0, False)}
        return {"len": 2, "iter": [7, 7], "getattr": "f"}.get(what, 7)

    made = Remote(ask, 0)
    assert numpy.asarray(made).tolist() == [7, 7]
    assert copy.deepcopy(made) is not None
    assert [name for name in asked if name.startswith("__")] == []
    assert made.__name__ == made.size == "f"
