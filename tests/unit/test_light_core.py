"""A plain installation: what `import dynalora`, training, saving and loading do without the packages of the extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dynalora
from dynalora.common.extras import require
from dynalora.errors import UnsupportedError

# yaml, filelock and jinja2 come with transformers and torch, so they are refused to dynalora only.
BLOCKED = """
import builtins, sys

OPTIONAL = {"matplotlib", "datasets", "rich", "typer", "scipy", "pandas", "sklearn", "trl"}
for name in OPTIONAL:
    sys.modules[name] = None
plain_import = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if importer.split(".")[0] == "dynalora" and level == 0 and name.split(".")[0] in {"yaml", "filelock", "jinja2"}:
        raise ModuleNotFoundError(f"{importer} imports {name}")
    return plain_import(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
"""

TRAIN = """
import tempfile

import peft
import torch
from torch import nn

import dynalora

for name in ("DiraConfig", "DiselConfig", "DisloraConfig", "PedyraConfig"):
    torch.manual_seed(0)
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    config = getattr(dynalora, name)(r=3, target_modules=["0", "2"], total_steps=20)
    model = peft.get_peft_model(base(), config)
    optimizer = torch.optim.AdamW(dynalora.param_groups(model, lr=1e-2))
    x = torch.randn(5, 6)
    before = model(x).detach()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    model.eval()
    assert not torch.equal(model(x), before), name
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(base(), folder).eval()
    assert torch.equal(loaded(x), model(x)), name
    assert len(dynalora.rank_landscape(model)) == 2
    dynalora.state_report(model)
import sys
assert "dynalora.drawing.notebook" not in sys.modules
assert "<table" in dynalora.rank_landscape(model)._repr_html_()  # without the picture
try:
    dynalora.plot_rank_landscape(dynalora.rank_landscape(model))
except dynalora.DynaloraError as error:
    message = str(error)
assert "needs the package matplotlib" in message, message
assert "pip install 'dynalora[lab]'" in message and "pip install '.[lab]'" in message, message
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


def test_training_saving_and_loading_need_no_extra() -> None:
    run(BLOCKED + TRAIN)


def test_the_guard_of_this_file_works() -> None:
    with pytest.raises(AssertionError, match="imports yaml"):
        run(BLOCKED + "import dynalora.lab.settings")


def test_every_public_name_is_there_and_typed() -> None:
    source = Path(str(dynalora.__file__)).read_text(encoding="utf-8")
    for name in dynalora.__all__:
        assert getattr(dynalora, name).__name__ == name
        assert name in dir(dynalora)
        assert name in source
    with pytest.raises(AttributeError, match="no_such_name"):
        dynalora.no_such_name  # noqa: B018


def test_what_is_missing_is_named_with_its_package_and_extra() -> None:
    with pytest.raises(
        UnsupportedError, match=r"^A quiz needs the package nowhere, which .*'dynalora\[demo\]'.*'\.\[demo\]'"
    ):
        require("nowhere.at_all", "A quiz", "demo")
    assert require("math", "Counting").sqrt(4) == 2
