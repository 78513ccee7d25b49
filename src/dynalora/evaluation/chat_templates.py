"""Chat templates, which may come from a stranger: does writing with one end, and in what size?

Jinja's sandbox keeps templates from the machine, but not from counting for ever or from writing without end, and
nothing in the process can stop them. Those that repeat something are therefore tried first on a short conversation, in
a process of its own with limits on its time and memory.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from dynalora.common.trial import tried
from dynalora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECONDS = 3
_MEMORY = 2**31
_LONGEST = 100_000  # characters of a conversation of two short messages
_REPEATS = re.compile(r"\*|\b(range|macro|center|format|indent)\b|%\d")
_TRY = """
import json, re, sys
from jinja2.sandbox import ImmutableSandboxedEnvironment
template, seconds, memory, longest = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except ImportError:
    pass
template = re.sub(r"{%-?\\s*(end)?generation\\s*-?%}", "", template)
turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
environment.filters["tojson"] = lambda value, **_: json.dumps(value)
environment.globals.update(raise_exception=lambda message: 1 / 0, strftime_now=lambda form: "today")
print("long", flush=True)
for messages, further in ((turns[:1], True), (turns, False)):
    try:
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=further, bos_token="<s>", eos_token="</s>", tools=None
        )
    except MemoryError:
        text = " " * (longest + 1)
    except Exception:  # what is wrong with it is said where it is used
        text = ""
    if len(text) > longest:
        print("large")
        sys.exit()
print("done")
"""


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer's chat template that does not come to an end.

    Args:
        tokenizer: With one template, several by name, or none.

    Raises:
        DataError: Writing two short messages takes too long, or more memory or characters than can be meant.
    """
    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, dict) else [template]:
        if not isinstance(text, str) or not (len(re.findall(r"\bfor\b", text)) > 1 or _REPEATS.search(text)):
            continue
        outcome = _tried(text)
        if outcome != "done":
            how = "takes too long to write" if outcome == "long" else "writes endless text for"
            raise DataError(
                f"The model's chat template {how} a conversation of two short messages; use another copy of the "
                "model, or set the tokenizer's chat_template to None, for a plain one."
            )


@functools.lru_cache(maxsize=8)
def _tried(template: str) -> str:
    """What becomes of a template: `done`, `long` or `large`."""
    words, ended = tried(_TRY, [template, _SECONDS, _MEMORY, _LONGEST], packages=True)
    if not ended:
        return "long"
    return words[-1] if words else "done"  # it could not be tried
