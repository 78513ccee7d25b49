"""`dynalora push`: an adapter's files on the Hugging Face Hub, uploaded by the Hub's own client."""

from __future__ import annotations

import fnmatch
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from rich.console import Console

from dynalora.common.names import is_path
from dynalora.errors import ConfigError, HubError, first_line
from dynalora.jobs.push.settings import PushSpec
from dynalora.lab.adapters import adapter_folder
from dynalora.lab.report import Table, say

FILES = (
    "adapter_config.json", "adapter_model.safetensors", "README.md", "rank_map.png", "tokenizer*", "vocab.*",
    "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja", "spiece.model",
)  # fmt: skip
"""What belongs to an adapter; nothing else that lies in its folder is uploaded."""
CARD = "README.md"
_SHOWN = 20
"""Lines of the card that a dry run shows."""


@dataclass(frozen=True)
class PushPlan:
    """What a push uploads.

    Attributes:
        files: The size of each file, in bytes, by name.
        card: The text of the card; empty: there is none.
    """

    files: dict[str, int]
    card: str


def run_push(spec: PushSpec, *, console: Console) -> None:
    """Upload, and say where the adapter is now; or say what would be uploaded."""
    if spec.dry_run:
        _show(plan_push(spec.adapter, spec.repo, base_model=spec.base_model), spec, console)
        return
    url = push(
        spec.adapter,
        spec.repo,
        public=spec.public,
        base_model=spec.base_model,
        update=spec.update,
        message=spec.message,
    )
    say(console, f"{url}: the adapter, its tokenizer and its card.")
    say(console, f"Try it where it was not trained: dynalora chat {url.partition('.co/')[2] or spec.repo}")


def _show(plan: PushPlan, spec: PushSpec, console: Console) -> None:
    """Say what would be uploaded where to."""
    whose = "" if "/" in spec.repo else ", of whoever is logged in"
    seen = "everyone could see it" if spec.public else "private"
    say(
        console,
        Table(
            ["file", "bytes"], [[name, size] for name, size in plan.files.items()],
            title=f"Would be uploaded to {spec.repo}{whose}",
            note=f"{sum(plan.files.values()):,} bytes in all, as the commit '{spec.message}'; the repository, where it "
            f"would have to be made: {seen}.",
        ),
    )  # fmt: skip
    lines = plan.card.splitlines()
    if lines:
        say(console, "The card begins:", *(f"  {line}" for line in lines[:_SHOWN]), *["  …"] * (len(lines) > _SHOWN))
    else:
        say(console, f"There is no card ({CARD}).")
    say(console, "Nothing was uploaded, and the Hub was not asked whether it would take it.")


def plan_push(source: str, repo: str, *, base_model: str | None = None) -> PushPlan:
    """What [`push`][dynalora.jobs.push.run.push] would upload; the Hub is not asked.

    Args:
        source: Run folder or adapter folder.
        repo: Repository, as `NAME` or `OWNER/NAME`.
        base_model: Hub id of the base model, in the place of the folder that the adapter names.

    Raises:
        CheckpointError: There is no adapter, or it is damaged.
        ConfigError: The repository's name, or the base model is a folder and `base_model` is not given.
    """
    with _gathered(Path(adapter_folder(source)), base_model) as place:
        _check_name(repo)
        files = {file.name: file.stat().st_size for file in sorted(place.iterdir())}
        card = place / CARD
        return PushPlan(files, card.read_text(encoding="utf-8", errors="replace") if card.exists() else "")


def push(
    source: str,
    repo: str,
    *,
    public: bool = False,
    base_model: str | None = None,
    update: bool = False,
    message: str = "Upload adapter",
) -> str:
    """Upload an adapter with its tokenizer and its card.

    Args:
        source: Run folder or adapter folder.
        repo: Repository, as `NAME` or `OWNER/NAME`; it is made if need be.
        public: Whether everyone can see the repository that is made.
        base_model: Hub id of the base model, in the place of the folder that the adapter names.
        update: Whether it may hold something already.
        message: First line of the commit.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: There is no adapter, or it is damaged.
        ConfigError: The repository's name, or the base model is a folder and `base_model` is not given.
        HubError: The Hub cannot be reached, refuses, or the repository holds something.
    """
    folder = Path(adapter_folder(source))
    with _gathered(folder, base_model) as place:
        _check_name(repo)
        try:
            return _upload(place, repo, private=not public, update=update, message=message)
        except (ConnectionError, OfflineModeIsEnabled, TimeoutError) as error:
            raise HubError(_unreachable(folder, error)) from error
        except LocalTokenNotFoundError as error:
            raise HubError(f"Nobody is logged in to the Hub; run: hf auth login. {_unchanged(folder)}") from error
        except HfHubHTTPError as error:
            raise HubError(
                f"The Hub refuses '{repo}' ({first_line(error)}); check its name and your rights (hf auth whoami). "
                f"{_unchanged(folder)}"
            ) from error
        except Exception as error:  # the client's own and its transport's, of which no list is promised
            if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
                raise
            raise HubError(_unreachable(folder, error)) from error


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(
            f"repo is '{repo}', which the Hub does not take ({first_line(error)}); give NAME or OWNER/NAME."
        ) from error


def _unreachable(folder: Path, error: Exception) -> str:
    return f"The Hub cannot be reached ({first_line(error)}); try again when online. {_unchanged(folder)}"


def _unchanged(folder: Path) -> str:
    return f"The adapter lies unchanged in '{folder}'."


@contextmanager
def _gathered(folder: Path, base_model: str | None) -> Iterator[Path]:
    """A temporary folder with all that is uploaded of an adapter."""
    with tempfile.TemporaryDirectory(prefix="dynalora-push-") as place:
        _gather(folder, Path(place), base_model)
        yield Path(place)


def _gather(folder: Path, place: Path, base_model: str | None) -> None:
    """Copy an adapter's files to a place, with the base model's name as others know it."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in FILES):
            shutil.copyfile(file, place / file.name)
    settings = place / "adapter_config.json"
    content: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    named = str(content.get("base_model_name_or_path") or "")
    if base_model is None:
        if is_path(named) or Path(named).exists():
            raise ConfigError(
                f"The adapter names its base model by the folder '{named}', which only this machine has; give "
                "base_model, the Hub id of that model."
            )
        return
    content["base_model_name_or_path"] = base_model
    settings.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    card = place / CARD
    if card.exists() and named:
        card.write_text(card.read_text(encoding="utf-8").replace(named, base_model), encoding="utf-8")


def _upload(place: Path, repo: str, *, private: bool, update: bool, message: str) -> str:
    api = huggingface_hub.HfApi()
    made = api.create_repo(repo, private=private, exist_ok=True)
    held = [name for name in api.list_repo_files(made.repo_id) if name != ".gitattributes"]
    if held and not update:
        raise HubError(
            f"The repository '{made.repo_id}' holds something already ({held[0]}); choose another name, or give update "
            "to add a commit."
        )
    api.upload_folder(repo_id=made.repo_id, folder_path=str(place), commit_message=message)
    return str(made)
