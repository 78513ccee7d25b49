"""Settings of `dynalora chat`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dynalora.lab.lab_settings import TrainedSettings
from dynalora.lab.settings import SEED, Setting


@dataclass(frozen=True, kw_only=True)
class ChatSpec(TrainedSettings):
    """Whom to talk to, and how it answers.

    Attributes:
        system: System message at the start of the conversation; None: what the model's chat template adds by itself.
        max_new_tokens: Number of tokens after which an answer is broken off.
        temperature: How freely words are drawn; 0 always takes the likeliest.
        seed: Seed with which words are drawn.
        plain: Go on with what is typed as plain text, without the chat format. A model without one does so anyway.
    """

    system: str | None = None
    max_new_tokens: Annotated[int, Setting(least=1)] = 512
    temperature: Annotated[float, Setting(least=0)] = 0.0
    seed: Annotated[int, SEED] = 42
    plain: bool = False
