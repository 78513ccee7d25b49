"""Settings of `dynalora generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dynalora.lab.lab_settings import TrainedSettings
from dynalora.lab.settings import Setting

_DATA = "Data in detail"


@dataclass(frozen=True, kw_only=True)
class GenerateSpec(TrainedSettings):
    """Which adapter answers which prompts, and where the answers go.

    Attributes:
        data: Answer these prompts: rows in the formats that `dynalora finetune` reads, whose responses may be missing,
            or a text file whose passages are continued.
        output: Write the answers into this file, a JSON object per line; it must not exist.
        base: Write what the base model answers, too.
        split: Read this split of the data.
        subset: Take this subset (configuration) of a data set on the Hub that has several.
        limit: Use only this many rows, from the first; None: all.
        prompt_field: Read prompts from this field of every row; None: recognised by its usual names.
        response_field: Copy responses from this field beside the answers; None: recognised by its usual names.
        input_field: Read text that follows the prompt from this field, where there is one; None: recognised by its
            usual names.
        messages_field: Read chat messages from this field, instead of prompt, input and response; None: recognised by
            its usual names.
        text_field: Read plain text, which is continued, from this field; None: recognised by its usual names.
        system: Begin every prompt with this system message; None: what the model's chat template adds by itself.
        max_new_tokens: Break an answer off after this many tokens.
        batch_size: Answer this many prompts at once. A smaller number takes less memory.
        plain: Go on with the prompts as plain text, without the chat format. A model without one does so anyway.
    """

    data: Annotated[str, Setting("-d", place=True)]
    output: Annotated[str, Setting("-o", writes="file")]
    base: bool = False
    split: Annotated[str, Setting(panel=_DATA)] = "train"
    subset: Annotated[str | None, Setting(panel=_DATA)] = None
    limit: Annotated[int | None, Setting(least=1, panel=_DATA)] = None
    prompt_field: Annotated[str | None, Setting(panel=_DATA)] = None
    response_field: Annotated[str | None, Setting(panel=_DATA)] = None
    input_field: Annotated[str | None, Setting(panel=_DATA)] = None
    messages_field: Annotated[str | None, Setting(panel=_DATA)] = None
    text_field: Annotated[str | None, Setting(panel=_DATA)] = None
    system: Annotated[str | None, Setting(blank=True)] = None
    max_new_tokens: Annotated[int, Setting(least=1)] = 256
    batch_size: Annotated[int, Setting("-b", least=1)] = 8
    plain: bool = False
