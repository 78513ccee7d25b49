"""Full disks, places that cannot be written, and two writers of one folder: one sentence, and nothing is in the way.

A limit on the size of files acts as a full disk does, in this process and without privileges: writing fails half-way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dynalora.adapter.saved import check_adapter_folder
from dynalora.cli.machine import of_the_machine
from dynalora.common.files import write_files
from dynalora.errors import DynaloraError
from dynalora.lab.run_folder import CONFIG, RunFolder
from tests.decompositions import decompose
from tests.unit import test_forgetting, test_kills, tiny
from tests.unit.program import Program

resource = pytest.importorskip("resource")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """A disk on which no file may have more than `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and a trained adapter."""
    folder = tmp_path_factory.mktemp("disks")
    tiny.saved_model(folder / "model")
    tiny.write_jsonl(folder / "rows.jsonl", tiny.rows(24))
    tiny.write_jsonl(folder / "prompts.jsonl", [{"prompt": "Say 3."}])
    test_forgetting.write_tasks(folder / "data")
    test_kills.JOBS["finetune dira"].run(folder, folder / "trained", False)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))


COMMANDS: dict[str, list[str]] = {
    "export": ["export", "ADAPTER", "OUT"],
    "compact": ["compact", "ADAPTER", "OUT"],
    "trim": ["trim", "ADAPTER", "OUT", "--factor", "0.5"],
    "merge": ["merge", "ADAPTER", "-o", "OUT"],
    "generate": ["generate", "ADAPTER", "--data", "PROMPTS", "-o", "OUT", "--max-new-tokens", "8"],
    "landscape": ["landscape", "ADAPTER", "--csv", "OUT/a.csv", "--json", "OUT/b.json"],
}


def words_of(name: str, place: Path, output: Path) -> list[str]:
    names = {"ADAPTER": place / "trained" / "adapter", "PROMPTS": place / "prompts.jsonl"}
    given = [str(names.get(word, word)) for word in COMMANDS[name]]
    return [f"{output}{word[3:]}" if word.startswith("OUT") else word for word in given]


@pytest.mark.parametrize("room", [0, 3000])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_full_disk_leaves_nothing(
    name: str, room: int, place: Path, tmp_path: Path, program: Program
) -> None:
    output = tmp_path / "results" / "out"
    if name == "generate":
        room = min(room, 20)
    with full_disk(room):
        shown = program(*words_of(name, place, output))
    assert shown.code == 2
    assert "Error: There is no room left on the disk" in shown.err.splitlines()[-1]
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert program(*words_of(name, place, output)).code == 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place that root cannot write either")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    name: str, place: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda *_, **__: pytest.fail("work was begun"))
    shown = program(*words_of(name, place, Path("/proc/dynalora/out")))
    assert shown.code == 2
    assert shown.err.startswith("Error: ")
    assert "cannot be written" in shown.err


def why_it_failed(job: Callable[[], Any]) -> str:
    """The sentence that a job's failure becomes."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (of the machine, or the package's own)
        job()
    reason = str(caught.value) if isinstance(caught.value, DynaloraError) else of_the_machine(caught.value)
    assert reason is not None
    return reason


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("finetune dira", 100),
        *(
            pytest.param(name, room, marks=pytest.mark.slow)
            for name, room in [
                ("finetune dira", 15_000),  # in a checkpoint
                ("finetune dislora", 40_000),
                ("compare", 400),
                ("compare", 15_000),
                ("forgetting", 100),
                ("forgetting", 15_000),
            ]
        ),
    ],
)
def test_a_job_on_a_full_disk_ends_as_if_the_disk_had_not_been_full(
    name: str, room: int, place: Path, tmp_path: Path
) -> None:
    job = test_kills.JOBS[name]
    output = tmp_path / "run"
    with full_disk(room):
        reason = why_it_failed(lambda: job.run(place, output, False))
    assert "no room left" in reason or "cannot be written" in reason
    assert not (output / "adapter").exists()
    job.run(place, output, job.resumes and (output / CONFIG).exists())
    job.run(place, tmp_path / "whole", False)
    found, expected = test_kills.results(output), test_kills.results(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert test_kills.difference(found, expected) is None


def test_a_cache_that_cannot_be_written_stops_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNALORA_CACHE", "/dev/null/cache")
    test_kills.JOBS["finetune dislora"].run(place, tmp_path / "run", False)
    check_adapter_folder(str(tmp_path / "run" / "adapter"))


def test_two_writers_of_one_cache(tmp_path: Path) -> None:
    weights = [torch.randn(12, 10, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    found: list[Any] = []

    def work() -> None:
        found.append(decompose([lambda w=w: w for w in weights], [3] * 6))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for others in found[1:]:
        assert all(torch.equal(a.values, b.values) for a, b in zip(found[0], others, strict=True))
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.parametrize("name", ["finetune dira", "forgetting"])
def test_a_second_writer_of_a_run_folder_is_refused(name: str, place: Path, tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {"seed": 1}) as run:
        run.write("mine.txt", "mine")
        reason = why_it_failed(lambda: test_kills.JOBS[name].run(place, tmp_path / "run", False))
        assert f"is in use by process {os.getpid()}" in reason
        assert (tmp_path / "run" / "mine.txt").read_text() == "mine"


def test_several_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    contents: dict[Path, str | bytes] = {tmp_path / "a": "x" * 10, tmp_path / "b": b"y" * 100}
    with full_disk(50), pytest.raises(OSError):  # noqa: PT011 (which number it has depends on the disk)
        write_files(contents, replace=False)
    assert list(tmp_path.iterdir()) == []
    assert write_files(contents, replace=False) == list(contents)
    assert (tmp_path / "b").read_bytes() == b"y" * 100
