"""How the program and the package start: what is imported when, counted in modules and not in seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynalora.cli.commands import COMMANDS
from dynalora.lab import choices
from dynalora.lab.baselines import BASELINES
from dynalora.methods import METHODS
from tests.conftest import PythonRunner

SOURCE = Path(__file__).parents[2] / "src"
HEAVY = (
    "torch", "peft", "transformers", "numpy", "datasets", "matplotlib", "scipy", "accelerate", "huggingface_hub",
    "pydantic",
)  # fmt: skip
# Runs the program and says at its end which of the slow libraries it has loaded.
REPORTING = f"""
import atexit, sys
atexit.register(lambda: print("LOADED", *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr))
"""
SCRIPT = REPORTING + "import dynalora_program; dynalora_program.main()"


def started(*arguments: str, script: str = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
    )  # fmt: skip


def light(done: subprocess.CompletedProcess[str]) -> bool:
    return done.stderr.rstrip().splitlines()[-1] == "LOADED"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)])
def test_help_and_version_load_no_slow_library(arguments: list[str]) -> None:
    done = started(*arguments)
    assert light(done), done.stderr
    assert ("dynalora 0." if arguments == ["--version"] else "Usage: ") in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["finetun"], "Did you mean 'finetune'"),
        (["finetune", "--modle", "x"], "--model"),
        (["finetune", "--model", "a", "--data", "b", "-o", "c", "--lr", "-1"], "--lr is -1"),
        (["trim", "a", "b"], "--max-kl"),
        (["bench", "--methods", "lro"], "Unknown method 'lro'"),
        (["finetune", "--config", "nowhere.yaml"], "cannot be read"),
    ],
)
def test_mistakes_are_told_before_a_slow_library_is_loaded(arguments: list[str], says: str) -> None:
    done = started(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert light(done), done.stderr


@pytest.mark.parametrize(("words", "completed"), [("dynalora fin", "finetune"), ("dynalora bench --me", "--methods")])
def test_completion_loads_no_slow_library(words: str, completed: str) -> None:
    done = started(
        script=SCRIPT.replace("dynalora_program.main()", "sys.argv = ['dynalora']; dynalora_program.main()"),
        _DYNALORA_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")),
    )  # fmt: skip
    assert completed in done.stdout.split()
    assert light(done), done.stderr


@pytest.mark.parametrize(
    ("arguments", "read"), [(["--help"], ""), (["finetun"], ""), (["push", "--help"], "dynalora.jobs.push.settings")]
)
def test_settings_are_read_of_the_command_that_is_called_alone(arguments: list[str], read: str) -> None:
    reporting = """
import atexit, sys
jobs = lambda: [name for name in sys.modules if name.startswith("dynalora.jobs.") and name.endswith(".settings")]
atexit.register(lambda: print("READ", *jobs(), file=sys.stderr))
import dynalora_program; dynalora_program.main()
"""
    done = started(*arguments, script=reporting)
    assert done.stderr.rstrip().splitlines()[-1] == f"READ {read}".rstrip()


def test_python_m_dynalora_is_the_program() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONVERBOSE": ""}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dynalora", "finetune", "--help"],
        capture_output=True, text=True, timeout=300, check=True, env=environment,
    )  # fmt: skip
    assert "--learning-rate" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dynalora.cli.program" in imported
    assert imported.isdisjoint(HEAVY)


def test_another_module_that_is_run_gets_the_methods_at_once(tmp_path: Path) -> None:
    """`python -m` of a user's package, whose `__init__` imports dynalora before Python has found the module."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import sys, dynalora\nassert sys.argv[0] == '-m'\n")
    (tmp_path / "mine" / "__main__.py").write_text(
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\nprint('DISEL' in known)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mine", "dynalora"], capture_output=True, text=True, timeout=300, check=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{tmp_path}"},
    )  # fmt: skip
    assert done.stdout == "True\n"


@pytest.mark.parametrize("order", ["import dynalora, peft", "import peft, dynalora", "import dynalora; import peft"])
def test_the_library_registers_its_methods_in_any_order(run_python: PythonRunner, order: str, tmp_path: Path) -> None:
    run_python(
        f"""
        {order}
        import torch, transformers
        from torch import nn
        model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), dynalora.DiselConfig(r=2, target_modules=["0"]))
        model.save_pretrained({str(tmp_path)!r})
        loaded = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), {str(tmp_path)!r})
        assert loaded.peft_config["default"].peft_type == "DISEL"
        assert [c for c in transformers.trainer.DEFAULT_CALLBACKS if c.__module__.startswith("dynalora")]
        assert "DiselConfig" in dynalora.__all__ and "compact" in dir(dynalora)
        """
    )


def test_the_names_that_help_shows_are_the_methods() -> None:
    assert choices.own_methods() == sorted(METHODS)
    assert [*choices.PEFT_METHODS, "full"] == list(BASELINES)
