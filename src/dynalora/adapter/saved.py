"""Saved adapters: what of a folder's files can be checked before a model is touched.

Adapters come from strangers, too, or from a disk that was full. What is read here decides how much memory a model takes
when the adapter is attached, so sizes that the configuration asks for are compared with those of the weights. Whether
the tensors fit the model, and hold numbers, is checked when they are loaded
([`RankedStorage.check`][dynalora.adapter.ranks.RankedStorage.check]).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn

from dynalora.adapter.parts import biases_of_parts
from dynalora.adapter.patterns import MOST_NAMES
from dynalora.common.names import plain_name
from dynalora.errors import CheckpointError

_MOST = 16
"""How many times the largest rank of the weights the configuration's may be: training may have removed components."""
_SMALL = 1024
"""A rank that takes no memory to speak of."""

HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads by task which PEFT trains in full. It lists all candidates in `modules_to_save`; a model has one of them."""

Shapes = Mapping[str, tuple[int, ...]]


def check_adapter_folder(folder: str, method: str = "") -> None:
    """Check, without loading any weights, that a folder holds a whole adapter.

    Args:
        folder: Local folder with `adapter_config.json` and, unless it is a bare configuration,
            `adapter_model.safetensors`.
        method: Method that is expected to have made it; empty for any.

    Raises:
        CheckpointError: Unreadable configuration, truncated weights, weights that do not fit together or the
            configuration, or another method's adapter.
    """
    config = _read_config(os.path.join(folder, CONFIG_NAME))
    made_by = "" if config is None else str(config.get("peft_type", ""))
    if config is not None and method and made_by.upper() != method.upper():
        raise CheckpointError(
            f"the adapter in {folder} was made by {made_by or 'an unknown method'}, not by {method.upper()}; load "
            "it with peft.PeftModel.from_pretrained, which picks the right method."
        )
    weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.lexists(weights):
        if method and os.path.lexists(os.path.join(folder, WEIGHTS_NAME)):
            raise CheckpointError(
                f"the weights in {folder} are a pickle ({WEIGHTS_NAME}), which is not read, since it could hold "
                "anything; save the adapter as safetensors, as save_pretrained does unless it is told otherwise."
            )
        return
    shapes = read_shapes(weights)
    # LoRA's are called so, too.
    expected = method or ("lora" if made_by.upper() == "LORA" else "")
    if expected and not any(f".{expected.lower()}_" in name for name in shapes):
        first = f"the first is {next(iter(shapes))!r}" if shapes else "it is empty"
        raise CheckpointError(
            f"{weights} holds no weights of {expected.upper()} ({first}), although its configuration says so; the two "
            "files belong to different adapters."
        )
    if method:
        largest = _check_factors(weights, shapes, method.lower())
        _check_sizes(folder, config or {}, largest)
        _check_modules(folder, config or {}, shapes)


def check_known(folder: str) -> str:
    """The method that made a folder's adapter, in lower case.

    Raises:
        CheckpointError: There is no readable configuration, or it names a method that PEFT does not know here.
    """
    config = _read_config(os.path.join(folder, CONFIG_NAME))
    if config is None:
        raise CheckpointError(f"{folder} holds no adapter: there is no {CONFIG_NAME} in it.")
    made_by = config.get("peft_type")
    if not isinstance(made_by, str) or made_by not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise CheckpointError(
            f"the adapter in {folder} was made by {made_by!r}, a method that is unknown here; install the package or "
            "the version that has it."
        )
    _check_values(folder, config)
    return made_by.lower()


def _check_values(folder: str, config: Mapping[str, Any]) -> None:
    """Whether what PEFT computes with before it looks is of the right kind.

    Raises:
        CheckpointError: It is not.
    """
    base = config.get("base_model_name_or_path")
    wrong = [] if base is None or isinstance(base, str) else [("base_model_name_or_path", base, "a name")]
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    for name in ("r", "lora_alpha"):
        value = config.get(name, 1)
        if value == getattr(kind, name, 1):
            continue  # such as OFT's rank of 0, beside which it has the size of its blocks
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            wrong.append((name, value, "a number above 0"))
    for name, value, needed in wrong:
        raise CheckpointError(
            f"the configuration in {folder} says {name}={value!r}, where {needed} is needed; restore it from another "
            "copy of the adapter."
        )


def read_shapes(weights: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors by name, without reading the tensors.

    Raises:
        CheckpointError: The file is truncated or damaged.
    """
    _check_regular(weights)
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = os.path.getsize(weights) if os.path.isfile(weights) else 0
        raise CheckpointError(
            f"{weights} ({size} bytes) is truncated or damaged ({error}); save the adapter again, "
            "or copy the file again from where it came."
        ) from None


def check_further_tensors(
    model: nn.Module,
    config: Any,
    layers: Iterable[str],
    adapter: str,
    state: dict[str, torch.Tensor],
    prefix: str,
    what_fits: bool = False,
) -> None:
    """Refuse tensors of a file that would change the base model; those that would not are taken out.

    A file may hold, besides the method's own tensors, modules that were trained in full, which are copies beside the
    base model's, and biases, if the configuration says so. PEFT also writes the embeddings of some models: unchanged,
    or with new words at the end, after the vocabulary was resized. New words are taken by a model's only adapter. They
    are those behind the vocabulary of the checkpoint that the model is from; where there is none, the second half.

    Args:
        model: The model with the adapter.
        config: The adapter's configuration.
        layers: Names of the adapted modules.
        adapter: The adapter's name.
        state: The file's tensors, which PEFT has renamed where they go to copies of modules.
        prefix: What names of the method's own tensors begin with.
        what_fits: Whether PEFT leaves out, with a warning, what was trained in full and has another size.

    Raises:
        CheckpointError: A tensor would overwrite another of the model, does not fit, or is NaN or infinite.
    """
    there = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    copies = {
        plain_name(f"{name}.{stored}")
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for stored in module.adapter_state_dict_load_map(adapter).values()
    }
    alone = len(getattr(model, "peft_config", ())) == 1
    vocabularies = {
        f"{plain_name(name)}.{weight}"
        for name, module in model.named_modules()
        if module in _embeddings_of(model)
        for weight in ("weight", "original_module.weight")  # the latter beside a copy that is trained in full
    }
    biases = set(map(plain_name, biases_of_parts(model)))
    for name, tensor in list(state.items()):
        key = plain_name(name)
        owner, _, last = key.rpartition(".")
        if last.startswith(prefix):
            continue
        place = there.get(key, there.get(f"{owner}.base_layer.{last}"))
        adapted = _layer_of(owner) in layers or key in biases
        trained = last == "bias" and (config.bias == "all" or (config.bias != "none" and adapted))
        if key in copies or trained:
            if place is not None and place.shape != tensor.shape:
                if what_fits:
                    continue
                raise CheckpointError(
                    f"the saved adapter has {name!r} of shape {tuple(tensor.shape)}, where the model's is "
                    f"{tuple(place.shape)}; load it onto the base model it was trained on."
                )
            if place is not None and place.is_floating_point() != tensor.is_floating_point():
                raise CheckpointError(
                    f"the saved adapter has {name!r} in {tensor.dtype}, where the model's is {place.dtype}; use "
                    "another copy of it."
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"the saved adapter has NaN or infinite values in {name!r}; use another copy of it."
                )
        elif place is None and last == "trainable_tokens_delta":
            raise CheckpointError(
                f"the saved adapter holds {name!r}, rows of tokens that its configuration does not list in "
                "trainable_token_indices; the two files belong to different adapters."
            )
        elif place is None or _same_weight(place, tensor):  # such as a classifier's head, where there is another head
            del state[name]
        elif alone and key in vocabularies and _same_but_for_new_words(place, tensor, _words_before(model)):
            continue
        else:
            raise CheckpointError(
                f"the saved adapter holds {name!r}, which is no part of it and would change the base model; save it "
                "with save_embedding_layers=False, or train that module with modules_to_save."
            )


def _layer_of(owner: str) -> str:
    return owner.removesuffix(".base_layer")


def _embeddings_of(model: Any) -> list[nn.Module]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(base, getter)())
        except (AttributeError, NotImplementedError):  # no model of transformers, or one of another kind
            continue
    return [module for module in found if module is not None]


def _words_before(model: Any) -> int | None:
    """How many words the checkpoint has that a model was loaded from, before its vocabulary was resized."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    place = getattr(config, "_name_or_path", None) or getattr(base, "name_or_path", None)
    if not isinstance(place, str) or not place:
        return None
    try:
        before = type(config).from_pretrained(place, local_files_only=True)  # type: ignore[union-attr]
        return int(before.get_text_config().vocab_size)
    except Exception:  # whatever is wrong with what the model's name leads to, it says nothing
        return None


def _same_but_for_new_words(place: torch.Tensor, tensor: torch.Tensor, words: int | None) -> bool:
    """Whether two embeddings, (words, width), differ at the end only: behind so many, or in less than half of them."""
    old = (len(place) + 1) // 2 if words is None else words
    finite = bool(torch.isfinite(tensor).all())
    return finite and place.shape == tensor.shape and place.ndim == 2 and _same_weight(place[:old], tensor[:old])


def _same_weight(place: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether two weights are equal in the narrower of their types."""
    if place.shape != tensor.shape or not (place.is_floating_point() and tensor.is_floating_point()):
        return False
    dtype = min((place.dtype, tensor.dtype), key=lambda kind: kind.itemsize)
    return place.is_meta or torch.equal(place.to(dtype), tensor.to(place.device, dtype))


def _check_regular(file: str) -> None:
    """Refuse what has no end, or nobody writes to: reading a device or a pipe would take all memory, or for ever."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise CheckpointError(
            f"{file} is no file but a folder, a pipe or a device; restore it from another copy of the adapter."
        )


def _read_config(file: str) -> dict[str, Any] | None:
    if not os.path.lexists(file):
        return None
    _check_regular(file)
    try:
        with open(file, encoding="utf-8") as opened:
            content = json.load(opened)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not readable as JSON ({error}); restore it from another copy of the adapter."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no settings; restore it from another copy of the adapter.")
    return content


def _check_factors(weights: str, shapes: Shapes, method: str) -> int:
    """Whether both factors of every matrix are there, and of one rank; returns the largest."""
    largest = 0
    for name, down in shapes.items():
        stem, _, role = name.rpartition(f".{method}_")
        if role not in ("down", "up"):
            continue
        other = f"{stem}.{method}_{'up' if role == 'down' else 'down'}"
        if other not in shapes:
            raise CheckpointError(f"{weights} holds {name!r} without {other!r}; save the adapter again.")
        if role == "up":
            continue
        up = shapes[other]
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
            raise CheckpointError(
                f"{weights} holds {name!r} of shape {down} and {other!r} of shape {up}, which are no factors of an "
                "update, (r, in) and (out, r) with r of at least 1; save the adapter again."
            )
        largest = max(largest, down[0])
    return largest


def _check_sizes(folder: str, config: Mapping[str, Any], largest: int) -> None:
    """Whether the ranks that memory is taken for are those of the file, as far as that can be said."""
    asked = {"r": config.get("r")}
    pattern = config.get("rank_pattern")
    if isinstance(pattern, dict):
        asked |= {f"rank_pattern[{key!r}]": rank for key, rank in pattern.items()}
    for name, value in asked.items():
        if _is_larger(value, max(_SMALL, _MOST * largest)):
            raise CheckpointError(
                f"the configuration in {folder} asks for {name}={value}, but the largest rank of its weights is "
                f"{largest}; the two files belong to different adapters."
            )


def _check_modules(folder: str, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Whether what was trained in full is in the file."""
    modules = config.get("modules_to_save")
    for module in modules[:MOST_NAMES] if isinstance(modules, list) else ():  # more of them are refused as settings
        if any(module in heads for heads in HEADS.values()):
            continue
        if isinstance(module, str) and not any(f".{module}." in name for name in shapes):
            raise CheckpointError(
                f"the weights in {folder} lack {module!r}, which its configuration lists in modules_to_save; save the "
                "adapter again."
            )


def _is_larger(value: Any, most: int) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > most
