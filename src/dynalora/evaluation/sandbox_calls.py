"""Calls from the tests of a program to the program, which runs in another process of the sandbox.

Tests that shared a process with what they test would have to trust it: it could read the right answers from their
variables, or return objects of its own making that compare equal to everything. Here only values cross, written
as JSON: numbers, texts, containers and what they hold. They arrive as Python's own types, whatever they were before.
Objects of other types stay where they are. The tests hold a number in their place, through which they can call them,
read and set attributes, iterate over them and so on, and get values; such an object is equal to nothing but itself.

Both sides run inside the walls, with the standard library only.
"""

from __future__ import annotations

import ast
import builtins
import collections
import decimal
import fractions
import importlib
import itertools
import json
import operator
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

_LONGEST_ITERATOR = 100_000

_DONE: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "getattr": getattr, "setattr": setattr, "getitem": operator.getitem, "setitem": operator.setitem,
    "len": len, "iter": iter, "str": str, "bool": bool,
}  # fmt: skip
_TOLD = ("__name__", "__qualname__", "__annotations__")  # the names with two underscores that a program is asked for
_ENDS = (StopIteration, StopAsyncIteration)
_PLAIN = (list, tuple, set, frozenset, collections.deque)
_VIEWS: dict[str, tuple[type, Callable[[list[Any]], Any]]] = {
    "keys": (type({}.keys()), lambda items: dict.fromkeys(items).keys()),
    "values": (type({}.values()), lambda items: dict(enumerate(items)).values()),
    "items": (type({}.items()), lambda items: dict(items).items()),
}


class NoAnswerError(BaseException):
    """The program's process has ended, or says what is no answer; no test can take it for an error of the program."""


class Line:
    """One end of the connection: a message is one line of JSON."""

    def __init__(self, handle: int) -> None:
        self._handle, self._rest = handle, b""

    def send(self, message: Any) -> None:
        """Send one message."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self._handle, data) :]

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: The other side is gone.
            ValueError: It sent something else.
        """
        pieces = [self._rest]
        while b"\n" not in pieces[-1]:
            piece = os.read(self._handle, 1 << 16)
            if not piece:
                raise EOFError
            pieces.append(piece)
        line, _, self._rest = b"".join(pieces).partition(b"\n")
        return json.loads(line)


def encode(value: Any, keep: Callable[[Any], Any]) -> Any:
    """A value as JSON; `keep` says what stands for objects of other types."""
    if value is None or type(value) in (bool, str, int, float):
        return value
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[encode(key, keep), encode(item, keep)] for key, item in value.items()]]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, fractions.Fraction):
        return ["Fraction", value.numerator, value.denominator]
    if isinstance(value, decimal.Decimal):
        return ["Decimal", str(value)]
    if isinstance(value, type) and value in vars(builtins).values():
        return ["type", value.__name__]
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return encode(value.item(), keep)
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
        return ["array", value.dtype.str, encode(value.tolist(), keep)]
    for name, (view, _) in _VIEWS.items():
        if isinstance(value, view):
            return [name, [encode(item, keep) for item in value]]  # type: ignore[attr-defined]
    for plain in _PLAIN:
        if isinstance(value, plain):
            return [plain.__name__, [encode(item, keep) for item in value]]
    return keep(value)


def decode(message: Any, known: Callable[[int], Any]) -> Any:
    """The value of which a message tells, of Python's own types; `known` gives the object of a number.

    Raises:
        ValueError: The message tells of none.
    """
    if message is None or isinstance(message, (bool, int, float, str)):
        return message
    match message:
        case ["object", int() as number]:
            return known(number)
        case ["complex", real, imaginary]:
            return complex(float(real), float(imaginary))
        case ["bytes" | "bytearray" as kind, str() as text]:
            return getattr(builtins, kind).fromhex(text)
        case ["dict", list() as pairs]:
            return {decode(key, known): decode(item, known) for key, item in pairs}
        case ["range", int() as start, int() as stop, int() as step]:
            return range(start, stop, step)
        case ["Fraction", int() as above, int() as below]:
            return fractions.Fraction(above, below)
        case ["Decimal", str() as text]:
            return decimal.Decimal(text)
        case ["type", str() as name] if isinstance(getattr(builtins, name, None), type):
            return getattr(builtins, name)
        case ["array", str() as dtype, items]:
            return _array(dtype, decode(items, known))
        case [str() as name, list() as items] if name in _VIEWS:
            return _VIEWS[name][1]([decode(item, known) for item in items])
        case ["iterator", list() as items]:
            return iter([decode(item, known) for item in items])
        case [str() as name, list() as items]:
            for kind in _PLAIN:
                if kind.__name__ == name:
                    return kind([decode(item, known) for item in items])
    raise ValueError("no value")


def _array(dtype: str, items: Any) -> Any:
    numpy: Any = sys.modules.get("numpy")
    return items if numpy is None else numpy.array(items, dtype=dtype)


# --- the program's side --------------------------------------------------------------------------------------


def serve(names: dict[str, Any], line: Line) -> None:
    """Do what the other side asks until it is gone.

    Args:
        names: The program's global names.
        line: The connection.
    """
    objects: list[Any] = []
    numbers: dict[int, int] = {}

    def keep(value: Any) -> Any:
        if hasattr(type(value), "__next__"):
            items = list(itertools.islice(value, _LONGEST_ITERATOR + 1))
            if len(items) > _LONGEST_ITERATOR:
                raise OverflowError("the iterator has too many items")
            return ["iterator", [encode(item, keep) for item in items]]
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return ["object", numbers[id(value)]]

    while True:
        try:
            what, subject, args, kwargs = line.receive()
        except EOFError:
            return
        try:
            if what == "global":
                if subject not in names:
                    raise NameError(f"name '{subject}' is not defined")
                result = names[subject]
            else:
                given = [decode(item, objects.__getitem__) for item in args]
                named = {name: decode(item, objects.__getitem__) for name, item in kwargs.items()}
                result = _DONE[what](objects[subject], *given, **named)
            line.send(["value", encode(result, keep)])
        except Exception as error:
            line.send(["raised", type(error).__name__, str(error)[:500]])


# --- the tests' side -----------------------------------------------------------------------------------------


class Remote:
    """An object of the program's; what one does with it is done there.

    Whether it equals or holds a value is decided here, so that the program is never told what is looked for.
    """

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        object.__setattr__(self, "_remote", (ask, number))

    def _do(self, what: str, *args: Any, **kwargs: Any) -> Any:
        ask, number = object.__getattribute__(self, "_remote")
        return ask(what, number, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._do("call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Libraries ask objects for protocols. NumPy takes `__array_interface__` to say where in memory an array lies.
        if name.startswith("__") and name.endswith("__") and name not in _TOLD:
            raise AttributeError(name)
        return self._do("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._do("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._do("setitem", key, value)

    def __len__(self) -> int:
        return int(self._do("len"))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._do("iter"))

    def __bool__(self) -> bool:
        return bool(self._do("bool"))

    def __str__(self) -> str:
        return str(self._do("str"))


def run_tests(given: str, tests: str, entries: list[str], line: Line) -> None:
    """Run the tests of a program whose functions are at the other end of the line.

    Args:
        given: What the task itself defines, run before the tests.
        tests: The tests.
        entries: Names that mean the program's, even where `given` or Python has the same.
        line: The connection.

    Raises:
        NoAnswerError: The program's process has ended, or says what is no answer.
        Exception: Whatever the tests raise.
    """
    remotes: dict[int, Remote] = {}

    def known(number: int) -> Remote:
        return remotes.setdefault(number, Remote(ask, number))

    def keep(value: Any) -> Any:
        if isinstance(value, Remote):
            return ["object", object.__getattribute__(value, "_remote")[1]]
        if hasattr(type(value), "__next__"):
            return ["iterator", [encode(item, keep) for item in value]]
        raise TypeError(f"a {type(value).__name__} cannot be given to the program")

    def ask(what: str, subject: int | str, *args: Any, **kwargs: Any) -> Any:
        given = [encode(item, keep) for item in args]
        named = {name: encode(item, keep) for name, item in kwargs.items()}
        try:
            line.send([what, subject, given, named])
            answer = line.receive()
            match answer:
                case ["value", message]:
                    return decode(message, known)
                case ["raised", str() as kind, str() as text]:
                    raised = _error(kind, text)
                case _:
                    raise ValueError("no answer")
        except (EOFError, OSError, ValueError, TypeError, ArithmeticError, RecursionError, AttributeError) as error:
            raise NoAnswerError("The program gave no answer that can be read") from error
        raise raised

    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    fetched = {}
    for name in sorted({*_unresolved(f"{given}\n{tests}"), *entries}):
        if name not in entries and name in sys.stdlib_module_names:
            names[name] = importlib.import_module(name)
            continue
        try:
            fetched[name] = ask("global", name)
        except NameError:
            continue
    names.update(fetched)
    exec(compile(given, "<given>", "exec"), names)
    names.update({name: fetched[name] for name in entries if name in fetched})
    exec(compile(tests, "<generated>", "exec"), names)


def require_shapes(numpy: Any) -> None:
    """Have `numpy.allclose` compare arrays of one shape only; the tests of MBPP+ and HumanEval+ compare numbers by it.

    NumPy repeats an array of one number as often as there are others, and none of no numbers differs from any: an empty
    list would be close to every number.

    Args:
        numpy: The module, in a process that runs tests; None where there is none.
    """
    if numpy is None:
        return
    close = numpy.allclose

    def allclose(a: Any, b: Any, *args: Any, **kwargs: Any) -> bool:
        a, b = numpy.asarray(a), numpy.asarray(b)
        return a.shape == b.shape and bool(close(a, b, *args, **kwargs))

    numpy.allclose = allclose


def _error(kind: str, text: str) -> Exception:
    """An exception of Python's own by its name; any other becomes a RuntimeError.

    So does StopIteration, as Python has it with generators: raised in a `map`, it would end the tests' loop.
    """
    known = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, Exception) and not issubclass(known, _ENDS):
        try:
            return known(text)
        except TypeError:
            pass
    return RuntimeError(f"{kind}: {text}")


def _unresolved(source: str) -> set[str]:
    """Names that a program reads and neither it nor Python defines."""
    nodes = list(ast.walk(ast.parse(source)))
    read, bound = set(), set(dir(builtins))
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                read.add(name)
            case ast.Name(id=name):
                bound.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name):
                bound.add(name)
            case ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
            case ast.alias(name=name, asname=other):
                bound.add(other or name.partition(".")[0])
    return read - bound
