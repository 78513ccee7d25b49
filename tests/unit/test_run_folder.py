from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dynalora.common.files import write_file
from dynalora.errors import RunFolderError
from dynalora.lab.run_folder import RunFolder, read_metrics

CONFIG = {"method": "disel", "model": "tiny", "learning_rate": 2e-4, "target_modules": ["q_proj", "v_proj"]}


def test_new_folder_holds_what_was_asked_for(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "a" / "run", CONFIG) as run:
        run.log({"step": 1, "loss": 2.5})
        run.finish()
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
    status = json.loads((run.path / "run.json").read_text())
    assert status["finished"] is not None
    assert status["versions"]["torch"]
    assert list(read_metrics(run.path)) == [{"step": 1, "loss": 2.5}]


def test_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, CONFIG) as run:
        run.log({"step": 1})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        RunFolderError, match=r"already holds a run \(method disel, model tiny, started 20.*not finished\)"
    ) as told:
        RunFolder.create(tmp_path, CONFIG)
    assert "choose another output folder, or resume" in str(told.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_folder_with_foreign_files_is_refused(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(RunFolderError, match=r"is not empty and holds no run \(found a.txt, b.txt, c.txt and 1 more\)"):
        RunFolder.create(tmp_path, CONFIG)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "b.txt", "c.txt", "d.txt"]


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(tmp_path / "file", CONFIG)
    with pytest.raises(RunFolderError, match="cannot be made because"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG)


def test_check_changes_nothing(tmp_path: Path) -> None:
    RunFolder.check(tmp_path / "run", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_folder_in_use_is_refused_while_open(tmp_path: Path) -> None:
    with (
        RunFolder.create(tmp_path, CONFIG),
        pytest.raises(RunFolderError, match=f"is in use by process {os.getpid()} on "),
    ):
        RunFolder.create(tmp_path, CONFIG, resume=True)
    RunFolder.create(tmp_path, CONFIG, resume=True).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a second process that can be killed")
def test_lock_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")
    ready, never = forked.Event(), forked.Event()

    def hold() -> None:
        run = RunFolder.create(tmp_path, {"seed": 1})
        run.log({"step": 1})
        ready.set()
        never.wait(60)

    holder = forked.Process(target=hold)
    holder.start()
    assert ready.wait(30)
    with pytest.raises(RunFolderError, match=f"in use by process {holder.pid} "):
        RunFolder.check(tmp_path, {"seed": 1}, resume=True)
    holder.kill()
    holder.join()
    with RunFolder.create(tmp_path, {"seed": 1}, resume=True) as run:
        assert run.resumed
        assert run.metrics() == [{"step": 1}]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed")
@pytest.mark.parametrize("at", ["status", "config", "measured"])
def test_a_run_killed_before_its_first_step_leaves_its_folder_free(at: str, tmp_path: Path) -> None:
    """Wherever it is killed, the same command starts again, without --resume; so does another one."""
    process = os.fork()
    if process == 0:
        replace, places = os.replace, iter(["status", "config"])

        def replacing(*args: Any) -> None:
            replace(*args)
            if next(places, None) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replacing  # type: ignore[assignment]
        run = RunFolder.create(tmp_path, CONFIG)
        run.log({"step": 0, "loss": 3.0})
        write_file(tmp_path / "retention.jsonl", '{"step": 0, "kl": 0.0}\n')
        run.checkpoints.mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "run.json").exists()
    with RunFolder.create(tmp_path, {**CONFIG, "learning_rate": 1e-3}) as run:
        assert run.metrics() == []
        assert not (tmp_path / "retention.jsonl").exists()
        run.log({"step": 1})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["learning_rate"] == 1e-3
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder.create(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.txt", "mine"),
        ("data.jsonl", '{"step": 0}'),
        ("checkpoints/x", "y"),
        ("metrics.jsonl", '{"step": 0}\n{"step": 1}\n'),
        ("retention.jsonl", '{"step": 4}\n'),
        ("run.json", '{"process": 1}'),
        ("run.json", '{"started": "x", "finished": "y"}'),
    ],
)
def test_what_may_be_of_worth_keeps_its_folder(name: str, text: str, tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG).close()
    write_file(tmp_path / name, text)
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder.create(tmp_path, CONFIG)
    assert (tmp_path / name).read_text() == text


def test_a_configuration_alone_is_somebodys(tmp_path: Path) -> None:
    write_file(tmp_path / "config.yaml", "method: disel\n")
    with pytest.raises(RunFolderError, match=r"holds no run \(found config.yaml\)"):
        RunFolder.create(tmp_path, CONFIG)


def test_resume_needs_a_run_with_the_same_settings(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run to resume"):
        RunFolder.create(tmp_path / "none", CONFIG, resume=True)
    assert not (tmp_path / "none").exists()
    RunFolder.create(tmp_path / "run", CONFIG).close()
    changed = {**CONFIG, "learning_rate": 1e-3}
    with pytest.raises(RunFolderError, match=r"other settings \(learning_rate was 0.0002, now 0.001\)"):
        RunFolder.create(tmp_path / "run", changed, resume=True)


def test_a_setting_that_came_later_had_its_default(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG).close()
    now = {**CONFIG, "warmup": 0.0}
    with pytest.raises(RunFolderError, match=r"other settings \(warmup was None, now 0.0\)"):
        RunFolder.create(tmp_path, now, resume=True)
    defaults = {"warmup": 0.0, "learning_rate": 1.0, "elsewhere": 3}
    RunFolder.check(tmp_path, now, resume=True, defaults=defaults)
    with RunFolder.create(tmp_path, now, resume=True, defaults=defaults) as run:
        assert run.resumed
    with pytest.raises(RunFolderError, match=r"other settings \(warmup was 0.0, now 0.1\)"):
        RunFolder.create(tmp_path, {**now, "warmup": 0.1}, resume=True, defaults=defaults)


def test_settings_survive_the_file_they_are_compared_with(tmp_path: Path) -> None:
    config = {"path": tmp_path, "pair": (1, 2), "names": {"b", "a"}, "ratio": np.float32(0.5), "none": None, "1": 1e-7}
    RunFolder.create(tmp_path / "run", config).close()
    RunFolder.create(tmp_path / "run", config, resume=True).close()


def test_metrics_are_on_disk_after_every_line_and_survive_a_torn_one(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, CONFIG) as run:
        run.log({"step": 1, "loss": math.nan, "lr": np.float64(0.5)})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "lr": 0.5}\n'
        run.log({"step": 2})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    with RunFolder.create(tmp_path, CONFIG, resume=True) as run:
        run.forget_metrics_after(1)
        run.log({"step": 2, "again": True})
        assert [record["step"] for record in run.metrics()] == [1, 2]
        assert run.metrics()[1] == {"step": 2, "again": True}


def test_other_processes_of_a_distributed_run_write_nothing(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", CONFIG, main_process=False) as run:
        run.log({"step": 1})
        run.write("report.html", "text")
        run.finish()
    assert not (tmp_path / "run").exists()


def test_atomic_write_leaves_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_file(tmp_path / "file", "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(target, "new")
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_replacing_a_folder_is_all_or_nothing(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, CONFIG) as run:
        with run.replacing("adapter") as fresh:
            (fresh / "weights").write_text("first")

        def half() -> None:
            with run.replacing("adapter") as fresh:
                (fresh / "weights").write_text("half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            half()
        assert (run.adapter / "weights").read_text() == "first"
        with run.replacing("adapter") as fresh:
            (fresh / "weights").write_text("second")
        assert (run.adapter / "weights").read_text() == "second"
        assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]


def test_status_tells_a_finished_run_from_a_killed_one(tmp_path: Path) -> None:
    started = time.time()
    with RunFolder.create(tmp_path, CONFIG) as run:
        assert run.status()["finished"] is None
        run.finish()
        assert run.status()["finished"] is not None
    with pytest.raises(RunFolderError, match="has finished; there is nothing to resume"):
        RunFolder.create(tmp_path, CONFIG, resume=True)
    assert (tmp_path / "run.json").stat().st_mtime >= started - 2
