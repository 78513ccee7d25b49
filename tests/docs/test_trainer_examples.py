"""The scripts in ``examples/`` run as they are printed; each asserts that its method's own part ran."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# What a script needs that the package itself does not.
NEEDS = {
    "transformers_trainer": (),
    "trl_sft": ("trl",),
    "trl_dpo": ("trl",),
    "accelerate_loop": (),
    "lightning_module": ("lightning",),
    "sentence_transformers_adapter": ("sentence_transformers",),
}


@pytest.mark.parametrize("name", NEEDS)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed, which examples/{name}.py trains with")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert "assert dynalora" in (text := (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")) or "report.step" in text
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_every_example_is_run() -> None:
    helpers = {"tiny", "notebook"}  # a model, and what runs the notebook (test_notebook.py)
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*helpers, *NEEDS}
