"""Small training runs shared by the driver's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

import dynalora
from tests.toys import TOYS, llama, tokens

TOY = TOYS["llama"]
COMMON = {"r": 3, "alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def dira(**options: Any) -> dynalora.DiraConfig:
    """A penalty strong enough that a wrong schedule shows at once."""
    defaults = {**COMMON, "penalty_weight": 0.5, "init_weights": False}
    return dynalora.DiraConfig(**{**defaults, **options})


def disel(**options: Any) -> dynalora.DiselConfig:
    defaults = {**COMMON, "gate_bias_init": 0.0, "init_weights": False}
    return dynalora.DiselConfig(**{**defaults, **options})


def dislora(**options: Any) -> dynalora.DisloraConfig:
    """Directions that are chosen early, at a rank at which orthogonality is lost soon."""
    defaults = {**COMMON, "warmup_steps": 2, "tsd_count": 2}
    return dynalora.DisloraConfig(**{**defaults, **options})


def pedyra(**options: Any) -> dynalora.PedyraConfig:
    """Ranks that move at every other step, in runs as short as the tests' are."""
    defaults = {
        **COMMON,
        "adjust_start": 1,
        "adjust_interval": 2,
        "adjust_end": 5,
        "adjust_size": 2,
        "init_weights": False,
    }
    return dynalora.PedyraConfig(**{"match_step": False, **defaults, **options})


def dylora(**options: Any) -> dynalora.DyloraConfig:
    defaults = {**COMMON, "init_weights": False}
    return dynalora.DyloraConfig(**{**defaults, **options})


def _grows(kind: type) -> Callable[..., Any]:
    """Ranks that grow at every other step, in runs as short as the tests' are."""

    def make(**options: Any) -> Any:
        defaults = {
            **COMMON,
            "r": 2,
            "alpha": 4,
            "target_rank": 4,
            "grow_start": 2,
            "grow_interval": 2,
            "init_weights": False,
        }
        return kind(**{**defaults, **options})

    return make


CONFIGS = {
    "dira": dira,
    "disel": disel,
    "dislora": dislora,
    "pedyra": pedyra,
    "dylora": dylora,
    "increlora": _grows(dynalora.IncreloraConfig),
    "triadaptlora": _grows(dynalora.TriAdaptLoraConfig),
}


def adapted(config: Any, base: nn.Module | None = None, dtype: torch.dtype = torch.float32, seed: int = 3) -> Any:
    """A tiny Llama with an adapter, the same at every call."""
    base = (llama() if base is None else base).to(dtype)
    torch.manual_seed(seed)
    return peft.get_peft_model(base, config)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights, copied."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), f"{name}: {(tensor - other[name]).abs().max():.3g}"


def assert_close_weights(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=tolerance, rtol=tolerance, msg=name)


def differs(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    if any(tensor.shape != other[name].shape for name, tensor in one.items()):
        return float("inf")  # ranks have moved
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def batches(count: int, size: int = 2, seed: int = 9) -> list[Tensor]:
    """Token batches (size, 6); the same as a sequential pass over :func:`examples`."""
    return list(tokens(count * size, 6, seed=seed).split(size))


def examples(count: int, seed: int = 9) -> list[dict[str, Tensor]]:
    """Rows to be predicted from their second token on; transformers 5.0 would count a label of the first, too."""
    rows = tokens(count, 6, seed=seed)
    labels = rows.clone()
    labels[:, 0] = -100
    return [{"input_ids": row, "labels": own} for row, own in zip(rows, labels, strict=True)]


def loop(model: Any, optimizer: torch.optim.Optimizer, data: list[Tensor], scheduler: Any = None) -> None:
    """The loop that everybody writes."""
    model.train()
    for batch in data:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    model.eval()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=lr)


def adamw(model: nn.Module, lr: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.1, **options)


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(**{**trainer_options(folder), **options})


class InOrder:
    """Makes a Trainer take the examples as they stand, for which not all versions have a setting."""

    train_dataset: Any

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class OrderedTrainer(InOrder, transformers.Trainer):
    """transformers' Trainer, which is told nothing about adapters."""


def trainer_options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "optim": "adamw_torch",
    }


def clock(model: nn.Module, adapter: str = "default") -> tuple[int, int | None]:
    """(steps done, steps of the run) of an adapter."""
    from dynalora.driver import drivers_of

    (driver,) = [driver for driver, _ in drivers_of(model) if driver.adapter == adapter]
    return driver.step, driver.total_steps
