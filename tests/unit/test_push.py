"""`dynalora push`: what is uploaded, and what is said where it cannot be; the Hub's interface is replaced."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from dynalora.jobs.push.run import FILES
from tests.unit.program import Program, program

__all__ = ["program"]  # a fixture

BASE = "/home/me/models/base"


class Hub:
    """Takes the place of the Hub: keeps what is uploaded, or fails as it is told to."""

    def __init__(self, held: tuple[str, ...] = (), error: Exception | None = None) -> None:
        self.held, self.error = held, error
        self.made: dict[str, Any] = {}
        self.files: dict[str, str] = {}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.made = {"repo_id": repo_id, **options}

        class Url(str):
            pass

        url = Url(f"https://huggingface.co/me/{repo_id}")
        url.repo_id = f"me/{repo_id}"  # type: ignore[attr-defined]
        return url

    def list_repo_files(self, repo_id: str) -> list[str]:
        return [".gitattributes", *self.held]

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        self.files = {file.name: file.read_text() for file in Path(folder_path).iterdir()}
        return SimpleNamespace()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": BASE, "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"base_model.model.q_proj.lora_A.weight": zeros(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "README.md").write_text(f"---\nbase_model: {BASE}\ntags:\n- base_model:adapter:{BASE}\n---\n# Mine\n")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "passwords.json").write_text("secret")
    (folder / "adapter_model.safetensors.tmp").write_text("half")
    return tmp_path / "run"


@pytest.fixture
def push(adapter: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> Any:
    # Only text is looked at here; weights are bytes.
    monkeypatch.setattr(Path, "read_text", lambda self, **_: self.read_bytes().decode("utf-8", "replace"))

    def run(hub: Hub, *flags: str) -> Any:
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
        return program("push", str(adapter), "my-adapter", *flags)

    return run


def test_only_what_belongs_to_an_adapter_is_uploaded_and_in_private(push: Any, adapter: Path) -> None:
    hub = Hub()
    shown = push(hub, "--base-model", "org/base")
    assert shown.code == 0, shown.err
    assert hub.made == {"repo_id": "my-adapter", "private": True, "exist_ok": True}
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"}
    assert set(hub.files) == expected
    assert BASE not in "".join(hub.files.values())
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert "base_model:adapter:org/base" in hub.files["README.md"]
    assert "https://huggingface.co/me/my-adapter" in shown.out
    assert "dynalora chat me/my-adapter" in shown.out
    # The adapter itself is as it was.
    assert BASE in (adapter / "adapter" / "README.md").read_text()
    assert len(set(FILES)) == len(FILES)


def test_everyone_sees_it_only_if_asked_for(push: Any) -> None:
    hub = Hub()
    assert push(hub, "--public", "--base-model", "org/base").code == 0
    assert hub.made["private"] is False


def test_a_base_model_in_a_folder_is_named_before_anything_is_made(push: Any) -> None:
    hub = Hub()
    shown = push(hub)
    assert shown.code == 2
    assert f"by the folder '{BASE}', which only this machine has" in shown.err.replace("\n", " ")
    assert "Hub id of that model" in shown.err
    assert hub.made == {}


def test_a_repository_that_holds_something_is_left_alone(push: Any) -> None:
    hub = Hub(held=("adapter_config.json",))
    shown = push(hub, "--base-model", "org/base")
    assert (shown.code, hub.files) == (2, {})
    assert "holds something already (adapter_config.json)" in shown.err
    assert push(hub, "--base-model", "org/base", "--update").code == 0
    assert hub.files


def test_a_dry_run_shows_what_would_be_uploaded_and_asks_nobody(push: Any, adapter: Path) -> None:
    hub = Hub(error=AssertionError("the Hub was asked"))
    shown = push(hub, "--base-model", "org/base", "--dry-run")
    assert shown.code == 0, shown.err
    done = Hub()
    push(done, "--base-model", "org/base")
    listed = dict(re.findall(r"^ *([\w.]+\.(?:json|md|safetensors)) +([\d,]+) *$", shown.out, re.MULTILINE))
    assert set(listed) == set(done.files)
    assert int(listed["README.md"]) == len(done.files["README.md"])
    assert "Would be uploaded to my-adapter, of whoever is logged in" in shown.out
    assert "private" in shown.out
    assert "# Mine" in shown.out
    assert "everyone could see it" in push(hub, "--base-model", "org/base", "--dry-run", "--public").out


def test_a_dry_run_refuses_what_an_upload_would(push: Any, adapter: Path, program: Program) -> None:
    hub = Hub()
    shown = push(hub, "--dry-run")
    assert (shown.code, hub.made) == (2, {})
    assert "which only this machine has" in shown.err
    shown = program("push", str(adapter), "my adapter!", "--base-model", "org/base", "--dry-run")
    assert shown.code == 2
    assert "REPO is 'my adapter!', which the Hub does not take" in shown.err
    (adapter / "adapter" / "README.md").unlink()
    assert "There is no card" in push(hub, "--base-model", "org/base", "--dry-run").out


# The library that the Hub's client sends requests with, which has changed its name.
httpx: Any = importlib.import_module(HfHubHTTPError.__mro__[1].__module__)
RESPONSE = httpx.Response(403, request=httpx.Request("POST", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OfflineModeIsEnabled("offline mode is enabled"), "The Hub cannot be reached (offline mode is enabled)"),
        (httpx.ConnectError("no route"), "The Hub cannot be reached (no route); try again when online"),
        (LocalTokenNotFoundError("no token"), "Nobody is logged in to the Hub; run: hf auth login"),
        (HfHubHTTPError("403 Forbidden", response=RESPONSE), "The Hub refuses 'my-adapter' (403 Forbidden)"),
    ],
)
def test_what_the_hub_does_not_do_is_said_in_a_sentence(error: Exception, words: str, push: Any) -> None:
    shown = push(Hub(error=error), "--base-model", "org/base")
    assert shown.code == 2
    assert shown.err.startswith(f"Error: {words}")
    assert "lies unchanged" in shown.err
    assert shown.err.count("\n") == 1


def test_the_real_client_says_that_it_is_offline(adapter: Path, program: Program) -> None:
    shown = program("push", str(adapter), "my-adapter", "--base-model", "org/base")
    assert shown.code == 2
    assert "The Hub cannot be reached" in shown.err
    shown = program("push", str(adapter), "my adapter!", "--base-model", "org/base")
    assert shown.code == 2
    assert "--repo" not in shown.err
    assert "REPO is 'my adapter!', which the Hub does not take" in shown.err
