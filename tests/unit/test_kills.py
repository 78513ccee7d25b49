"""Jobs that are killed at random, again and again, and end as if they had not been: bit for bit.

Each job runs in a copy of this process. Half of the kills come at one of the points where something is about to change,
or has just changed: steps, ranks, directions, files of checkpoints (left torn), results. The others come at any time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from dynalora.adapter.directions import DirectedLayer
from dynalora.adapter.layer import AdapterLayer
from dynalora.driver.driver import Driver
from dynalora.jobs.compare.run import run_compare
from dynalora.jobs.finetune import run as finetune_run
from dynalora.jobs.finetune.run import finetune
from dynalora.jobs.stages.forgetting import run_forgetting
from dynalora.lab.run_folder import CONFIG, STATUS, RunFolder
from tests.unit import test_compare, test_finetune, test_forgetting, tiny

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs copies of this process that can be killed")

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

FINETUNED: dict[str, dict[str, Any]] = {
    "dira": {"compact_every": 4, "compact_threshold": 0.2, "penalty_weight": 1.0},
    "disel": {},
    "dislora": {"warmup_steps": 5, "tsd_count": 2, "loss_smoothing": 0.5},
    "pedyra": {"adjust_start": 2, "adjust_interval": 2, "adjust_end": 10, "adjust_size": 1},
    "increlora": {"grow_start": 2, "grow_interval": 2, "target_rank": 4},
    "triadaptlora": {"grow_start": 2, "grow_interval": 2, "target_rank": 4},
    "dylora": {},
    "loradash": {"warmup_steps": 5, "tsd_count": 2},
    "milora": {},
    "rasa": {"shared_rank": 1},
    "sorsa": {},
}

# Where something is about to change or has just changed; of what writes a file, the argument that is its path.
POINTS: list[tuple[Any, str, int | None]] = [
    (Driver, "advance", None),
    (AdapterLayer, "resize", None),
    (DirectedLayer, "point", None),
    (torch, "save", 1),
    (peft.PeftModel, "save_pretrained", 1),
    (os, "replace", None),
    (RunFolder, "log", None),
    (finetune_run, "own_text", None),
    (finetune_run, "retention", None),
    (finetune_run, "write_results", None),
]


@dataclass(frozen=True)
class Job:
    """A job that can be begun and continued: (folder of models and data, output, whether to resume)."""

    name: str
    run: Callable[[Path, Path, bool], Any]
    resumes: bool = True  # else it goes on by itself


def jobs() -> Iterator[Job]:
    for method, options in FINETUNED.items():

        def fine(place: Path, output: Path, resume: bool, method: str = method, options: Any = options) -> Any:
            more = {"save_every": 3, "log_every": 1, "eval_every": 4, "dropout": 0.1, "retention": True}
            given = {"method": method, "method_options": options, "resume": resume, "r": 3, **more}
            return finetune(test_finetune.spec(place / "model", place / "rows.jsonl", output, **given))

        yield Job(f"finetune {method}", fine)

    def compare(place: Path, output: Path, resume: bool) -> Any:
        given = {"learning_rates": [1e-2], "seeds": 1, "methods": ["pedyra", "dislora"], "reference": "pedyra"}
        return run_compare(replace(test_compare.spec_of(place, "", **given), output=str(output)), apart=False)

    def forgetting(place: Path, output: Path, resume: bool) -> Any:
        given = {"method": "dira"}
        return run_forgetting(replace(test_forgetting.spec_of(place, "", **given), output=str(output), resume=resume))

    yield Job("compare", compare, resumes=False)
    yield Job("forgetting", forgetting)


JOBS = {job.name: job for job in jobs()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    tiny.saved_model(folder / "model")
    tiny.write_jsonl(folder / "rows.jsonl", tiny.rows(24))
    test_forgetting.write_tasks(folder / "data")
    return folder


class Counter:
    """Counts the points that a job passes, and has its process killed at one of them."""

    def __init__(self, aim: int | None, how: signal.Signals, share: float) -> None:
        self.passed, self.aim, self.how, self.share = 0, aim, how, share

    def passes(self, written: Any = None) -> None:
        self.passed += 1
        if self.passed == self.aim:
            if isinstance(written, (str, os.PathLike)):
                self.tear(Path(written))
            os.kill(os.getpid(), self.how)

    def tear(self, written: Path) -> None:
        """Leave a share of a file, or of an adapter's."""
        file = written / "adapter_model.safetensors" if written.is_dir() else written
        if file.is_file():
            os.truncate(file, int(self.share * file.stat().st_size))

    def watch(self, owner: Any, name: str, path: int | None) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.passes()
            result = function(*args, **kwargs)
            self.passes(args[path] if path is not None and len(args) > path else None)
            return result

        setattr(owner, name, counted)


@contextmanager
def child(job: Job, place: Path, output: Path, counter: Counter) -> Iterator[int]:
    """A process that runs the job, goes on with it where it has been begun, and notes what it met."""
    process = os.fork()
    if process == 0:
        code = 3
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ["DYNALORA_CACHE"] = f"{output}.cache"
            log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(log, stream)
            for point in POINTS:
                counter.watch(*point)
            job.run(place, output, job.resumes and (output / CONFIG).exists())
            Path(f"{output}.points").write_text(str(counter.passed))
            code = 0
        except KeyboardInterrupt:
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    try:
        yield process
    finally:
        if process in unwaited():
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def unwaited() -> list[int]:
    """This process's children that nobody has waited for."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def ended(process: int, output: Path) -> int:
    """How a child ended; errors of its own fail the test."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 2, -signal.SIGKILL, -signal.SIGTERM), Path(f"{output}.log").read_text()[-3000:]
    return code


@dataclass(frozen=True)
class Whole:
    """What a job does when nobody kills it."""

    results: dict[str, Any]
    seconds: float
    points: int


@pytest.fixture(scope="module")
def whole(place: Path) -> Callable[[Job], Whole]:
    known: dict[str, Whole] = {}

    def run(job: Job) -> Whole:
        if job.name not in known:
            output = place / f"whole {job.name}"
            began = time.monotonic()
            with child(job, place, output, Counter(None, signal.SIGKILL, 0)) as process:
                assert ended(process, output) == 0
            points = int(Path(f"{output}.points").read_text())
            known[job.name] = Whole(results(output), time.monotonic() - began, points)
        return known[job.name]

    return run


VOLATILE = {"machine", "peak_bytes"}


def results(output: Path) -> dict[str, Any]:
    """Every number and every weight in a run's folder, without what is measured of the machine."""

    def steady(content: Any) -> Any:
        if isinstance(content, dict):
            return {k: steady(v) for k, v in content.items() if k not in VOLATILE and "second" not in k}
        return [steady(item) for item in content] if isinstance(content, list) else content

    found: dict[str, Any] = {}
    for file in sorted(output.rglob("*")):
        name = str(file.relative_to(output))
        if not file.is_file() or file.name == STATUS or any(part.startswith(".") for part in file.parts):
            continue
        if name.startswith("checkpoints"):  # a run that had finished was killed before it removed them
            continue
        if file.suffix == ".safetensors":
            found[name] = {key: (str(t.dtype), t.tolist()) for key, t in load_file(file).items()}
        elif file.suffix in (".json", ".jsonl"):
            text = file.read_text(encoding="utf-8").replace(str(output), "OUTPUT")
            parts = text.splitlines() if file.suffix == ".jsonl" else [text]
            found[name] = [steady(json.loads(part)) for part in parts]
    return found


def difference(one: Any, other: Any, place: str = "") -> str | None:
    """Where two results differ first; None where they do not."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(one[key], other[key], f"{place}.{key}") for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(*pair, f"{place}[{at}]") for at, pair in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other else f"{place} is {str(one)[:200]} and not {str(other)[:200]}"
    return next((found for pair in pairs if (found := difference(*pair)) is not None), None)


def survives(job: Job, seed: int, kills: int, place: Path, undisturbed: Whole) -> int:
    """Kill a job some times, let it end, and compare; returns how many kills hit it."""
    chance = random.Random(f"{job.name} {seed}")
    output = place / f"{job.name} {seed}"
    landed = 0
    for _ in range(kills):
        how = chance.choice(SIGNALS)
        # Early enough to hit, and soon enough after a checkpoint that the end is reached, too.
        aim = chance.randint(1, max(1, 2 * undisturbed.points // 3)) if chance.random() < 0.5 else None
        with child(job, place, output, Counter(aim, how, chance.random())) as process:
            if aim is None:
                time.sleep(chance.uniform(0, 2 / 3) * undisturbed.seconds)
                os.kill(process, how)  # one that has ended still waits to be asked
            landed += ended(process, output) != 0
        if _is_finished(job, output):
            break
    if not _is_finished(job, output):
        with child(job, place, output, Counter(None, signal.SIGKILL, 0)) as process:
            assert ended(process, output) == 0
    found = results(output)
    assert found.keys() == undisturbed.results.keys()
    for name, content in undisturbed.results.items():
        where = difference(found[name], content)
        assert where is None, f"{name}: {where}, after {landed} kills of '{job.name}' with seed {seed}"
    return landed


def _is_finished(job: Job, output: Path) -> bool:
    try:
        return job.resumes and json.loads((output / STATUS).read_text(encoding="utf-8"))["finished"] is not None
    except (OSError, ValueError):
        return False


@pytest.mark.parametrize("name", JOBS)
def test_killed_jobs_end_as_if_they_had_not_been(name: str, place: Path, whole: Callable[[Job], Whole]) -> None:
    job = JOBS[name]
    # A kill may come too late on a machine that is quicker than it was a moment ago; then others are tried.
    assert any(survives(job, seed, 2, place, whole(job)) for seed in range(1, 6))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_dozen_kills_of_each_job(name: str, place: Path, whole: Callable[[Job], Whole]) -> None:
    job, landed, seed = JOBS[name], 0, int(os.environ.get("DYNALORA_KILL_SEED", "100"))
    while landed < 12:
        landed += survives(job, seed, 8, place, whole(job))
        print(f"{name}: {landed} kills by seed {seed}", flush=True)
        seed += 1
