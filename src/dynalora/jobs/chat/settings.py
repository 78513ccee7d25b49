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
        system: Begin the conversation with this system message; None: what the model's chat template adds by itself.
        max_new_tokens: Break an answer off after this many tokens.
        temperature: Choose how freely words are drawn: 0 always takes the likeliest word, 1 draws as the model's
            probabilities say.
        seed: Draw words from this seed. The same seed gives the same answers.
        plain: Go on with what is typed as plain text, without the chat format. A model without one does so anyway.
    """

    system: Annotated[str | None, Setting(blank=True)] = None
    max_new_tokens: Annotated[int, Setting(least=1)] = 512
    temperature: Annotated[float, Setting(least=0)] = 0.0
    seed: Annotated[int, SEED] = 42
    plain: bool = False
