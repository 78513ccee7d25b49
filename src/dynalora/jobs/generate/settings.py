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
        data: Prompts: rows in the formats that `dynalora finetune` reads, whose responses may be missing, or a text
            file whose passages are continued.
        output: File to write, a JSON object per line; it must not exist.
        base: Write what the base model answers, too.
        split: Split of the data that is read.
        subset: Configuration of a data set on the Hub.
        limit: Number of rows to use, from the first; None: all.
        prompt_field: Field with the prompt; None: recognised by its usual names.
        response_field: Field with a response to copy beside the answer; None: recognised by its usual names.
        input_field: Optional field whose text follows the prompt; None: recognised by its usual names.
        messages_field: Field with chat messages, instead of the three above; None: recognised by its usual names.
        text_field: Field with plain text to go on with; None: recognised by its usual names.
        system: System message before every prompt; None: what the model's chat template adds by itself.
        max_new_tokens: Number of tokens after which an answer is broken off.
        batch_size: Number of prompts that are answered at once.
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
    system: str | None = None
    max_new_tokens: Annotated[int, Setting(least=1)] = 256
    batch_size: Annotated[int, Setting("-b", least=1)] = 8
    plain: bool = False
