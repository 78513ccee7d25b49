"""The notebook runs as it is, and the page of the documentation is made from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dynalora.lab import packaged_models
from tests.scripts import load_script
from tests.unit import tiny

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "first_steps.ipynb"
PAGE = ROOT / "docs" / "first-steps.md"


def runner() -> Any:
    return load_script("examples/notebook.py")


def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    ran: dict[str, Any] = runner().run(json.loads(FILE.read_text(encoding="utf-8")), FILE.name)
    assert (tmp_path / "first-steps-adapter" / "adapter_model.safetensors").is_file()
    return ran


def test_the_notebook_runs_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged_models, "_hub_snapshot", lambda *_, **__: None)
    kept = tiny.saved_model(tmp_path / "cache" / "models" / packaged_models._CONVERTED)
    words = tiny.tokenizer()
    words.pad_token = words.eos_token
    words.save_pretrained(kept)
    packaged_models._seal(kept)
    ran = in_folder(tmp_path, monkeypatch)
    shown = [output for cell in ran["cells"] for output in cell.get("outputs", ())]
    pages = ["".join(output["data"]["text/html"]) for output in shown if "text/html" in output.get("data", {})]
    assert len(pages) == 4
    assert all("<table" in page for page in pages)
    assert sum("data:image/svg+xml" in page for page in pages) == 3
    text, pictures = runner().page_of(ran, "first_steps")
    assert len(pictures) == 3
    assert all(
        f"![What the cell shows]({name})" in text and content.startswith(b"<?xml") for name, content in pictures.items()
    )


@pytest.mark.slow
def test_the_notebook_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_folder(tmp_path, monkeypatch)


def test_the_page_has_the_notebook_with_its_outputs_and_pictures() -> None:
    notebook = json.loads(FILE.read_text(encoding="utf-8"))
    assert all(cell["outputs"] for cell in notebook["cells"] if "print(" in "".join(cell["source"]))
    text, pictures = runner().page_of(notebook, FILE.stem)
    assert PAGE.read_text(encoding="utf-8") == text
    assert "<img" not in text
    assert len(pictures) == 3
    for name, content in pictures.items():
        assert (PAGE.parent / name).read_bytes() == content
    assert not re.search(r"/(home|root|tmp|work)/", text)
