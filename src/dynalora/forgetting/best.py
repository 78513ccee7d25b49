"""The best state of a run so far, kept on the CPU, saved with checkpoints, and put back into the model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dynalora.common.devices import device_of
from dynalora.common.files import file_beside
from dynalora.errors import CheckpointError
from dynalora.forgetting.base_model import adapter_tensors

_FILE = "retention_best.safetensors"


@dataclass(frozen=True)
class BestState:
    """The best state so far.

    Attributes:
        step: Optimizer steps done.
        forgetting: The largest KL over the texts there, in nats per token; 0 where none is measured.
        score: What the state is judged by, lower is better; None where nothing was scored.
        tensors: The adapter's weights and state, or all weights that train, by their names in the model, on the CPU.
    """

    step: int
    forgetting: float
    score: float | None
    tensors: dict[str, torch.Tensor]

    def save(self, folder: Path) -> None:
        """Write the state into a folder, whole or not at all."""
        record = {"step": self.step, "forgetting": self.forgetting, "score": self.score}
        tensors = {name: value.contiguous() for name, value in self.tensors.items()}
        with file_beside(folder / _FILE) as beside:
            save_file(tensors, beside, metadata={"format": "pt", "kept": json.dumps(record)})

    @classmethod
    def load(cls, folder: Path) -> BestState | None:
        """The state in a folder; None if there is none.

        Raises:
            CheckpointError: The file is damaged.
        """
        file = folder / _FILE
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as content:
                record = json.loads(content.metadata()["kept"])
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
            return cls(int(record["step"]), float(record["forgetting"]), record["score"], tensors)
        except Exception as error:  # safetensors raises a type of its own
            raise CheckpointError(
                f"The weights kept in '{file}' cannot be read ({str(error).splitlines()[0]}); continue from an earlier "
                "checkpoint."
            ) from error

    def put_back(self, model: nn.Module) -> None:
        """Put the state back into the model that it is of; adapters follow in ranks and buffers."""
        device = device_of(model)
        model.load_state_dict({name: value.to(device) for name, value in self.tensors.items()}, strict=False)


def better_state(
    best: BestState | None, model: nn.Module, step: int, score: float | None, forgetting: float = 0.0
) -> BestState:
    """The best state so far or the model's present one, whichever is better.

    Any score is better than one that is no number, and that than none. Of equal scores the earlier one is taken, and
    without scores the later one.

    Args:
        best: The best so far; None: the present one is the first.
        model: The model as it is now.
        step: Optimizer steps done.
        score: Of the present state, lower is better; None: it was not scored.
        forgetting: Its largest KL over the texts, in nats per token.
    """
    if best is not None and (_order(best.score) < _order(score) or best.score == score is not None):
        return best
    tensors = {name: value.detach().to("cpu", copy=True) for name, value in adapter_tensors(model).items()}
    return BestState(step, forgetting, score, tensors)


def _order(score: float | None) -> tuple[int, float]:
    """What scores are compared as."""
    if score is None:
        return 2, 0.0
    return (1, 0.0) if math.isnan(score) else (0, score)
