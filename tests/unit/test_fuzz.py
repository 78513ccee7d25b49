"""What strangers' and damaged files can hold: every reader takes it or refuses it in a sentence of its own.

Adapters are tried in `test_hostile_adapters.py`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynalora.cli.commands import COMMANDS
from dynalora.errors import DynaloraError
from dynalora.evaluation.benchmarks import BENCHMARKS
from dynalora.evaluation.files import FILE_KINDS, read_rows
from dynalora.forgetting.curves import RetentionPoint, read_retention, write_points
from dynalora.forgetting.landscape import LandscapeRow
from dynalora.forgetting.retention import Retention
from dynalora.jobs.stages.stage_files import LANDSCAPE, read_landscape, write_landscape
from dynalora.lab.data.conversations import load_conversations, load_texts, split, to_conversations
from dynalora.lab.run_folder import RunFolder, read_metrics
from dynalora.lab.settings import named_values, read_yaml, settings_from
from dynalora.lab.units import read_result
from dynalora.methods.pedyra.record import _decoded
from tests.conftest import FUZZ
from tests.unit.benchmark_files import ROWS

fuzzed = settings(
    max_examples=100 * max(1, FUZZ),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

DEEP = "[" * 3000 + "]" * 3000
LONG = "9" * 5000

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([10**400, -(10**400), 2**63, 0]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["", " ", "\ud83d", "\x00", "nan", "1e999", LONG, "a" * 3000, "answer1", "all-linear", "lora", "../x"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls"]), inner, max_size=4
        ),
    ),
    max_leaves=6,
)
BROKEN = [
    *(DEEP, f'{{"a": {DEEP}}}', LONG, f'{{"prompt": {LONG}, "response": 1}}', "{", "- " * 2000),
    *("a: [1", "? [a]: b", "2020-13-45", "a: 2020-99-99", "&a [*a]", "!!python/object:os.system {}", "a: !!binary x"),
    *("=", "<<: 3"),
]
texts = st.one_of(st.text(max_size=60), st.sampled_from(BROKEN))


def understood(action: Callable[[], Any]) -> Any:
    """What comes out, or None where it was refused on purpose; anything else fails."""
    try:
        return action()
    except DynaloraError:
        return None


def mutated(row: Mapping[str, Any], data: st.DataObject) -> dict[str, Any]:
    """A row with some of its fields gone, or holding something else."""
    changed = dict(row)
    for name in data.draw(st.lists(st.sampled_from(sorted(changed)), min_size=1, max_size=2, unique=True)):
        if data.draw(st.booleans()):
            changed[name] = data.draw(values)
        else:
            del changed[name]
    return changed


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """A file cut short, with bytes of another value, or with something in its middle."""
    at = data.draw(st.integers(0, len(content)))
    how = data.draw(st.sampled_from(["cut", "flip", "insert"]))
    if how == "cut":
        return content[:at]
    if how == "flip":
        return content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
    return (
        content[:at]
        + data.draw(st.one_of(st.binary(max_size=6), texts.map(lambda t: t.encode("utf-8", "surrogatepass"))))
        + content[at:]
    )


# --- settings -----------------------------------------------------------------------------------------------------

KINDS = [command.settings for command in COMMANDS.values()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@fuzzed
@given(data=st.data())
def test_settings(kind: type[Any], data: st.DataObject) -> None:
    names = [item.name for item in fields(kind) if item.init]
    asked = {"model": "m", "data": "d", "output": "o", "tasks": ["x"], "task_a": "a", "task_b": "b", "source": "s"}
    sensible = {name: value for name, value in asked.items() if name in names}
    chosen = data.draw(st.dictionaries(st.sampled_from([*names, "unknown"]), values, max_size=3))
    understood(lambda: settings_from(kind, {**sensible, **chosen}))


@fuzzed
@given(text=texts)
def test_settings_files(text: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    understood(lambda: read_yaml(file))
    understood(lambda: named_values([f"a={text}", text]))


# --- data ---------------------------------------------------------------------------------------------------------


@fuzzed
@given(kind=st.sampled_from([*FILE_KINDS, ".txt", ".jsonl.gz"]), text=texts, data=st.data())
def test_data_files(kind: str, text: str, data: st.DataObject, tmp_path: Path) -> None:
    file = tmp_path / f"rows{kind}"
    rows = [{"prompt": "Say 1.", "response": "It is 1."}, {"prompt": text[:9], "response": data.draw(scalars)}]
    sound = "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    file.write_bytes(damaged(sound, data) if data.draw(st.booleans()) else text.encode("utf-8", "surrogatepass"))
    understood(lambda: list(read_rows(file)[0]))
    understood(lambda: split(load_conversations(file), 0.5))
    understood(lambda: load_texts(file))


@fuzzed
@given(data=st.data())
def test_conversations(data: st.DataObject) -> None:
    names = [
        "prompt",
        "response",
        "completion",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "tools",
        "text",
    ]
    rows = data.draw(st.lists(st.dictionaries(st.sampled_from(names), values, max_size=4), max_size=3))
    understood(lambda: split(to_conversations((f"row {at}", row) for at, row in enumerate(rows)), 0.5))


FIRST = {name.partition(".")[0]: rows[0] for name, rows in ROWS.items()}
READ = [
    benchmark for benchmark in BENCHMARKS.values() if benchmark.source is not None and benchmark.source.file in FIRST
]


@pytest.mark.parametrize("benchmark", READ, ids=lambda benchmark: benchmark.name)
@fuzzed
@given(data=st.data())
def test_rows_of_benchmarks(benchmark: Any, data: st.DataObject) -> None:
    row = mutated(FIRST[benchmark.source.file], data)
    for example in understood(lambda: benchmark.items(row, "row 1")) or ():
        if example.program is not None:
            example.program("pass")


# --- records ------------------------------------------------------------------------------------------------------

ENTRY = {
    "step": 3,
    "layers": ["a", "b"],
    "ranks": [2, 2],
    "scores": [[0.1], [0.2]],
    "pruned": [[0, 1]],
    "expanded": [1],
}


@fuzzed
@given(data=st.data())
def test_records_of_adjustments(data: st.DataObject) -> None:
    text = data.draw(st.one_of(texts, st.just(json.dumps([mutated(ENTRY, data), ENTRY]))))
    more = zlib.compress(json.dumps([ENTRY]).encode()) * data.draw(st.integers(0, 2))
    packed = zlib.compress(text.encode("utf-8", "surrogatepass")) + more
    content = damaged(packed, data) if data.draw(st.booleans()) else packed
    understood(lambda: _decoded(torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)))


POINT = RetentionPoint("run", 4, "own text", Retention(0.1, 0.2, 3.0, 50, 0.01), 0.5)


@fuzzed
@given(data=st.data())
def test_measurements(data: st.DataObject, tmp_path: Path) -> None:
    file = tmp_path / "retention.jsonl"
    write_points(file, [POINT, POINT])
    lines = [json.dumps(mutated(POINT.as_record(), data)), data.draw(texts)]
    content = damaged(file.read_bytes() + "\n".join(lines).encode("utf-8", "surrogatepass"), data)
    file.write_bytes(content)
    understood(lambda: read_retention(file))
    (tmp_path / "metrics.jsonl").write_bytes(content)
    understood(lambda: list(read_metrics(tmp_path)))


# --- cells, stages and run folders --------------------------------------------------------------------------------

CELL = json.dumps({"version": "1", "settings": {"steps": 4}, "cell": {"label": "lora"}, "test": {"loss": 1.5}}).encode()


@fuzzed
@given(data=st.data())
def test_cells(data: st.DataObject, tmp_path: Path) -> None:
    file = tmp_path / "cell.json"
    file.write_bytes(
        data.draw(st.one_of(st.just(damaged(CELL, data)), texts.map(lambda t: t.encode("utf-8", "replace"))))
    )
    understood(lambda: read_result(file))


@fuzzed
@given(data=st.data())
def test_landscapes(data: st.DataObject, tmp_path: Path) -> None:
    row = LandscapeRow("layers.0.q", 0, "q", 2, 1, 0.6, 0.5, (0.5, 0.1))
    write_landscape(tmp_path, [row])
    rows = [mutated(json.loads((tmp_path / LANDSCAPE).read_text())[0], data)]
    content = json.dumps(
        data.draw(st.sampled_from([rows, rows[0], values]).map(lambda v: v if v is not values else data.draw(values)))
    )
    file = tmp_path / LANDSCAPE
    file.write_bytes(
        damaged(content.encode("utf-8", "surrogatepass"), data)
        if data.draw(st.booleans())
        else content.encode("utf-8", "surrogatepass")
    )
    understood(lambda: read_landscape(tmp_path))


@fuzzed
@given(config=texts, status=texts, resume=st.booleans(), data=st.data())
def test_run_folders(config: str, status: str, resume: bool, data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("run")
    asked = {"method": "dira", "steps": 3}
    sound = {"config.yaml": yaml.safe_dump(asked).encode(), "run.json": b'{"started": "2026-01-01", "finished": null}'}
    for name, text in (("config.yaml", config), ("run.json", status)):
        broken = text.encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(data.draw(st.sampled_from([sound[name], broken, damaged(sound[name], data)])))
    understood(lambda: RunFolder.check(folder, asked, resume=resume))
