"""The prompt formats of papers, as chat templates, so that training, generation and scoring write the very same text.

A format is installed in a tokenizer with [`use_template`][dynalora.evaluation.prompts.use_template]; whatever asks
the tokenizer for its chat template then writes in that format, and so does whoever loads the tokenizer saved with an
adapter.

| name | format | source |
|---|---|---|
| `chat` | the model's own chat template | the model |
| `none` | the bare question, the answer behind it | – |
| `alpaca` | Stanford Alpaca's training prompt | Taori et al., 2023, `train.py` |
| `metamath` | MetaMath's evaluation prompt, Alpaca's with a first sentence of the response | Yu et al., 2023 |
| `magicoder` | Magicoder's `@@ Instruction`, `@@ Response` | Wei et al., 2023 |
| `llm-adapters` | LLM-Adapters' training prompt, indentation included | Hu et al., 2023, `finetune.py` |

LLM-Adapters evaluates with one space where it trains with two (before the first line break); here both have two.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynalora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_INDENT = " " * 16


@dataclass(frozen=True)
class Template:
    """A prompt format for one instruction and its response.

    Attributes:
        name: How it is asked for.
        plain: The prompt, with `{instruction}`.
        with_input: The prompt where an input comes with the instruction, with `{instruction}` and `{input}`; empty:
            the input follows the instruction after an empty line.
    """

    name: str
    plain: str
    with_input: str = ""

    def prompt(self, instruction: str, input: str = "") -> str:
        """The text that the model is given, without its first special token.

        Args:
            instruction: What to do.
            input: What to do it with; empty: nothing.
        """
        if not input.strip():
            return self.plain.replace("{instruction}", instruction)
        if not self.with_input:
            return self.plain.replace("{instruction}", f"{instruction}\n\n{input}")
        head, tail = self.with_input.split("{input}")
        return head.replace("{instruction}", instruction) + input + tail

    @property
    def chat_template(self) -> str:
        """The same as a Jinja chat template: user and assistant in turn, the end token behind each response."""

        def written(text: str, names: dict[str, str]) -> str:
            for place, name in names.items():
                text = text.replace(place, f"\0{name}\0")
            parts = text.split("\0")
            return "".join(
                f"{{{{ {part} }}}}" if index % 2 else f"{{{{ {json.dumps(part)} }}}}"
                for index, part in enumerate(parts)
                if part
            )

        plain = written(self.plain, {"{instruction}": "message['content']"})
        if self.with_input:
            both = written(self.with_input, {"{instruction}": "message['instruction']", "{input}": "message['input']"})
            plain = f"{{% if message['input'] is defined %}}{both}{{% else %}}{plain}{{% endif %}}"
        return (
            "{% for message in messages %}"
            "{% if loop.first and bos_token %}{{ bos_token }}{% endif %}"
            f"{{% if message['role'] == 'user' %}}{plain}"
            "{% elif message['role'] == 'assistant' %}{{ message['content'] + (eos_token or '') }}"
            "{% else %}{{ raise_exception('the prompt template "
            + self.name
            + " knows the roles user and assistant only') }}{% endif %}"
            "{% endfor %}"
        )


TEMPLATES = {
    template.name: template
    for template in (
        Template("none", "{instruction}"),
        Template(
            "alpaca",
            f"{_ALPACA}\n\n### Instruction:\n{{instruction}}\n\n### Response:",
            f"{_ALPACA_INPUT}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:",
        ),
        Template(
            "metamath", f"{_ALPACA}\n\n### Instruction:\n{{instruction}}\n\n### Response: Let's think step by step."
        ),
        Template(
            "magicoder",
            "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
            "responses to user instructions.\n\n@@ Instruction\n{instruction}\n\n@@ Response\n",
        ),
        Template(
            "llm-adapters",
            f"{_ALPACA}  \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n"
            f"{_INDENT}### Response:\n{_INDENT}",
            f"{_ALPACA_INPUT} \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n"
            f"{_INDENT}### Input:\n{_INDENT}{{input}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}",
        ),
    )
}
"""The fixed formats by name; `chat` is none of them."""


def use_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make a tokenizer write prompts in a paper's format.

    Args:
        tokenizer: Changed in place; it is saved with its template.
        name: One of [`TEMPLATES`][dynalora.evaluation.prompts.TEMPLATES], or `chat`, which leaves the tokenizer as it
            is.

    Raises:
        ConfigError: There is no such template.
    """
    if name == "chat":
        return
    if name not in TEMPLATES:
        raise ConfigError(f"There is no prompt template '{name}'; choose one of chat, {', '.join(TEMPLATES)}.")
    tokenizer.chat_template = TEMPLATES[name].chat_template
