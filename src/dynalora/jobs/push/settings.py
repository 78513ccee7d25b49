"""Settings of `dynalora push`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dynalora.lab.settings import Setting, Settings


@dataclass(frozen=True, kw_only=True)
class PushSpec(Settings):
    """Which adapter to upload, and where to.

    Attributes:
        adapter: Upload this adapter: a run folder or an adapter folder.
        repo: Upload into this repository on the Hugging Face Hub, NAME or OWNER/NAME; it is made if need be.
        public: Let everyone see the repository that is made. Otherwise only its owner can.
        base_model: Write this Hub id of the base model into the card, where the adapter names a folder of this machine.
        update: Upload into a repository that holds something, as a new commit.
        message: Give the commit this first line.
        dry_run: Show what would be uploaded: the repository, the files with their sizes, and how the card begins. The
            Hub is not asked.
    """

    adapter: Annotated[str, Setting(positional=True, metavar="RUN", home=True)]
    repo: Annotated[str, Setting(positional=True, metavar="REPO")]
    public: Annotated[bool, Setting(negative="--private")] = False
    base_model: str | None = None
    update: bool = False
    message: str = "Upload adapter"
    dry_run: bool = False
