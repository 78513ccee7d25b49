"""How much of the base model an adapted model still is, measured without any data.

The yardstick is text that the base model itself wrote; other text can be named too. With p the base model, q the
adapted model and x a text drawn from p, token by token at temperature 1 after a short opening:

    KL          (1/N) Σ_t Σ_v p(v | x_<t) · (log p(v | x_<t) − log q(v | x_<t))
    loss shift  (1/N) Σ_t (log p(x_t | x_<t) − log q(x_t | x_<t))

t runs over the N tokens that p wrote; tokens of the openings are context only. Both are in nats per token and 0 for
an unchanged model. Because x is drawn from p, the loss shift estimates the same quantity as KL, with more noise: it is
the number that any tool computing a language-modelling loss would see. KL sums over the whole vocabulary v and is never
negative.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from dynalora.common.cache import cache_folder
from dynalora.common.files import write_file
from dynalora.common.progress import Progress, silent
from dynalora.common.statistics import ratio
from dynalora.errors import ConfigError, UnsupportedError
from dynalora.evaluation.causal import continued
from dynalora.evaluation.generation import chat_prompt, end_ids, evaluating, padding_id
from dynalora.evaluation.padding import padded
from dynalora.evaluation.scoring import last_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1

# Short and varied: prose, dialogue, knowledge, lists, code, mathematics. What follows them is the model's own.
OPENINGS = (
    "The history of",
    "In the morning, she",
    "Water boils when",
    "def main():\n",
    "Dear Sir or Madam,\n",
    "The three most important",
    "Once upon a time",
    "Theorem 1. Let",
    "# Introduction\n",
    "According to the report,",
    "Ingredients:\n-",
    "Scientists have found that",
    "The river flows",
    "import numpy as np\n",
    "He looked at the clock and",
    "Q: What is",
)
CHATS = (
    "Tell me about the moon.",
    "How do I cook rice?",
    "Write a short poem about autumn.",
    "What is the difference between a virus and a bacterium?",
    "Give me three ideas for a birthday present.",
    "Explain how a bicycle stays upright.",
    "Write a Python function that reverses a list.",
    "Who was Marie Curie?",
    "Summarise the plot of Romeo and Juliet.",
    "Why is the sky blue?",
    "Help me write an email asking for a day off.",
    "What should I see in Rome?",
    "Translate 'good morning' into French.",
    "How does a computer store numbers?",
    "Suggest a name for a small bakery.",
    "What makes a good friend?",
)


@dataclass(frozen=True)
class MeasuredText:
    """Texts to measure on.

    Attributes:
        rows: Token ids of each text, context included.
        starts: For each text the index, at least 1, of the first token that counts; those before it are context.
    """

    rows: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return sum(len(row) - start for row, start in zip(self.rows, self.starts, strict=True))


@dataclass(frozen=True)
class OwnText(MeasuredText):
    """Texts that a model wrote: what counts is what it wrote, the openings are context.

    Attributes:
        fingerprint: Of the model that wrote them, as `fingerprint` gives it.
        seed: Of the sampling.
    """

    fingerprint: str
    seed: int


@dataclass(frozen=True)
class Retention:
    """Distance of an adapted model from its base model on a text. All in nats per token.

    Attributes:
        kl: KL(base ‖ tuned), mean over the tokens.
        loss_shift: Loss of the tuned model minus loss of the base model.
        base_loss: Loss of the base model on the text.
        tokens: Number of tokens the means are over.
        kl_error: Standard error of `kl` over the texts (0 for a single text).
    """

    kl: float
    loss_shift: float
    base_loss: float
    tokens: int
    kl_error: float

    @property
    def tuned_loss(self) -> float:
        """Loss of the adapted model on the text."""
        return self.base_loss + self.loss_shift


@dataclass(frozen=True)
class BasePredictions:
    """The base model's log-probabilities on a text, kept so that they are computed once for many adapters.

    Attributes:
        text: The text they belong to.
        log_probs: One tensor per text, (tokens that count, V), on the CPU: log-probabilities, or logits, which differ
            from them by a constant per token; None for a text whose predictions were not kept and are made anew.
    """

    text: MeasuredText
    log_probs: tuple[torch.Tensor | None, ...]

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return sum(part.numel() * part.element_size() for part in self.log_probs if part is not None)


# --- the text ---------------------------------------------------------------------------------------------


def own_text(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: int = 32,
    tokens: int = 48,
    seed: int = 0,
    batch_size: int = 32,
    cache: str | os.PathLike[str] | bool = True,
    progress: Progress = silent,
) -> OwnText:
    """Text that the base model writes: sampled at temperature 1 from its full distribution after short openings.

    Every other opening is a chat message if the tokenizer has a chat template. Adapters are switched off while
    sampling. The text is kept on disk under the model's fingerprint, so that runs on different days measure on the
    same text; sampling the same text again is only certain on the same machine and versions.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: The model's.
        texts: Number of texts; with more than there are openings, openings are used again.
        tokens: Most tokens per text; a text may end earlier by itself.
        seed: Of the sampling. The global random state is left as it was.
        batch_size: Texts per batch.
        cache: True for the user's cache folder, a folder, or False to neither read nor write a file.
        progress: Called with the number of texts written.

    Returns:
        The texts. A text whose first token already ends it counts with that one token.

    Raises:
        ConfigError: Texts, tokens or batch_size below 1.
        UnsupportedError: The model holds weights merged from an adapter, so its base cannot be asked.
    """
    for name, value in (("texts", texts), ("tokens", tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; give 1 or more.")
    _refuse_merged(model)
    prompts = _openings(tokenizer, texts)
    mark = fingerprint(model)
    file = None
    if cache is not False:
        folder = cache_folder() / "own-text" if cache is True else Path(cache)
        plan = json.dumps([_FORMAT, mark, prompts, tokens, seed, batch_size])
        file = folder / f"{hashlib.sha256(plan.encode()).hexdigest()[:32]}.json"
        kept = _read(file, mark, seed, prompts)
        if kept is not None:
            return kept
    rows = _sample(model, tokenizer, prompts, tokens, seed, batch_size, progress)
    text = OwnText(rows, tuple(len(prompt) for prompt in prompts), mark, seed)
    if file is not None:
        _write(file, text)
    return text


def given_text(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512
) -> MeasuredText:
    """Texts of the user's choice, to measure on; every token but the first of each text counts.

    Args:
        texts: The texts; those of fewer than two tokens are left out.
        tokenizer: The model's; special tokens are added as it does by default.
        max_length: Tokens at which a text is cut.

    Raises:
        ConfigError: One string instead of a list, max_length below 2, or no text with two tokens.
    """
    if isinstance(texts, str):
        raise ConfigError("texts must be a list of texts, got one string; put it into a list.")
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; give at least 2 tokens.")
    rows = [tuple(tokenizer(text)["input_ids"][:max_length]) for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ConfigError(f"None of the {len(texts)} texts has two tokens; give text to measure on.")
    return MeasuredText(tuple(rows), (1,) * len(rows))


def fingerprint(model: torch.nn.Module) -> str:
    """A short mark of a model's base weights: equal for the same weights, whatever adapters are attached.

    It covers every weight's name, shape and dtype, and up to 1024 evenly spaced entries of each, which any
    fine-tuning changes; of bitsandbytes' 4-bit weights how often each of the 16 values occurs.
    """
    digest = hashlib.sha256()
    for name, value in sorted(base_weights(model), key=lambda pair: pair[0]):
        plain = value.detach()
        state = getattr(value, "quant_state", None)
        if state is not None:
            digest.update(f"{name} {tuple(state.shape)} 4-bit {_occurrences(plain).tolist()}\n".encode())
            continue
        # torchao's weights have no entries to take a view of.
        if type(plain).dequantize is not torch.Tensor.dequantize:
            plain = plain.dequantize()
        flat = plain.reshape(-1)
        step = max(1, flat.numel() // 1024)
        part = flat[::step][:1024].to("cpu")
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _occurrences(packed: torch.Tensor) -> torch.Tensor:
    """How often each 4-bit value occurs: (16,). On CPUs bitsandbytes packs weights in another order when first used."""
    pairs = torch.bincount(packed.reshape(-1).view(torch.uint8), minlength=256).view(16, 16)
    return pairs.sum(0) + pairs.sum(1)


def base_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name, as in the model without adapters, and value of every weight and buffer that is not an adapter's."""
    adapters = _adapter_ids(model)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, value in itertools.chain(inner.named_parameters(), inner.named_buffers()):
        if id(value) in adapters or _is_copy(name):
            continue
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), value


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is saved of a model's adapters, by its name in the model's state dict: all that is not the base model's."""
    adapters = _adapter_ids(model)
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in state.items()
        if id(value) in adapters or _is_copy(name) or value.requires_grad
    }


def _adapter_ids(model: torch.nn.Module) -> set[int]:
    adapters: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in (*module.adapter_layer_names, *module.other_param_names):
                part = getattr(module, name, None)
                if isinstance(part, torch.nn.Module):
                    adapters.update(id(value) for value in itertools.chain(part.parameters(), part.buffers()))
    return adapters


def _is_copy(name: str) -> bool:
    """Whether a weight belongs to a copy of a module that is trained in full."""
    return ".modules_to_save." in name or ".token_adapter." in name


def _refuse_merged(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "merged", False) is True:
            raise UnsupportedError(
                f"An adapter is merged into '{name}', so the base model cannot be asked; call unmerge_adapter() first."
            )


def _openings(tokenizer: PreTrainedTokenizerBase, texts: int) -> list[list[int]]:
    prompts: list[list[int]] = []
    for index in range(texts):
        half = index // 2
        if tokenizer.chat_template and index % 2:
            prompts.append(chat_prompt(tokenizer, CHATS[half % len(CHATS)]))
        else:
            place = half if tokenizer.chat_template else index
            prompts.append(list(tokenizer(OPENINGS[place % len(OPENINGS)])["input_ids"]))
    return prompts


def _sample(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> tuple[tuple[int, ...], ...]:
    what = "The base model writes text"
    padding = padding_id(model, tokenizer)
    device = next(model.parameters()).device
    ends = end_ids(model, tokenizer)
    rows: list[tuple[int, ...]] = []
    progress(what, 0, len(prompts))
    devices = [device] if device.type == "cuda" else []
    with adapters_off(model), evaluating(model), torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            given, mask = padded(batch, padding, "left")
            output = continued(
                model, given.to(device), mask.to(device), do_sample=True, num_beams=1,
                max_new_tokens=tokens, pad_token_id=padding, use_cache=True,
                eos_token_id=sorted(ends) or None,
                # The model's own distribution, untouched: every setting that a checkpoint may ship is reset.
                temperature=1.0, top_k=0, top_p=1.0, min_p=None, typical_p=1.0, repetition_penalty=1.0,
            )  # fmt: skip
            for prompt, written in zip(batch, output.tolist(), strict=True):
                stop = next((place + 1 for place, token in enumerate(written) if token in ends), len(written))
                rows.append((*prompt, *written[:stop]))
            progress(what, len(rows), len(prompts))
    return tuple(rows)


def _read(file: Path, mark: str, seed: int, prompts: Sequence[Sequence[int]]) -> OwnText | None:
    """The text kept in a file; None if there is none or it is damaged, so that it is made again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = tuple(tuple(int(token) for token in row) for row in content["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = len(rows) == len(prompts) and all(
        row[: len(prompt)] == tuple(prompt) and len(row) > len(prompt)
        for row, prompt in zip(rows, prompts, strict=True)
    )
    return OwnText(rows, tuple(len(prompt) for prompt in prompts), mark, seed) if whole else None


def _write(file: Path, text: OwnText) -> None:
    """Keep the text; a cache that cannot be written is no reason to stop."""
    content = json.dumps({"fingerprint": text.fingerprint, "seed": text.seed, "rows": text.rows})
    try:
        write_file(file, content)
    except OSError:
        return


# --- the measure ------------------------------------------------------------------------------------------


def retention(
    model: torch.nn.Module,
    text: MeasuredText,
    *,
    base: BasePredictions | torch.nn.Module | None = None,
    batch_size: int = 8,
    chunk: int = 256,
    name: str = "the model",
    progress: Progress = silent,
) -> Retention:
    """KL(base ‖ tuned) and loss shift on the base model's own text, as defined at the top of this module.

    On other text than the base model's own the two are different things: KL still says how far the predictions moved,
    and the loss shift is negative where the tuned model has become better at that text.

    The base model is the same model with its adapters switched off; no second copy is needed. Memory: the logits of
    `batch_size` texts, once for each model, and four float32 blocks of `chunk` × V.

    Args:
        model: a PEFT model; its active adapters are what is measured. Without any, all distances are 0.
        text: From `own_text`, written by this very base model, or from `given_text`.
        base: From `base_predictions`, to leave the base model's pass out; or the base model itself, where switching
            adapters off does not give it back (full fine-tuning, PiSSA).
        batch_size: Texts per batch.
        chunk: Positions of which all V probabilities are held in float32 at a time.
        name: Of the model, for `progress`.
        progress: Called with the number of texts done.

    Returns:
        The distances.

    Raises:
        ConfigError: Batch_size or chunk below 1; the text was written by another model; or `base` is for another text.
        UnsupportedError: An adapter is merged into the weights.
    """
    apart = base if isinstance(base, torch.nn.Module) else None
    made = base if isinstance(base, BasePredictions) else None
    _check(model, text, batch_size, chunk, writer=apart)
    if made is not None and made.text != text:
        raise ConfigError(
            "The base predictions were made on another text; make them again with base_predictions()."
        )
    what = f"Retention: {name}"
    totals = [torch.zeros(3, dtype=torch.float64) for _ in text.rows]  # Σ KL, Σ base loss, Σ tuned loss
    done = 0
    progress(what, 0, len(text.rows))
    # Not inference_mode: a model in training may keep what it computes here, such as rotary frequencies.
    with evaluating(model), evaluating(apart or model), torch.no_grad():
        for batch in _batches(text, batch_size):
            kept = [made.log_probs[index] for index in batch] if made else []
            reference = [part for part in kept if part is not None]
            if len(reference) < len(batch):
                reference = _written(apart or model, text, batch, off=True)
            tuned = _written(model, text, batch, off=False)
            for index, first, second in zip(batch, reference, tuned, strict=True):
                totals[index] = _distances(first, second, _targets(text, index, second.device), chunk)
            done += len(batch)
            progress(what, done, len(text.rows))
    lengths = [len(row) - start for row, start in zip(text.rows, text.starts, strict=True)]
    kl, base_loss, tuned_loss = (ratio(sums, lengths) for sums in torch.stack(totals).T.tolist())
    return Retention(kl.value, tuned_loss.value - base_loss.value, base_loss.value, text.tokens, kl.error)


def base_predictions(
    model: torch.nn.Module,
    text: MeasuredText,
    *,
    batch_size: int = 8,
    dtype: torch.dtype | None = torch.float32,
    max_bytes: int | None = None,
    progress: Progress = silent,
) -> BasePredictions:
    """The base model's log-probabilities on a text, to be used for many adapters or checkpoints.

    Takes `text.tokens` × V numbers of memory: 300 MB for 1500 tokens and a vocabulary of 50,000 in float32.

    Args:
        model: The base model, with or without adapters.
        text: From `own_text`, written by this very base model, or from `given_text`.
        batch_size: Texts per batch. With the same one, `retention` gives bit for bit what it would give without.
        dtype: What to keep them in. Half precision halves the memory and costs accuracy below about 1e-3 nats. None
            keeps the model's logits as they are: exact, and half the size for a model in half precision.
        max_bytes: Keep no more than this, in whole batches, those of long texts first; `retention` makes the rest
            anew each time. None keeps all.
        progress: Called with the number of texts done.

    Raises:
        ConfigError: Batch_size below 1, max_bytes below 0, or the text was written by another model.
        UnsupportedError: An adapter is merged into the weights.
    """
    _check(model, text, batch_size, 1)
    if max_bytes is not None and max_bytes < 0:
        raise ConfigError(f"max_bytes is {max_bytes}; give 0 or more.")
    what = "Predictions of the base model"
    kept: dict[int, torch.Tensor | None] = {}
    used = 0
    progress(what, 0, len(text.rows))
    with evaluating(model), torch.no_grad():
        for batch in _batches(text, batch_size):
            parts = _written(model, text, batch, off=True)
            size = dtype.itemsize if dtype is not None else parts[0].element_size()
            used += size * sum(part.numel() for part in parts)
            if max_bytes is not None and used > max_bytes:
                break  # what follows would fit only in part
            for index, logits in zip(batch, parts, strict=True):
                if dtype is not None:
                    kept[index] = F.log_softmax(logits.float(), dim=-1).to("cpu", dtype)
                else:
                    kept[index] = logits.to("cpu", copy=True)  # a view would keep the whole batch alive
            progress(what, len(kept), len(text.rows))
    progress(what, len(text.rows), len(text.rows))
    return BasePredictions(text, tuple(kept.get(index) for index in range(len(text.rows))))


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """The base model inside: adapters off, and afterwards on again unless they were off before."""
    context: AbstractContextManager[Any] = nullcontext()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(not layer.disable_adapters for layer in layers):
        if not isinstance(model, PeftModel):
            raise UnsupportedError(
                f"The model ({type(model).__name__}) has adapter layers but is no PeftModel, so they cannot be "
                "switched off; pass the model that get_peft_model() or PeftModel.from_pretrained() returned."
            )
        context = model.disable_adapter()
    elif isinstance(model, PeftModel) and not layers:
        context = model.disable_adapter()  # prompt learning has no layers to switch
    # PEFT makes every parameter of the active adapters trainable when it switches them on again.
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with context:
            yield
    finally:
        for parameter, trained in trains:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)


def _check(
    model: torch.nn.Module,
    text: MeasuredText,
    batch_size: int,
    chunk: int,
    writer: torch.nn.Module | None = None,
) -> None:
    for what, value in (("batch_size", batch_size), ("chunk", chunk)):
        if value < 1:
            raise ConfigError(f"{what} is {value}; give 1 or more.")
    _refuse_merged(model)
    if isinstance(text, OwnText) and fingerprint(writer or model) != text.fingerprint:
        raise ConfigError("The text was written by another base model; write it anew with own_text().")


def _batches(text: MeasuredText, batch_size: int) -> list[list[int]]:
    order = sorted(range(len(text.rows)), key=lambda index: -len(text.rows[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _written(
    model: torch.nn.Module, text: MeasuredText, batch: Sequence[int], *, off: bool
) -> list[torch.Tensor]:
    """For each text of a batch the logits (tokens written, V) that predict the tokens the model wrote."""
    device = next(model.parameters()).device
    tokens, mask = padded([text.rows[index] for index in batch], 0, "left")
    counts = [len(text.rows[index]) - text.starts[index] for index in batch]
    with adapters_off(model) if off else nullcontext():
        logits = last_logits(model, tokens.to(device), mask.to(device), max(counts) + 1)
    return [row[-count - 1 : -1] for row, count in zip(logits, counts, strict=True)]


def _targets(text: MeasuredText, index: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(text.rows[index][text.starts[index] :], device=device)


def _distances(base: torch.Tensor, tuned: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    """Sums of KL, base loss and tuned loss over the positions of one text, (3,), float64 on the CPU.

    Args:
        base: Logits or log-probabilities (T, V); the difference cancels in the softmax.
        tuned: Logits (T, V).
        targets: The tokens that follow, (T,).
        chunk: Positions at a time.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        p = F.log_softmax(base[part].to(tuned.device).float(), dim=-1)
        q = F.log_softmax(tuned[part].float(), dim=-1)
        aim = targets[part, None]
        losses = (-p.gather(1, aim).double().sum(), -q.gather(1, aim).double().sum())
        # A token that p rules out (a masked vocabulary entry) adds nothing, whatever q says.
        kl = torch.where(torch.isneginf(p), torch.zeros_like(p), p.exp() * (p - q)).sum(dim=-1).double().sum()
        sums += torch.stack([kl, *losses]).cpu()
    return sums
