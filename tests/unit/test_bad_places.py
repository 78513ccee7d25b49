"""Outputs that would overwrite something, places that cannot be written, a full disk, and runs that were moved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest

import dynalora
from dynalora.cli.commands import COMMANDS
from dynalora.cli.machine import of_the_machine
from dynalora.common.files import file_beside, why_not_written, write_file
from dynalora.errors import ConfigError, DynaloraError
from dynalora.jobs.landscape.settings import LandscapeSpec
from dynalora.lab.run_folder import RunFolder
from dynalora.lab.settings import describe, read_yaml, settings_from
from tests.unit import tiny
from tests.unit.program import Program


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data and the folder of a model, both named by relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(16))
    return tmp_path


SHORT = ["finetune", "-m", "model", "-d", "rows.jsonl", "-t", "q_proj", "--steps", "1", "-r", "2", "--no-retention"]


class TestFiles:
    def test_a_new_file_never_takes_the_place_of_one_that_came_meanwhile(self, tmp_path: Path) -> None:
        target = tmp_path / "out.csv"

        def race() -> None:
            with file_beside(target, replace=False) as beside:
                beside.write_text("ours")
                target.write_text("theirs")

        with pytest.raises(FileExistsError):
            race()
        assert target.read_text() == "theirs"
        assert list(tmp_path.iterdir()) == [target]

    @pytest.mark.parametrize("links", [True, False])
    def test_a_new_file_appears_whole_with_and_without_hard_links(
        self, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not links:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
        write_file(tmp_path / "a" / "out.csv", "text", replace=False)
        assert (tmp_path / "a" / "out.csv").read_text() == "text"
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["out.csv"]
        with pytest.raises(FileExistsError):
            write_file(tmp_path / "a" / "out.csv", "other", replace=False)

    def test_what_may_not_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").write_text("")
        (tmp_path / "empty").mkdir()
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        before = sorted(path.name for path in tmp_path.rglob("*"))
        assert why_not_written(tmp_path / "new" / "deep") is None
        assert why_not_written(tmp_path / "empty", folder=True) is None
        assert why_not_written(tmp_path / "file") == "exists already"
        assert why_not_written(tmp_path / "dangling") == "exists already"
        assert "is a folder" in str(why_not_written(tmp_path / "empty"))
        assert why_not_written(tmp_path / "full", folder=True) == "is not an empty folder"
        assert why_not_written(tmp_path / "file", folder=True) == "exists already"
        assert "is a file" in str(why_not_written(tmp_path / "file" / "x" / "y"))
        assert sorted(path.name for path in tmp_path.rglob("*")) == before

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
    def test_names_that_are_no_text(self, tmp_path: Path) -> None:
        name = os.path.join(tmp_path, os.fsdecode(b"caf\xe9"))
        assert "not UTF-8" in str(why_not_written(name))
        assert "not UTF-8" in str(why_not_written(os.path.join(name, "deep"), folder=True))

    @pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs a device without end")
    def test_settings_without_end(self) -> None:
        with pytest.raises(ConfigError, match="more than 1000000 characters"):
            read_yaml("/dev/zero")

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place that root cannot write either")
    def test_a_place_where_nobody_can_write(self) -> None:
        assert "cannot be written" in str(why_not_written("/proc/out.csv"))
        assert "cannot be written" in str(why_not_written("/proc/deep/out", folder=True))


class TestOutputs:
    @pytest.mark.parametrize(
        ("arguments", "taken"),
        [
            (["landscape", "x", "--csv", "t.csv"], "t.csv"),
            (["landscape", "x", "--json", "t.json"], "t.json"),
            (["landscape", "x", "--plot", "p.png"], "p.png"),
            (["landscape", "x", "--plot", "p.png"], "p-energy.svg"),
            (["bench", "--json", "b.json"], "b.json"),
            (["evaluate", "x", "--task", "gsm8k", "--json", "e.json"], "e.json"),
            (["gates", "x", "--data", "rows.jsonl", "--plot", "g.png"], "g.png"),
            (["export", "x", "ranks.json", "--ranks-only"], "ranks.json"),
            (["export", "x", "out"], "out/notes"),
            (["compact", "x", "out"], "out/notes"),
            (["trim", "x", "out", "--factor", "0.5"], "out/notes"),
        ],
    )
    def test_every_output_is_refused_where_something_is(
        self, arguments: list[str], taken: str, here: Path, program: Program
    ) -> None:
        write_file(here / taken, "mine")
        shown = program(*arguments)
        assert shown.code == 2
        assert shown.err.startswith("Error: ")
        assert shown.err.count("\n") == 1
        assert taken.partition("/")[0] in shown.err
        assert (here / taken).read_text() == "mine"
        if arguments[0] not in ("export", "compact", "trim"):
            assert arguments[-2] in shown.err  # the flag that was typed

    def test_a_quoted_tilde_is_the_users_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As it is behind an equals sign, where a shell leaves it alone, and in a settings file."""
        monkeypatch.setenv("HOME", str(tmp_path))
        for name, command in COMMANDS.items():
            names = describe(command.settings)
            asked = {
                "model": "m", "data": "d", "tasks": ["x", "y"], "task": ["x"], "task_a": "a", "task_b": "b",
                "source": "s", "adapter": "a", "output": "o", "repo": "r",
            }  # fmt: skip
            given = {key: asked[key] for key, item in names.items() if item.default is MISSING}
            given |= {"trim": {"factor": 0.5}, "gates": {"data": "d"}}.get(name, {})
            for key in ("output", "adapter", "source"):
                if key not in names:
                    continue
                spec = settings_from(command.settings, {**given, key: "~/new"})
                assert getattr(spec, key) == str(tmp_path / "new"), (name, key)
                with pytest.raises(ConfigError, match=rf"{key} is '~no-such-user/x', and there is no such user"):
                    settings_from(command.settings, {**given, key: "~no-such-user/x"})

    @pytest.mark.parametrize("place", [".", "..", "/"])
    def test_a_picture_needs_a_name(self, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match="which is a folder and not the name of a file"):
            settings_from(COMMANDS["landscape"].settings, {"adapter": "a", "plot": place})

    def test_two_outputs_in_one_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="and so is csv"):
            LandscapeSpec(adapter="x", csv=str(tmp_path / "a"), json=str(tmp_path / "a"))


class TestTheMachine:
    def test_a_full_disk_while_saving(self, here: Path) -> None:
        """A limit on the size of files acts as a full disk does: writing fails half-way."""
        environment = {**os.environ, "PYTHONPATH": str(Path(dynalora.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
        script = "import resource, sys; from dynalora.cli.main import main\n"
        script += "from dynalora.lab.training import checkpoints\n"
        script += "from dynalora.jobs.finetune import run\nsave = run.save_adapter\n"
        script += "def full(*a): resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); return save(*a)\n"
        script += "run.save_adapter = full\nmain()"
        done = subprocess.run(
            [sys.executable, "-c", script, *SHORT, "-o", "run"], capture_output=True, text=True, check=False,
            env=environment, cwd=here,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("Error: There is no room left on the disk")
        assert "dynalora finetune --config run/config.yaml --resume" in last
        assert not (here / "run" / "adapter").exists()

    @pytest.mark.parametrize(
        "text",
        [
            "Error while serializing: I/O error: No space left on device (os error 28)",
            'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
            "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0",
            "PytorchStreamWriter failed writing file data/3: file write failed",
            "basic_ios::clear: iostream error",
        ],
    )
    def test_what_libraries_say_of_a_full_disk(self, text: str) -> None:
        assert "no room left" in str(of_the_machine(RuntimeError(text)))

    def test_errors_of_the_program_are_no_errors_of_the_machine(self) -> None:
        for error in (ValueError("code: 28"[:4]), KeyError("x"), FileNotFoundError(2, "No such file", "x")):
            assert of_the_machine(error) is None
        assert of_the_machine(DynaloraError("There is no room left on the disk (os error 28)")) is None
        assert "permission" in str(of_the_machine(PermissionError(13, "Permission denied", "/x")))
        assert "ulimit" in str(of_the_machine(OSError(24, "Too many open files", "/x")))
        assert "memory" in str(of_the_machine(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")))
        wrapped = ValueError("could not save")
        wrapped.__cause__ = OSError(28, "No space left on device", "/x")
        assert "'/x'" in str(of_the_machine(wrapped))


def failed(folder: Path, until: Callable[[RunFolder], Any]) -> None:
    """A run that does something and then fails."""

    def run() -> None:
        with RunFolder.create(folder, {"seed": 1}) as opened:
            until(opened)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


class TestRunFolders:
    def test_a_run_that_failed_before_its_first_step_leaves_its_folder_free(self, tmp_path: Path) -> None:
        def fail(run: RunFolder) -> None:
            run.log({"step": 0, "loss": 1.0})
            run.checkpoints.mkdir()

        failed(tmp_path / "run", fail)
        with RunFolder.create(tmp_path / "run", {"seed": 1}) as run:
            assert run.config == {"seed": 1}

    @pytest.mark.parametrize("step", [1, 7])
    def test_a_run_that_has_taken_a_step_stays(self, step: int, tmp_path: Path) -> None:
        failed(tmp_path / "run", lambda run: run.log({"step": step}))
        with RunFolder.create(tmp_path / "run", {"seed": 1}, resume=True) as run:
            assert run.metrics() == [{"step": step}]

    def test_files_of_a_failed_run_stay(self, tmp_path: Path) -> None:
        failed(tmp_path / "run", lambda run: run.write("adapter/x", "mine"))
        assert (tmp_path / "run" / "adapter" / "x").read_text() == "mine"
        assert (tmp_path / "run" / "config.yaml").exists()

    def test_a_moved_run_works_from_another_folder(
        self, here: Path, program: Program, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert program(*SHORT, "-o", "run", "--steps", "2", "--save-every", "1").code == 0
        (here / "elsewhere").mkdir()
        moved = Path(shutil.move(here / "run", here / "elsewhere" / "moved"))
        monkeypatch.chdir(here / "elsewhere")
        shown = program("trim", "moved", "smaller", "--factor", "0.5")
        assert shown.code == 0, shown.err
        assert "loss" in (moved.parent / "smaller" / "trim.csv").read_text().splitlines()[0]
        assert "cannot be read" not in shown.out
        again = program("finetune", "--config", "moved/config.yaml", "--resume")
        assert "The run in 'moved' has finished" in again.err
