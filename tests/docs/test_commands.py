"""The command lines of the README and the guides are run as printed, on a tiny model and tiny data.

What a reader has or has made before (models, data, runs) lies there under the printed names. Flags that make a job
short are put behind the printed ones.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dynalora.cli.commands import COMMANDS
from dynalora.jobs.compare import run as compare_run
from dynalora.jobs.compare.runner import InProcessRunner
from dynalora.lab import packaged_models
from dynalora.lab.choices import method_names
from tests.unit import benchmark_files, tiny
from tests.unit.program import Program, Shown, program

__all__ = ["program"]  # a fixture

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "docs" / "methods").glob("*.md"))
PAGES = ("README.md", *(str(guide.relative_to(ROOT)) for guide in GUIDES))

SMOKE = (
    "dynalora chat runs/first",
    "dynalora serve-check runs/first",
    "dynalora merge runs/dira --output merged",
    "dynalora landscape ./tuned --against ./original",
)
"""Lines that are run at every change; the others are slow together."""

NOT_RUN = {
    r"dynalora push": "needs the Hub; run in tests/unit/test_push.py with another in its place",
    r" --resume$": "needs a run that was killed; run in tests/unit/test_finetune.py",
    r"compare --config (runs/compare/config|compare)\.yaml": "goes on with another comparison; run in test_compare.py",
    r" --model (roberta-base|MODEL) ": "needs an encoder; run in tests/unit/test_compare.py",
    r"FOLDER/text": "needs benchmarks that the reader has fetched",
    r"commonsense": "needs the files of all its benchmarks; run in tests/unit/test_benchmarks.py",
    r"meta-math/MetaMathQA": "needs a data set of the Hub",
    r"--config recipes/": "run in tests/unit/test_recipes.py",
    r"dynalora (forgetting|recover)": "run in tests/unit/test_forgetting.py and test_recovery.py, with files",
}
"""Command lines that are not run here: a pattern, and why."""

SHORTER = {
    "demo": "--steps 2 --rank 2 --held-out 4 --retention-texts 2 --retention-tokens 4 --batch-size 2",
    "finetune": "--rank 2 --batch-size 4",
    "evaluate": "--data benchmarks --limit 2 --max-new-tokens 4",
    "compare": "--data benchmarks --rank 2 --steps 2 --seeds 1 --validation 2 --held-out 3 --generated 1 "
    "--generated-tokens 4 --train-limit 6 --methods lora,dira --factors 1.0 --batch-size 2 --jobs 1 --max-length 512",
    "bench": "--rounds 1 --warmup 1 --rank 2 --length 8 --batch-size 1 --dtypes float32",
    "linear-model": "--steps 4 --samples 1000 --batch-size 8",
    "forgetting": "--rank 2 --steps 2 --seeds 1 --held-out 3 --generated 1 --generated-tokens 4 --train-limit 6 "
    "--batch-size 2 --max-length 512",
    "recover": "--examples 2 --epochs 1 --seeds 1",
    "transfer": "--rank 2 --steps 2 --seeds 1 --held-out 3 --generated 1 --generated-tokens 4 --train-limit 6 "
    "--batch-size 2 --max-length 512",
    "trim": "--factors 1,0.5",
    "chat": "--max-new-tokens 4",
    "generate": "--max-new-tokens 4",
    "merge": "",
    "serve-check": "",
    "export": "",
    "compact": "",
    "gates": "--limit 4",
    "landscape": "",
}


def command_lines() -> list[tuple[str, str]]:
    """Page and command line, each line once."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.partition(" #")[0].strip().removeprefix("$ ")
                if words.startswith("dynalora "):
                    found.setdefault(" ".join(words.split()), page)
    return [(page, line) for line, page in found.items()]


def reason_not_run(line: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, line)), None)


def test_every_command_has_a_line_and_a_section_on_its_page() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    listing = page.partition("```\n")[2].partition("\n```")[0]
    assert sorted(line.split()[1] for line in listing.splitlines()) == sorted(COMMANDS)
    sections = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert not [name for name in COMMANDS if not any(name in section for section in sections)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages take as given, but for runs."""
    folder = tmp_path_factory.mktemp("workshop")
    for name in ("model", "Qwen/Qwen3-0.6B", "original", "tuned"):
        tiny.saved_model(folder / name)
    for name in ("model", "Qwen/Qwen3-0.6B"):
        # Prompts of the benchmarks are longer than the tiny model's own window.
        config = folder / name / "config.json"
        content = json.loads(config.read_text())
        config.write_text(json.dumps({**content, "max_position_embeddings": 2048}))
    # The demo's model, as it is kept once it was fetched.
    kept = tiny.saved_model(folder / "cache" / "models" / packaged_models._CONVERTED)
    packaged_models._seal(kept)
    tiny.write_jsonl(folder / "train.jsonl", [{"text": f"The number {number} is here."} for number in range(24)])
    (folder / "train.csv").write_text("prompt,response\n" + "".join(f"Say {n}.,It is {n}.\n" for n in range(16)))
    for name in ("held-out", "math", "math-test", "code", "tickets"):
        tiny.write_jsonl(folder / f"{name}.jsonl", tiny.rows(8))
    for name in ("wiki.txt", "contracts.txt"):
        (folder / name).write_text("A passage.\n\nAnother passage.\n")
    (folder / "first.yaml").write_text(
        "model: Qwen/Qwen3-0.6B\ndata: train.jsonl\noutput: runs/first\nmethod: disel\nr: 16\nepochs: 2\n"
    )
    benchmark_files.write(folder / "benchmarks")
    (trained,) = (folder / "benchmarks").rglob("openbookqa.train.jsonl*")
    content = gzip.decompress(trained.read_bytes()) if trained.suffix == ".gz" else trained.read_bytes()
    questions = [json.loads(row) for row in content.decode().splitlines()]
    others = [{**row, "instruction": row["instruction"].replace("legs", "arms")} for row in questions]
    tiny.write_jsonl(trained.parent / "openbookqa.test.jsonl", others)
    (folder / "data").mkdir()
    for name in ("ARC-Easy", "openbookqa", "gsm8k"):
        for file in (folder / "benchmarks").rglob(f"{name}.*"):
            shutil.copy(file, folder / "data" / file.name)
    return folder


@pytest.fixture
def run(
    workshop: Path, program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, Path], Shown]:
    """Run a command line in a folder."""
    monkeypatch.setenv("DYNALORA_CACHE", str(workshop / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    # Cells in processes of their own, each of which imports torch, are run in tests/unit/test_compare.py.
    monkeypatch.setattr(compare_run, "Runner", InProcessRunner)
    # Whether the Hub's own cache has the demo's model is no business of these tests.
    monkeypatch.setattr(packaged_models, "_hub_snapshot", lambda *_, **__: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("Say 3.\n/base\nSay 3.\n"))  # what is typed in a chat

    def start(line: str, folder: Path) -> Shown:
        monkeypatch.chdir(folder)
        words = shlex.split(line)
        assert words[0] == "dynalora"
        more = SHORTER[words[1]]
        if "--methods" in words:  # lists of a flag that is given twice are joined
            more = more.replace("--methods lora,dira ", "")
        if words[1] == "finetune" and "--epochs" not in line:
            more += " --steps 2"
        shown = program(*words[1:], *shlex.split(more))
        assert shown.code == 0, f"{line}\n{shown.err[-3000:]}"
        assert "Traceback" not in shown.err
        return shown

    return start


def run_before(name: str, workshop: Path, run: Callable[[str, Path], Shown]) -> Path:
    """The folder of a run that a line takes up: the README's own first run, or the same with the method in its name."""
    method = name.rpartition("/")[2]
    folder = workshop / "runs" / (method if method in method_names() else "first")
    if not folder.exists():
        pages = [(page, line) for page, line in command_lines() if line.startswith("dynalora finetune")]
        assert pages[0][0] == "README.md"
        line = pages[0][1].replace("runs/first", f"runs/{folder.name}")
        run(f"{line} --method {method}" if method in method_names() else line, workshop)
    return folder


@pytest.mark.parametrize(
    ("page", "line"),
    [
        pytest.param(page, line, marks=() if line in SMOKE else pytest.mark.slow, id=f"{page}-{line[:80]}")
        for page, line in command_lines()
    ],
)
def test_command_lines_run_as_printed(
    page: str, line: str, workshop: Path, run: Callable[[str, Path], Shown], tmp_path: Path
) -> None:
    reason = reason_not_run(line)
    if reason is not None:
        pytest.skip(reason)
    for entry in workshop.iterdir():
        if entry.name != "runs":
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "runs").mkdir()
    writes = set(re.findall(r"(?:-o|--output) (\S+)", line))
    for name in set(re.findall(r"runs/[\w-]+", line)) - writes:
        shutil.copytree(run_before(name, workshop, run), tmp_path / name)
    if "merge lora-for-serving" in line:  # which the page has written in the line before
        shutil.copytree(run_before("runs/dira", workshop, run), tmp_path / "runs" / "dira")
        run("dynalora export runs/dira lora-for-serving", tmp_path)
    run(line, tmp_path)
    for name in writes:
        assert (tmp_path / name).exists() is ("--dry-run" not in line)


def test_reasons_are_for_lines_that_there_are() -> None:
    lines = [line for _, line in command_lines()]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, line) for line in lines), pattern
    assert len([line for line in lines if reason_not_run(line) is None]) >= 40
    assert set(SMOKE) <= set(lines)
