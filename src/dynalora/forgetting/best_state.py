"""The best adapter so far of a run that must not forget too much, in memory and beside a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dynalora.common.files import file_beside
from dynalora.errors import CheckpointError

_FILE = "retention_best.safetensors"


@dataclass(frozen=True)
class BestState:
    """The best state under the budget so far.

    Attributes:
        step: Optimizer steps done.
        forgetting: The largest KL over the texts there, in nats per token.
        score: What `score`, or the trainer's evaluation, gave there; None where nothing was scored.
        tensors: The adapter's weights and state by their names in the model, on the CPU.
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
