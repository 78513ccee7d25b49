"""What a saved adapter says of itself: a section of its model card, and a picture of its ranks.

PEFT writes a model card (`README.md`) beside every adapter. For adapters of dynalora it gets a section with the
method, its settings and how to load it: whoever finds the adapter on the Hub need not know that the method lives
outside of PEFT. What `push_to_hub` uploads has a picture of the ranks too (`rank_map.png`); for a folder,
`update_card(model, folder, picture=True)` draws it.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib.util import find_spec
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import nn

from dynalora.adapter.config import AdapterConfig
from dynalora.adapter.layer import adapter_layers
from dynalora.common.cards import CARD, without_blanks
from dynalora.common.files import file_beside, write_file
from dynalora.common.private import extend_model_cards
from dynalora.common.version import __version__
from dynalora.drawing.landscape import plot_rank_landscape
from dynalora.forgetting.landscape import LandscapeRow, rank_landscape
from dynalora.methods import METHODS

PICTURE = "rank_map.png"
BEGIN, END = "<!-- dynalora: begin -->", "<!-- dynalora: end -->"

# Settings that are always shown; others only where they are not the default.
_MAIN = ("r", "alpha", "target_modules")


def card_section(model: PeftModel, picture: bool = False) -> str:
    """The section of a model card on a model's adapters, in Markdown; empty if there are none of dynalora.

    It stands between two comments by which it is found again. `picture`: `rank_map.png` lies beside the card.
    """
    configs = {name: c for name, c in model.peft_config.items() if isinstance(c, AdapterConfig)}
    if not configs:
        return ""
    parts = [BEGIN]
    for name, config in configs.items():
        method = METHODS[config.method]
        suffix = "" if len(configs) == 1 else f" (adapter `{name}`)"
        parts.append(f"## {method.title or method.name} adapter{suffix}")
        parts.append(
            f"Made with dynalora {__version__}, an extension of PEFT. {_ranks(model, name)} What differs from the "
            "method's defaults:"
        )
        parts.append("| setting | value |\n|---|---|\n" + "\n".join(_settings(config)))
    if picture:
        parts.append(f"![Effective rank of every adapted matrix, by layer]({PICTURE})")
    parts.append(_how_to_load(model, next(iter(configs.values()))))
    parts.append(END)
    return "\n\n".join(parts)


def _ranks(model: nn.Module, adapter: str) -> str:
    ranks = [layer.rank(adapter) for layer in adapter_layers(model, adapter).values()]
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    if len(ranks) == 1:
        return f"It adapts 1 matrix, with rank {low}."
    if low == high:
        return f"It adapts {len(ranks)} matrices, each with rank {low}."
    return f"It adapts {len(ranks)} matrices, with ranks of {low} to {high}, {sum(ranks)} in all."


def _settings(config: AdapterConfig) -> list[str]:
    names = set(config.own_fields())
    rows = []
    for field in fields(config):
        if field.name not in names:
            continue
        value = getattr(config, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name in _MAIN or value != default:
            if isinstance(value, set):
                value = sorted(value)
            rows.append(f"| `{field.name}` | `{str(value).replace('|', chr(92) + '|')}` |")
    return rows


def _how_to_load(model: PeftModel, config: AdapterConfig) -> str:
    automatic = f"Auto{type(model).__name__}"
    if hasattr(peft, automatic) and config.task_type is not None:
        call = f'from peft import {automatic}\n\nmodel = {automatic}.from_pretrained("this/repository")'
    else:
        call = (
            "from peft import PeftModel\n\n"
            'model = PeftModel.from_pretrained(base_model, "this/repository")  # on the base model it was trained on'
        )
    name = config.method.upper()
    return (
        "### How to load it\n\n"
        "Install dynalora, and import it before the adapter is loaded:\n\n"
        f"```python\nimport dynalora  # makes {name} known to PEFT\n{call}\n```\n\n"
        f"Without that import PEFT does not know the method and stops with `KeyError: '{name}'`."
        + (
            ""
            if config.gated
            else " Where it cannot be installed, `dynalora.export_lora` makes a plain LoRA of it elsewhere."
        )
    )


def draw_rank_map(model: nn.Module, folder: str) -> bool:
    """Draw the rank of the energy of every adapted matrix into `rank_map.png` in a folder, several adapters together.

    Says whether it was drawn. It is not where weights are sharded over processes or not there (on the meta device), nor
    without matplotlib.
    """
    if find_spec("matplotlib") is None:
        return False
    adapters = list(dict.fromkeys(name for layer in adapter_layers(model).values() for name in layer.scaling))
    for layer in adapter_layers(model).values():
        for adapter in adapters:
            for tensor in layer.saved_tensors(adapter).values():
                # To gather a shard, all processes would have to come here.
                if tensor.is_meta or type(tensor.detach()) is not torch.Tensor:
                    return False
    if not adapters:
        return False
    landscapes: dict[str, Sequence[LandscapeRow]] = {
        name: rank_landscape(model, adapter_name=name) for name in adapters
    }
    figure = plot_rank_landscape(landscapes if len(adapters) > 1 else landscapes[adapters[0]])
    figure.suptitle("Rank that holds 99 % of the energy of every adapted matrix (dotted: rank it has)", fontsize=9)
    with file_beside(os.path.join(folder, PICTURE)) as beside:
        figure.savefig(beside, format="png", dpi=120)
    return True


def update_card(model: PeftModel, folder: str, picture: bool = False) -> None:
    """Put the section of a model's adapters into the card in a folder, in place of an earlier one.

    `picture` draws `rank_map.png` (about half a second); one that is there is drawn anew in any case.
    """
    if not _concerned(model):
        return
    drawn = (picture or os.path.exists(os.path.join(folder, PICTURE))) and draw_rank_map(model, folder)
    section = card_section(model, drawn)
    path = os.path.join(folder, CARD)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    text = re.sub(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", "\n\n", text, flags=re.DOTALL)
    # Right under the title, before what else there is; without a title, after the metadata.
    start = re.search(r"^# .*$", text, flags=re.MULTILINE) or re.match(r"(?s:---\n.*?\n---\n)", text)
    at = start.end() if start else 0
    rest = text[at:].lstrip("\n")
    write_file(path, without_blanks(f"{text[:at]}\n\n{section}\n\n{rest}"))


def _concerned(model: PeftModel) -> bool:
    return any(isinstance(config, AdapterConfig) for config in model.peft_config.values())


def install() -> None:
    """Let PEFT's model cards have the section; done by `import dynalora`, once."""
    extend_model_cards(
        written=lambda model, folder: _try(update_card, model, folder),
        uploading=lambda model, folder: _try(_complete, model, folder),
    )


def _complete(model: PeftModel, folder: str) -> None:
    # transformers' push_to_hub has written a card of its own over the one that was saved.
    if not _concerned(model):
        return
    model.create_or_update_model_card(folder)
    update_card(model, folder, picture=True)


def _try(action: Any, *args: Any) -> None:
    """Do it, or warn: a card is no reason to lose the weights, which are written after it."""
    try:
        action(*args)
    except Exception as error:
        warnings.warn(
            f"the adapter's model card could not be completed ({type(error).__name__}: {error}); "
            "the adapter itself is saved.",
            stacklevel=5,
        )
