"""The same training under transformers' Trainer, TRL and a bare loop; killed, resumed and continued."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from dynalora.errors import ScheduleError
from tests.driver.loops import (
    CONFIGS,
    InOrder,
    OrderedTrainer,
    adapted,
    arguments,
    assert_close_weights,
    assert_same_weights,
    batches,
    clock,
    differs,
    dira,
    examples,
    loop,
    pedyra,
    trainable,
    trainer_options,
    weights,
)
from tests.driver.optimizers import OPTIMIZERS, Tested
from tests.driver.test_optimizers import require
from tests.toys import TOYS

every_config = pytest.mark.parametrize("name", CONFIGS)


def trained(folder: Path, config: Any, model: Any = None, resume: Any = None, **options: Any) -> Any:
    """A model after transformers' Trainer."""
    model = adapted(config) if model is None else model
    settings = arguments(folder, **options)
    count = settings.max_steps * settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    trainer = OrderedTrainer(model=model, args=settings, train_dataset=examples(count))
    trainer.train(resume_from_checkpoint=resume)
    model.trainer_state = trainer.state
    return model.eval()


def bare_loop(config: Any, steps: int = 6, size: int = 2) -> Any:
    """What the Trainer of these tests does, by hand."""
    model = adapted(config)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in named.items() if "bias" not in name]
    rest = [p for name, p in named.items() if "bias" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    loop(model, optimizer, batches(steps, size), scheduler)
    return model


# --- three ways to train -------------------------------------------------------------------------------------


@every_config
def test_trainer_and_bare_loop_reach_the_same_weights(name: str, tmp_path: Path) -> None:
    by_trainer = trained(tmp_path, CONFIGS[name]())
    by_hand = bare_loop(CONFIGS[name](total_steps=6))
    assert clock(by_trainer) == clock(by_hand) == (6, 6)
    assert_close_weights(weights(by_trainer), weights(by_hand), 1e-5)


@every_config
def test_trl_and_bare_loop_reach_the_same_weights(name: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = adapted(CONFIGS[name]())
    settings = trl.SFTConfig(
        **trainer_options(tmp_path),
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
        bf16=False,
        packing=False,
        completion_only_loss=True,
    )
    ids = [row["input_ids"].tolist() for row in examples(12)]
    labels = [row["labels"].tolist() for row in examples(12)]
    # Old versions of TRL take the masks, new ones the labels.
    masks = [[int(label != -100) for label in row] for row in labels]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "completion_mask": masks})
    ordered = type("OrderedSFTTrainer", (InOrder, trl.SFTTrainer), {})
    ordered(model=model, args=settings, train_dataset=rows, processing_class=tokenizer()).train()
    by_hand = bare_loop(CONFIGS[name](total_steps=6))
    assert clock(model) == (6, 6)
    assert_close_weights(weights(model), weights(by_hand), 1e-4)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    import tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_the_penalty_matters_here(tmp_path: Path) -> None:
    """These comparisons would say nothing if the driver's part were too small to see."""
    with_penalty = trained(tmp_path / "a", dira())
    without = trained(tmp_path / "b", dira(penalty_weight=0.0))
    constant = trained(tmp_path / "c", dira(penalty_schedule="constant"))
    assert differs(weights(with_penalty), weights(without)) > 1e-3
    assert differs(weights(with_penalty), weights(constant)) > 1e-3


@every_config
def test_accumulation_of_four_equals_batches_of_four(name: str, tmp_path: Path) -> None:
    whole = trained(tmp_path / "a", CONFIGS[name](), per_device_train_batch_size=4)
    parts = trained(tmp_path / "b", CONFIGS[name](), per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert clock(whole) == clock(parts) == (6, 6)
    assert_close_weights(weights(parts), weights(whole), 1e-5)


NAMED = [(tested, name) for tested in OPTIMIZERS for name in tested.trainer]


@pytest.mark.parametrize(("tested", "optim"), NAMED, ids=[name for _, name in NAMED])
def test_optimizers_of_trainer(tested: Tested, optim: str, tmp_path: Path) -> None:
    """By their names; what they do with each method is in `test_optimizers.py`."""
    require(tested)
    model = trained(tmp_path, pedyra(), optim=optim, max_steps=2)
    assert clock(model) == (2, 2)


def test_total_steps_from_epochs(tmp_path: Path) -> None:
    model = adapted(dira())
    settings = arguments(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    OrderedTrainer(model=model, args=settings, train_dataset=examples(12)).train()
    assert clock(model) == (6, 6)


def test_total_steps_of_the_config_count_and_the_difference_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="total_steps=40"):
        model = trained(tmp_path, dira(total_steps=40), max_steps=3)
    assert clock(model) == (3, 40)


@every_config
def test_max_grad_norm_and_checkpointing(name: str, tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", CONFIGS[name](), max_grad_norm=1.0)
    checkpointed = trained(tmp_path / "b", CONFIGS[name](), max_grad_norm=1.0, gradient_checkpointing=True)
    assert_close_weights(weights(checkpointed), weights(plain), 1e-5)


def test_a_second_run_of_trainer_starts_its_schedule_anew(tmp_path: Path) -> None:
    model = trained(tmp_path / "a", dira())
    assert clock(model) == (6, 6)
    trained(tmp_path / "b", None, model=model, max_steps=4)
    assert clock(model) == (4, 4)


def test_a_run_of_one_adapter_leaves_the_others_clock_alone(tmp_path: Path) -> None:
    model = trained(tmp_path / "a", dira())
    assert clock(model, "default") == (6, 6)
    model.add_adapter("second", dira())
    model.set_adapter("second")
    trained(tmp_path / "b", None, model=model, max_steps=3)
    assert clock(model, "second") == (3, 3)
    assert clock(model, "default") == (6, 6)


@every_config
def test_injected_without_a_peft_model(name: str, tmp_path: Path) -> None:
    """``model.add_adapter(config)`` of transformers trains as ``get_peft_model`` does."""
    reference = adapted(CONFIGS[name](task_type=None))
    start = weights(reference)
    model = TOYS["llama"].build()
    model.add_adapter(CONFIGS[name](task_type=None))
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(start["base_model.model." + key])
    trained(tmp_path / "a", None, model=model)
    trained(tmp_path / "b", None, model=reference)
    assert clock(model) == (6, 6)
    assert_same_weights({"base_model.model." + k: v for k, v in weights(model).items()}, weights(reference))


# --- interrupted and resumed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@every_config
def test_n_plus_n_steps_equal_two_n(name: str, optim: str, tmp_path: Path) -> None:
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "optim": optim}
    straight = trained(tmp_path / "run", CONFIGS[name](dropout=0.1), **options)
    resumed = trained(
        tmp_path / "run", CONFIGS[name](dropout=0.1), resume=str(tmp_path / "run" / "checkpoint-4"), **options
    )
    assert clock(resumed) == clock(straight) == (8, 8)
    assert_same_weights(weights(resumed), weights(straight))


def test_resumed_in_another_process(tmp_path: Path, run_python: Any) -> None:
    script = """
        import sys
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        import safetensors.torch
        from tests.driver.loops import CONFIGS, weights
        from tests.driver.test_trainers import trained
        folder = Path(sys.argv[1])
        for name in CONFIGS:
            run = folder / name
            model = trained(
                run, CONFIGS[name](dropout=0.1), resume=str(run / "checkpoint-4"),
                max_steps=8, save_strategy="steps", save_steps=4,
            )
            safetensors.torch.save_file(weights(model), folder / f"{name}.safetensors")
    """
    import safetensors.torch

    straight = {
        name: trained(tmp_path / name, CONFIGS[name](dropout=0.1), max_steps=8, save_strategy="steps", save_steps=4)
        for name in CONFIGS
    }
    run_python(script, str(tmp_path))
    for name, model in straight.items():
        assert_same_weights(safetensors.torch.load_file(tmp_path / f"{name}.safetensors"), weights(model))


def test_loading_the_best_checkpoint_takes_its_clock(tmp_path: Path) -> None:
    """The clock saved with the adapter is that of the adapter's weights."""
    model = trained(tmp_path, dira(), max_steps=6, save_strategy="steps", save_steps=2)
    assert clock(model) == (6, 6)
    loaded = peft.PeftModel.from_pretrained(TOYS["llama"].build(), tmp_path / "checkpoint-2", is_trainable=True)
    assert clock(loaded) == (2, 6)


# --- what the user hears -------------------------------------------------------------------------------------


class MasterCopy(torch.optim.Optimizer):
    """Steps copies of the parameters and writes them back, as optimizers with float32 master weights do."""

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        self.real = parameters
        super().__init__([p.detach().clone() for p in parameters], {"lr": lr})

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for master, real in zip(group["params"], self.real, strict=True):
                    master -= group["lr"] * real.grad
                    real.copy_(master)


@every_config
def test_an_invisible_optimizer_is_an_error_at_once(name: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS[name]())
    optimizer = MasterCopy(trainable(model), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = OrderedTrainer(
        model=model, args=arguments(tmp_path), train_dataset=examples(12), optimizers=(optimizer, scheduler)
    )
    with pytest.raises(ScheduleError) as caught:
        trainer.train()
    assert trainer.state.global_step <= 2
    assert "optim" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_evaluation_does_not_move_the_clock(tmp_path: Path) -> None:
    model = adapted(dira())
    settings = arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=3)
    trainer = OrderedTrainer(model=model, args=settings, train_dataset=examples(6), eval_dataset=examples(4, seed=2))
    trainer.train()
    trainer.evaluate()
    assert clock(model) == (3, 3)


def test_the_logged_loss_is_the_task_loss(tmp_path: Path) -> None:
    losses = {}
    for weight in (0.0, 100.0):
        model = trained(
            tmp_path / str(weight),
            dira(penalty_weight=weight, penalty_schedule="constant"),
            max_steps=1,
            logging_strategy="steps",
            logging_steps=1,
        )
        losses[weight] = model.trainer_state.log_history[0]["loss"]
    assert losses[0.0] == losses[100.0]


def test_the_penalty_weight_is_logged_and_falls(tmp_path: Path) -> None:
    model = trained(tmp_path, dira(), logging_strategy="steps", logging_steps=1)
    rows = [row for row in model.trainer_state.log_history if "loss" in row]
    values = [next(v for k, v in row.items() if "penalty_weight" in k) for row in rows]
    assert len(values) == 6
    assert values == sorted(values, reverse=True)
    assert values[0] <= 0.5
    assert values[-1] < 0.1
    json.dumps(model.trainer_state.log_history)


def test_importing_twice_hooks_once(tmp_path: Path) -> None:
    import importlib

    import dynalora.driver.trainer as link

    link.install()
    importlib.import_module("dynalora")
    from transformers import trainer as transformers_trainer

    names = [c.__name__ for c in transformers_trainer.DEFAULT_CALLBACKS]
    assert names.count("DriverCallback") == 1
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)


def test_trainer_without_adapters_is_left_alone(tmp_path: Path) -> None:
    model = TOYS["llama"].build()
    trainer = OrderedTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=examples(2))
    trainer.train()
    assert trainer.state.global_step == 1
