"""Methods to compare with: how each is configured by name, and what must be done while it trains.

All but full fine-tuning are PEFT's. Two of them need help in training. AdaLoRA adapts its ranks only if its
`update_and_allocate` is called after every optimizer step; without that it trains as plain LoRA in the form of an SVD
and gives no warning. LoRA+ is LoRA with an optimizer that takes larger steps on up-projections.

Methods of PEFT that have no entry here are configured by a file as PEFT writes it (`config_from_file`).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import peft
import torch
import yaml
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from dynalora.adapter.targets import targeted_modules
from dynalora.common.names import did_you_mean
from dynalora.errors import ConfigError, ScheduleError
from dynalora.forgetting.passes import pass_rows
from dynalora.forgetting.texts import anchor_text
from dynalora.lab.null_space import LoraNullConfig, start_in_null_space
from dynalora.lab.settings import parse_yaml

# AdaLoRA's schedule where none is given, as parts of the run: ranks are cut from the first to the second.
_ADALORA_START, _ADALORA_END, _ADALORA_CUTS = 0.1, 0.7, 20

# Starts of PEFT's LoRA that take a part of the base weight away, so that disabling the adapter does not bring it back.
_SUBTRACTING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Starts that nothing here prepares, and PEFT's call that does.
_PREPARING_CALLS = {"eva": "initialize_lora_eva_weights", "lora_ga": "preprocess_loraga"}

# Prompt learning that puts embeddings before the input, which evaluation knows how to do.
_PROMPTS = ("P_TUNING", "PROMPT_TUNING")


@dataclass
class LoraPlusConfig(peft.LoraConfig):
    """PEFT's LoRA with LoRA+ (Hayou et al., 2024): up-projections step with a multiple of the learning rate.

    The multiple concerns training only and is not saved: what comes out is a LoRA like any other.

    Args:
        loraplus_lr_ratio: The multiple, η_B / η_A, at least 1; the paper advises 16 and more.

    Raises:
        ConfigError: The multiple is below 1.
    """

    loraplus_lr_ratio: float = field(
        default=16.0, metadata={"help": "Multiply the learning rate by this number for up-projections."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        ratio = self.loraplus_lr_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 1 <= ratio < math.inf:
            raise ConfigError(f"loraplus_lr_ratio is {ratio!r}; give a number of at least 1.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are saved: those of a LoRA."""
        saved: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return {name: value for name, value in saved.items() if name != "loraplus_lr_ratio"}


def _loraplus(model: PeftModel, kind: type[Optimizer], settings: Mapping[str, Any]) -> Optimizer:
    config = model.active_peft_config
    assert isinstance(config, LoraPlusConfig)
    options = dict(settings)
    optimizer: Optimizer = create_loraplus_optimizer(
        model,
        kind,
        lr=options.pop("lr"),
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        loraplus_weight_decay=options.pop("weight_decay", 0.0),
        **options,
    )
    return optimizer


@dataclass(frozen=True)
class Baseline:
    """A method to compare with.

    Attributes:
        title: Its name as its paper writes it.
        config: The class of its configuration; None: there is no adapter, and every weight is trained.
        alpha_per_rank: Alpha, where none is given, as a multiple of the rank.
        options: Fields that make the method what it is, or that PEFT has no default for.
        rank: The field of the rank.
        alpha: The field of alpha; None: its update has no scaling.
        dropout: The field of the dropout on the adapter's input; None: there is none.
        adapts_modules: Whether it adapts linear layers, so that target modules mean something.
        edits_base: Whether it changes the base weights, so that disabling the adapter does not give the base model.
        has_factors: Whether its update is a product of factors, whose singular values can be measured.
        more: Further fields by rank.
        start: Computes the fresh adapter's start from the model and its tokenizer; None: PEFT's own.
        optimizer: Makes its own optimizer of the given class and settings (`lr`, `weight_decay`, …); None: it is
            trained as all others are.
    """

    title: str
    config: type[PeftConfig] | None
    alpha_per_rank: float = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: str = "r"
    alpha: str | None = "lora_alpha"
    dropout: str | None = "lora_dropout"
    adapts_modules: bool = True
    edits_base: bool = False
    has_factors: bool = True
    more: Callable[[int], dict[str, Any]] = lambda r: {}
    start: Callable[[PeftModel, PreTrainedTokenizerBase], None] | None = None
    optimizer: Callable[[PeftModel, type[Optimizer], Mapping[str, Any]], Optimizer] | None = None

    def fields(self, r: int, alpha: float | None, dropout: float) -> dict[str, Any]:
        """Fields of the configuration for a rank, a scaling alpha / r and a dropout on the adapter's input.

        Raises:
            ConfigError: Alpha or dropout is given and the method has none.
        """
        values: dict[str, Any] = {self.rank: r}
        if self.alpha is not None:
            scaling = self.alpha_per_rank * r if alpha is None else alpha
            values[self.alpha] = int(scaling) if scaling == int(scaling) else scaling
        elif alpha is not None:
            raise ConfigError(f"{self.title} has no scaling, so `alpha` ({alpha:g}) means nothing; leave it out.")
        if self.dropout is not None:
            values[self.dropout] = dropout
        elif dropout:
            raise ConfigError(f"{self.title} has no dropout on an adapter's input; leave `dropout` ({dropout:g}) at 0.")
        return {**values, **self.more(r), **self.options}


BASELINES: dict[str, Baseline] = {
    "lora": Baseline("LoRA", peft.LoraConfig, alpha_per_rank=2),
    "rslora": Baseline("rsLoRA", peft.LoraConfig, alpha_per_rank=1, options={"use_rslora": True}),
    "lora+": Baseline("LoRA+", LoraPlusConfig, alpha_per_rank=2, optimizer=_loraplus),
    "lora-null": Baseline("LoRA-Null", LoraNullConfig, alpha_per_rank=2, start=start_in_null_space),
    "dora": Baseline("DoRA", peft.LoraConfig, alpha_per_rank=2, options={"use_dora": True}),
    # Its factors start at the length of the weight's own singular values.
    "pissa": Baseline(
        "PiSSA", peft.LoraConfig, alpha_per_rank=1, options={"init_lora_weights": "pissa"}, edits_base=True,
    ),
    # total_step is set when training begins and its length is known; PEFT asks for a number before that.
    "adalora": Baseline(
        "AdaLoRA", peft.AdaLoraConfig, alpha_per_rank=2, rank="target_r", options={"total_step": 2**31},
        more=lambda r: {"init_r": round(1.5 * r)},
    ),
    # The rank is that of each of its random bases: the smaller it is, the more of them there are, and the more weights
    # are trained. PEFT advises 20 times the rank for alpha.
    "randlora": Baseline(
        "RandLoRA", peft.RandLoraConfig, alpha_per_rank=20, alpha="randlora_alpha", dropout="randlora_dropout",
        has_factors=False,
    ),
    "miss": Baseline("MiSS", peft.MissConfig, alpha=None, dropout="miss_dropout", has_factors=False),
    # PEFT's default is an encoder as wide as the model, in which nearly all trained weights would be.
    "p-tuning": Baseline(
        "P-Tuning", peft.PromptEncoderConfig, rank="num_virtual_tokens", options={"encoder_hidden_size": 128},
        alpha=None, dropout=None, adapts_modules=False, has_factors=False,
    ),
    "full": Baseline(
        "full fine-tuning", None, alpha=None, dropout=None, adapts_modules=False, edits_base=True, has_factors=False,
    ),
}  # fmt: skip


def edits_base(method: str, config: PeftConfig | None) -> bool:
    """Whether training changes the base weights, so that the model without its adapter is not the base model.

    Without a configuration every weight is trained.
    """
    baseline = BASELINES.get(method.lower())
    start = getattr(config, "init_lora_weights", None)
    return (
        config is None
        or (baseline is not None and baseline.edits_base)
        or (isinstance(start, str) and start.lower().startswith(_SUBTRACTING_STARTS))
    )


def corda_config(values: Any = None) -> CordaConfig:
    """PEFT's settings of CorDA's start; in the knowledge-preserving mode unless the values say otherwise.

    Raises:
        ConfigError: A value is unknown.
    """
    if isinstance(values, CordaConfig):
        return values
    try:
        return CordaConfig(**{"corda_method": "kpm", **(values or {})})
    except TypeError as error:
        raise ConfigError(f"corda_config is {values!r}, which PEFT's CordaConfig does not take: {error}") from error


def check_start(config: PeftConfig) -> None:
    """Refuse starts that PEFT computes in a call of its own, without which it would train a plain LoRA.

    Raises:
        ConfigError: The start is one of them.
    """
    start = getattr(config, "init_lora_weights", None)
    call = _PREPARING_CALLS.get(start.lower()) if isinstance(start, str) else None
    if call is not None:
        raise ConfigError(
            f"init_lora_weights={start!r} needs PEFT's {call}, which is not called here, so that it would be a plain "
            "LoRA; choose corda, which is prepared, or pissa or olora, or leave it out."
        )


def prepare_start(
    model: PreTrainedModel | PeftModel, config: PeftConfig | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """What must be done with a base model before an adapter is attached to it.

    CorDA's start is computed from the layers' inputs on text whose knowledge is to be kept; here on text that the base
    model writes itself, of other openings than retention is measured on.
    """
    if not isinstance(config, peft.LoraConfig) or config.init_lora_weights != "corda":
        return
    from peft.tuners.lora.corda import preprocess_corda  # loads attrs, which nothing else here needs

    anchors = anchor_text(model, tokenizer)
    named = copy.copy(config)  # PEFT looks for each module's name among these, and does not know all-linear here
    named.target_modules = targeted_modules(model, config)
    preprocess_corda(model, named, run_model=partial(pass_rows, model, anchors.rows))


def finish_start(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """What must be done with a fresh adapter once it is attached."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    for baseline in BASELINES.values():
        if baseline.start is not None and type(config) is baseline.config:
            baseline.start(cast(PeftModel, model), tokenizer)


def config_from_file(
    path: str | Path,
    *,
    target_modules: list[str] | str = "all-linear",
    options: Mapping[str, Any] | None = None,
    task_type: str = "CAUSAL_LM",
) -> PeftConfig:
    """The configuration of any of PEFT's methods, for training.

    Args:
        path: A file as PEFT's `adapter_config.json`, or the same as YAML; `peft_type` says which method it is.
        target_modules: What to adapt where the file does not say.
        options: Fields that replace the file's.
        task_type: PEFT's name of what the model does, whatever the file says.

    Raises:
        ConfigError: The file cannot be read, its method or one of its fields is unknown, or they do not fit together.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix.lower() == ".json" else parse_yaml(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"The configuration '{path}' cannot be read ({reason}); give a file as PEFT's adapter_config.json."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"The configuration '{path}' is no mapping; give a file as PEFT's adapter_config.json.")
    kinds = {str(getattr(name, "value", name)): kind for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = str(content.get("peft_type", "")).rpartition(".")[2].upper()
    if name not in kinds:
        remedy = did_you_mean(name, sorted(kinds)) if name else "name PEFT's method there, as LORA"
        raise ConfigError(f"'{path}' has the peft_type '{content.get('peft_type', '')}'; {remedy}.")
    kind = kinds[name]
    valid = {item.name for item in fields(kind)}
    bookkeeping = {item.name for item in fields(PeftConfig)}
    values = {**content, **(options or {})}
    for option in values:
        if option not in valid and option != "runtime_config":  # which PEFT writes and does not read
            raise ConfigError(
                f"'{path}': {name} has no field '{option}'; {did_you_mean(option, sorted(valid - bookkeeping))}."
            )
    for option in {*bookkeeping, "runtime_config"}:
        values.pop(option, None)
    if "target_modules" in valid and not values.get("target_modules"):
        values["target_modules"] = target_modules
    try:
        config: PeftConfig = kind(task_type=task_type, **values)
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # values of other kinds than meant
        raise ConfigError(f"The settings in '{path}' do not fit together: {error}") from error
    if config.is_prompt_learning and name not in _PROMPTS:
        raise ConfigError(
            f"'{path}' is for {name}, whose prompt cannot be measured here; of prompt learning choose "
            f"{' or '.join(_PROMPTS)}."
        )
    return config


def prompt_only(config: PeftConfig | None) -> bool:
    """Whether a method trains virtual tokens before the input and adapts no layer."""
    return config is not None and bool(config.is_prompt_learning)


def optimizer_of(model: nn.Module, kind: type[Optimizer], settings: Mapping[str, Any]) -> Optimizer | None:
    """The optimizer of this class and settings that a method brings; None if it is trained as all others are."""
    if not isinstance(model, PeftModel):
        return None
    config = model.active_peft_config
    for baseline in BASELINES.values():
        if baseline.optimizer is not None and type(config) is baseline.config:
            return baseline.optimizer(model, kind, settings)
    return None


def driver_of(model: nn.Module, total_steps: int) -> Callable[[int], None] | None:
    """What must be called after every optimizer step, before gradients are cleared, with the number of steps before it.

    AdaLoRA's own fields `tinit`, `tfinal` (steps before the first and after the last cut) and `deltaT` (steps between)
    are kept where any is given; else ranks are cut from 10 % to 70 % of the run, about 20 times. `tinit` and `tfinal`
    below 1 are parts of the run, and such that leave no step between them (0.2 and 0.8) cut all ranks at once. None:
    the method needs nothing.

    Raises:
        ScheduleError: The run is too short for AdaLoRA's schedule.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(config, peft.AdaLoraConfig):
        return None
    if (config.tinit, config.tfinal, config.deltaT) == (0, 0, 1):
        config.tinit = round(_ADALORA_START * total_steps)
        config.tfinal = total_steps - round(_ADALORA_END * total_steps)
        config.deltaT = max(1, (total_steps - config.tfinal - config.tinit) // _ADALORA_CUTS)
    if 0 < config.tinit < 1 and 0 < config.tfinal < 1:
        config.tfinal = round(config.tfinal * total_steps)
        config.tinit = min(round(config.tinit * total_steps), total_steps - config.tfinal - 1)
    config.total_step = total_steps
    if config.tinit >= total_steps - config.tfinal:
        raise ScheduleError(
            f"AdaLoRA with tinit={config.tinit} and tfinal={config.tfinal} has no step to cut ranks at in a run of "
            f"{total_steps} optimizer steps; train longer, or lower tinit and tfinal."
        )
    tuner: Any = model.base_model
    return cast("Callable[[int], None]", tuner.update_and_allocate)


def regulariser_of(model: nn.Module) -> torch.Tensor | None:
    """What a method of PEFT's adds to the loss that a model returns, as a scalar; None: nothing.

    AdaLoRA adds `orth_reg_weight` times the mean distance of its factors from orthonormal ones.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(config, peft.AdaLoraConfig):
        return None
    distances = []
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if f".{model.active_adapter}" in name and ("lora_A" in name or "lora_B" in name):
                products = factor @ factor.T if "lora_A" in name else factor.T @ factor
                distances.append((products - torch.eye(len(products), device=products.device)).norm())
    return config.orth_reg_weight * torch.stack(distances).mean() if distances else None


class DriveBaseline(TrainerCallback):
    """Calls what `driver_of` returns, under transformers' Trainer, and takes a regulariser out of the loss it logs.

    The training loss that is recorded and drawn is then the task's, as for all other methods.
    """

    def __init__(self) -> None:
        self._driver: Callable[[int], None] | None = None
        self._added: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """The length of the run is known."""
        self._driver = driver_of(getattr(model, "module", model), state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """The weights are those that the step's loss is of."""
        added = None if self._driver is None else regulariser_of(getattr(model, "module", model))
        if added is not None:
            self._added.append(added)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The weights have moved, and the gradients are still there."""
        if self._driver is not None:
            self._driver(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """The loss that is logged is the mean over the steps since the last time."""
        if logs is not None and "loss" in logs and self._added:
            regulariser = float(torch.stack(self._added).mean())
            logs |= {"loss": logs["loss"] - regulariser, "regulariser": regulariser}
            self._added.clear()
