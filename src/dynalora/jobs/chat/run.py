"""`dynalora chat`: talk to an adapter in the terminal, and hear what its base model would have said."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from dynalora.common.names import did_you_mean
from dynalora.errors import DataError, DynaloraError
from dynalora.evaluation.causal import continued, prompt_length
from dynalora.evaluation.generation import end_ids, evaluating, padding_id
from dynalora.evaluation.tokens import PLAIN, Conversation, Message, prompt_ids
from dynalora.evaluation.windows import model_window
from dynalora.forgetting.base_model import adapters_off
from dynalora.jobs.chat.settings import ChatSpec
from dynalora.jobs.finetune.trained import load_trained
from dynalora.lab.report import say

COMMANDS = {
    "/base": "talk to the base model, or to the adapter again, each in a conversation of its own",
    "/reset": "forget what was said",
    "/help": "show these commands",
    "/quit": "leave (as does Ctrl-D); Ctrl-C breaks an answer off",
}
"""What can be typed instead of a message, with what it does."""


class _Pieces(TextStreamer):
    """Hands a text on as it is written, word by word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self._written = written

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if text:
            self._written(text)


class Chat:
    """A conversation with an adapted model.

    Args:
        model: The adapter on its base model.
        tokenizer: Its tokenizer; with a chat template it writes the conversation as in training.
        system: System message at the start; empty: none, so that a chat template may add its own.
        max_new_tokens: Number of tokens after which an answer is broken off.
        temperature: How freely words are drawn; 0 always takes the likeliest.
        plain: Whether every message is text to go on with, by itself, without the chat format.

    Attributes:
        base: Whether the base model answers, with the adapter switched off. Adapter and base model have a conversation
            each: an answer of the other's before it would be taken up.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str = "",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        plain: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.plain = plain or not tokenizer.chat_template
        self.base = False
        self._system: Conversation = [{"role": "system", "content": system}] if system and not self.plain else []
        self.reset()

    @property
    def turns(self) -> Conversation:
        """What was said so far to the one that answers; of plain text nothing is kept."""
        return self._turns[self.base]

    @turns.setter
    def turns(self, turns: Conversation) -> None:
        self._turns[self.base] = turns

    def reset(self) -> None:
        """Forget what was said, to the adapter and to the base model."""
        self._turns: dict[bool, Conversation] = {base: list(self._system) for base in (False, True)}

    def answer(self, message: str, written: Callable[[str], None] = lambda _: None) -> str:
        """What the model says to a message.

        Args:
            message: The user's.
            written: Called with every piece of the answer as it is written.

        Returns:
            The answer, which is then part of the conversation. Interrupted, it is what was written until then.

        Raises:
            DataError: The conversation is longer than the model's window, or its chat template rejects it.
        """
        said: Message = {"role": PLAIN if self.plain else "user", "content": message}
        ids = prompt_ids([*self.turns, said], self.tokenizer, plain=self.plain)
        room = model_window(self.model, self.tokenizer) - prompt_length(self.model) - len(ids)
        if room < 1:
            raise DataError(
                f"The conversation has {len(ids):,} tokens, which is all that the model can take; type /reset to start "
                "a new one."
            )
        pieces = _Pieces(self.tokenizer, written)
        with contextlib.suppress(KeyboardInterrupt):
            self._write(ids, min(self.max_new_tokens, room), pieces)
        if not self.plain:
            self.turns += [said, {"role": "assistant", "content": pieces.text.strip()}]
        return pieces.text

    def _write(self, ids: list[int], length: int, pieces: _Pieces) -> None:
        device = next(self.model.parameters()).device
        tokens = torch.tensor([ids], device=device)
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature > 0:
            drawn = {"do_sample": True, "temperature": self.temperature}
        off = adapters_off(self.model) if self.base else contextlib.nullcontext()
        with off, evaluating(self.model), torch.inference_mode():
            continued(
                self.model, tokens, torch.ones_like(tokens), streamer=pieces, max_new_tokens=length, num_beams=1,
                use_cache=True, pad_token_id=padding_id(self.model, self.tokenizer),
                eos_token_id=sorted(end_ids(self.model, self.tokenizer)) or None, **drawn,
            )  # fmt: skip


def run_chat(spec: ChatSpec, *, console: Console) -> None:
    """Answer line by line, from a terminal or whatever standard input is."""
    trained = load_trained(spec.adapter, spec.model, dtype=spec.dtype, quantization=spec.quantization)
    set_seed(spec.seed)
    chat = Chat(
        trained.model,
        trained.tokenizer,
        system=spec.system or "",
        max_new_tokens=spec.max_new_tokens,
        temperature=spec.temperature,
        plain=spec.plain,
    )
    if sys.stdin.isatty():
        say(console, f"{spec.adapter}{' goes on with what you type' if chat.plain else ''}. {_listed()}")
    for line in _lines():
        if line == "/quit":
            break
        try:
            _obey(chat, line, console)
        except DynaloraError as error:
            say(console, str(error))


def _obey(chat: Chat, line: str, console: Console) -> None:
    """Do what a line says: a command, or a message to be answered."""
    word = line.lower()
    if word == "/base":
        chat.base = not chat.base
        say(
            console,
            "The base model answers now. It knows nothing of what was said to the adapter."
            if chat.base
            else "The adapter answers again.",
        )
    elif word == "/reset":
        chat.reset()
        say(console, "What was said is forgotten.")
    elif word == "/help":
        say(console, _listed())
    elif word.startswith("/") and " " not in word:
        say(console, f"There is no command {line}; {did_you_mean(word, COMMANDS)}. {_listed()}")
    else:

        def written(piece: str) -> None:
            console.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
            console.file.flush()

        chat.answer(line, written)
        console.print()


def _listed() -> str:
    return "; ".join(f"{name}: {what}" for name, what in COMMANDS.items()) + "."


def _lines() -> Iterator[str]:
    """Lines that are not empty, until the end of the input."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):  # not on every system; it edits lines and keeps a history
            import readline  # noqa: F401
    while True:
        try:
            line = (input(prompt) if prompt else next(sys.stdin)).strip()
        except (EOFError, StopIteration, KeyboardInterrupt):
            return
        if line:
            yield line
