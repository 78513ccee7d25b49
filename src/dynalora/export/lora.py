"""Handing an adapter on as a plain PEFT LoRA, which every server loads and which needs no dynalora."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn

from dynalora.adapter.experts import fused_experts
from dynalora.adapter.layer import AdapterLayer, adapter_layers
from dynalora.adapter.layer_kinds import stand_in
from dynalora.adapter.ranks import fit
from dynalora.adapter.register import METHODS
from dynalora.adapter.saved import check_known
from dynalora.common.files import folder_beside, write_file
from dynalora.common.names import PREFIX, plain_name
from dynalora.errors import CheckpointError, ConfigError, DynaloraError, UnsupportedError
from dynalora.export.serving import Serving, check_serving
from dynalora.export.snapshot import GateMeans, held_gates
from dynalora.export.targets import Factors, Target, factors_in, targets_of
from dynalora.spectral.spectrum import factor_svd


@dataclass
class ExportReport:
    """What an export wrote.

    Attributes:
        path: The folder.
        modules: Number of adapted matrices.
        ranks: Rank of each matrix, by module name.
        parameters: Numbers in the factors.
        max_error: Largest difference between the adapter's update and the exported one on a random input, relative
            to the largest entry of the update's result; 0 for an update that is zero.
        lost: Largest share of an update that was cut off, ‖ΔW − ΔW_cut‖_F / ‖ΔW‖_F; 0 unless it was asked for.
        serving: Which servers take it as it is, by their rules.
    """

    path: str
    modules: int
    ranks: dict[str, int]
    parameters: int
    max_error: float
    lost: float = 0.0
    serving: tuple[Serving, ...] = ()


@torch.no_grad()
def export_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    max_rank: int | None = None,
    tolerance: float | None = None,
    uniform_rank: int | None = None,
    gates: Iterable[GateMeans] | None = None,
) -> ExportReport:
    """Write an adapter as a plain PEFT LoRA: `adapter_config.json` and safetensors.

    Exact: the factors are the adapter's own (with its diagonal folded into the up factor), and the scaling of every
    matrix is the same number. Experts of a fused parameter, which have one rank in PEFT, are filled up with zeros. What
    was written is read back and compared on a random input, matrix by matrix.

    Args:
        model: Model with the adapter; neither merged nor unmerged by this.
        path: Folder to write; must not exist, or be empty.
        adapter_name: Which adapter.
        dtype: Type of the written factors; None keeps the adapter's.
        max_rank: Write the best approximation of every update by at most this rank (its truncated singular value
            decomposition).
        tolerance: Write each update with the smallest rank that loses at most this share of its Frobenius norm, in
            [0, 1); 0 drops only what is nothing but rounding.
        uniform_rank: Write all matrices with this rank, filled up with zeros, and with one alpha, for servers that
            read no patterns; 0 takes the largest rank there is. Nothing is cut: combine it with `max_rank` for that.
        gates: For an adapter with gates, their record on the text that the export is for
            (`dynalora.record_gates`). They are held at their means, a snapshot whose price
            `dynalora.export.snapshot_price` measures.

    Returns:
        What was written, with the largest error found, the largest share that was cut off, and who can serve it.

    Raises:
        UnsupportedError: The method's update depends on the input and no `gates` are given, there are none to hold,
            biases were trained, or a convolution is adapted in which PEFT's LoRA computes something else.
        ConfigError: `max_rank`, `tolerance` or `uniform_rank` is out of range, or `gates` are not this
            adapter's.
        DynaloraError: The folder is not empty, or the model has no such adapter.
    """
    _check_wishes(max_rank, tolerance, uniform_rank)
    if gates is not None:
        with held_gates(model, gates, adapter_name):
            return export_lora(model, path, adapter_name, dtype, max_rank, tolerance, uniform_rank)
    layers = adapter_layers(model, adapter_name)
    if not layers:
        raise DynaloraError(f"the model has no dynalora adapter named {adapter_name!r} to export.")
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DynaloraError(f"{target} already exists and is not an empty folder; choose another path for the export.")
    config: Any = next(iter(layers.values())).drivers[adapter_name].config
    if config.bias != "none":
        raise UnsupportedError(
            f"adapter {adapter_name!r} was trained with bias={config.bias!r}; a plain LoRA of its factors would lack "
            "the trained biases. Merge it into the base model instead."
        )
    factors, lost = _factors(layers, adapter_name, dtype, max_rank, tolerance, uniform_rank)
    targets = targets_of(layers, factors, mixture=bool(fused_experts(model)))
    state, dora = _state(model, layers, adapter_name, targets)
    lora = _lora_config(
        config,
        targets,
        conv1d=any(layer.transposed for layer in layers.values()),
        # Of one rank it is only another way to write alpha, which not every server reads.
        rslora=bool(config.use_rslora) and uniform_rank is None,
    )
    lora.use_dora = dora
    with folder_beside(target, replace=False) as beside:
        lora.save_pretrained(str(beside))
        save_file(state, beside / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        error = _verify(beside, layers, adapter_name)
        serving = check_serving(beside)
    return ExportReport(
        path=str(target),
        modules=len(factors),
        ranks={name: up.shape[1] for name, (up, _, _) in factors.items()},
        parameters=sum(up.numel() + down.numel() for up, down, _ in factors.values()),
        max_error=error,
        lost=lost,
        serving=serving,
    )


def _check_wishes(max_rank: int | None, tolerance: float | None, uniform_rank: int | None) -> None:
    if max_rank is not None and max_rank < 1:
        raise ConfigError(f"max_rank={max_rank}: give a rank of at least 1, or leave it out.")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance={tolerance}: give a share of the update in [0, 1), or leave it out.")
    if uniform_rank is not None and uniform_rank < 0:
        raise ConfigError(f"uniform_rank={uniform_rank}: give a rank, 0 for the largest there is, or leave it out.")


def _factors(
    layers: Mapping[str, AdapterLayer],
    adapter: str,
    dtype: torch.dtype | None,
    max_rank: int | None,
    tolerance: float | None,
    uniform_rank: int | None,
) -> tuple[dict[str, Factors], float]:
    """The factors to write by module, on the CPU, and the largest share of an update that was cut off."""
    factors: dict[str, Factors] = {}
    lost = 0.0
    for name, layer in layers.items():
        up, down = layer.factors(adapter)
        if max_rank is not None or tolerance is not None:
            up, down, share = _recompress(up, down, max_rank, tolerance)
            lost = max(lost, share)
        factors[plain_name(name)] = up.detach().cpu(), down.detach().cpu(), layer.scaling[adapter]
    if uniform_rank is not None:
        factors = _uniform(factors, uniform_rank)
    factors = {
        name: (up.to(dtype or up.dtype).contiguous(), down.to(dtype or down.dtype).contiguous(), s)
        for name, (up, down, s) in factors.items()
    }
    return factors, lost


def _state(
    model: nn.Module, layers: Mapping[str, AdapterLayer], adapter: str, targets: Mapping[str, Target]
) -> tuple[dict[str, torch.Tensor], bool]:
    """Everything to write under PEFT's names, and whether DoRA's magnitudes are among it."""
    state = {f"{PREFIX}{key}": part for target in targets.values() for key, part in target.tensors.items()}
    extras = {
        f"{PREFIX}{plain_name(name)}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in layer.plain_extras(adapter).items()
    }
    for key, tensor in {**extras, **_modules_to_save(model, adapter)}.items():
        state[key] = tensor
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    return state, any(key.endswith(".lora_magnitude_vector") for key in extras)


def _uniform(factors: dict[str, Factors], rank: int) -> dict[str, Factors]:
    """Factors (out, rank) and (rank, in) of one rank, filled up with zeros, and of one scaling."""
    largest = max(down.shape[0] for _, down, _ in factors.values())
    if rank and rank < largest:
        raise ConfigError(
            f"uniform_rank={rank} is below the largest rank, {largest}; cut the updates with max_rank={rank}, or give "
            "at least that."
        )
    rank = rank or largest
    common = Counter(s for _, _, s in factors.values()).most_common(1)[0][0]
    return {
        name: (fit(up if s == common else up * (s / common), 1, rank), fit(down, 0, rank), common)
        for name, (up, down, s) in factors.items()
    }


def _recompress(
    up: torch.Tensor, down: torch.Tensor, max_rank: int | None, tolerance: float | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best factors of low rank for (out, k) and (k, in), and the share of the update that they lose."""
    u, values, v = factor_svd(up, down)
    rank = len(values)
    # What the last singular values sum up to, from each on: the error of cutting there.
    tail = values.square().flip(0).cumsum(0).flip(0).sqrt()
    whole = float(tail[0])
    if tolerance is not None:
        rounding = len(values) * torch.finfo(up.dtype).eps
        rank = int((tail > max(tolerance, rounding) * whole).sum())
    rank = max(1, min(rank, max_rank or rank))
    lost = float(tail[rank]) / whole if rank < len(values) and whole else 0.0
    root = values[:rank].sqrt()
    return (u[:, :rank] * root).to(up.dtype), (root[:, None] * v[:rank]).to(down.dtype), lost


def export_adapter_folder(
    source: str,
    path: str,
    dtype: torch.dtype | None = None,
    max_rank: int | None = None,
    tolerance: float | None = None,
    uniform_rank: int | None = None,
) -> ExportReport:
    """Export a saved adapter without its base model; see `export_lora`.

    Args:
        source: Folder of the saved adapter.
        path: Folder to write.
        dtype: Type of the written factors; None keeps the adapter's.
        max_rank: Largest rank to write.
        tolerance: Share of each update that may be cut off.
        uniform_rank: One rank to fill all matrices up to; 0 takes the largest.

    Raises:
        CheckpointError: The folder holds no whole adapter of dynalora.
        ConfigError: `max_rank`, `tolerance` or `uniform_rank` is out of range.
        UnsupportedError: The method's update depends on the input.
    """
    return export_lora(
        load_without_base(source), path, dtype=dtype, max_rank=max_rank, tolerance=tolerance, uniform_rank=uniform_rank
    )


def rank_pattern(model: nn.Module, adapter: str = "default") -> dict[str, int]:
    """The ranks an adapter has come to, for a fresh run with fixed ranks: `LoraConfig(rank_pattern=...)`.

    Args:
        model: Model with an adapter of dynalora.
        adapter: The adapter's name.

    Returns:
        Rank by module, under keys that PEFT reads as that module and no other.

    Raises:
        DynaloraError: The model has no such adapter.
    """
    layers = adapter_layers(model, adapter).values()
    if not layers:
        raise DynaloraError(f"the model has no dynalora adapter named {adapter!r}.")
    return {f"^{re.escape(layer.name)}": layer.rank(adapter) for layer in layers}


def export_ranks(source: str, path: str) -> dict[str, Any]:
    """Write the ranks of a saved adapter as a JSON file, for a fresh run: `LoraConfig(**json.load(file))`.

    Args:
        source: Folder of the saved adapter.
        path: File to write.

    Returns:
        What was written: `r`, the commonest rank, `rank_pattern` and `target_modules`.

    Raises:
        CheckpointError: The folder holds no whole adapter of dynalora.
        DynaloraError: The file exists.
    """
    model = load_without_base(source)
    pattern = rank_pattern(model)
    if os.path.lexists(path):
        raise DynaloraError(f"{path} already exists; choose another file for the ranks.")
    settled = {
        "r": Counter(pattern.values()).most_common(1)[0][0],
        "rank_pattern": pattern,
        "target_modules": [layer.name for layer in adapter_layers(model).values()],
    }
    write_file(path, json.dumps(settled, indent=2) + "\n", replace=False)
    return settled


def load_without_base(source: str) -> nn.Module:
    """Load a saved adapter onto stand-ins for the layers it adapts, for whatever needs its factors only.

    Args:
        source: Folder of the saved adapter.

    Returns:
        A PEFT model whose base layers have the right names and sizes, with zero weights that take no memory.

    Raises:
        CheckpointError: The folder holds no whole adapter of dynalora.
    """
    made_by = check_known(source)
    method = METHODS.get(made_by)
    if method is None:
        raise CheckpointError(
            f"the adapter in {source} was made by {made_by.upper()}, which is none of dynalora's methods "
            f"({', '.join(sorted(METHODS))})."
        )
    config: Any = method.config_class.from_pretrained(source)
    weights = os.path.join(source, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(weights):
        raise CheckpointError(
            f"{source} holds a configuration but no {SAFETENSORS_WEIGHTS_NAME}; save the adapter again."
        )
    state = load_file(weights)
    skeleton = nn.Module()
    named = re.compile(rf"{re.escape(PREFIX)}(.+)\.{method.name}_down$")
    for key, down in state.items():
        if match := named.match(key):
            up = state[key.removesuffix("_down") + "_up"]
            _put(skeleton, match[1], _stand_in(config, match[1], up, down))
    config.target_modules = {match[1] for key in state if (match := named.match(key))}
    # Everything that chose modules has done so; what is there is what was adapted.
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        setattr(config, field, None)
    config.inference_mode = True
    # Not get_peft_model: a task's own wrapper would ask the stand-ins for methods of a real model.
    # On the meta device, since a start computed from stand-ins would be nonsense.
    model = PeftModel(skeleton, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    # What else the file holds (a trained head, biases) has no place on stand-ins.
    ours = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2].startswith(f"{method.name}_")}
    set_peft_model_state_dict(model, ours, low_cpu_mem_usage=True)
    return model


def _stand_in(config: Any, name: str, up: torch.Tensor, down: torch.Tensor) -> nn.Module:
    if described := config.layer_kinds.get(name):
        try:
            return stand_in(described, down.dtype)
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"the saved adapter says in layer_kinds that {name!r} is {error}, which cannot be; use another copy of "
                "it."
            ) from None
    layer = nn.Linear(down.shape[1], up.shape[0], bias=False, device="meta")
    weight = torch.zeros(1, dtype=down.dtype).expand(up.shape[0], down.shape[1])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)


def _modules_to_save(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    ours = tuple(f".{name}_" for name in METHODS)
    return {
        (key if key.startswith(PREFIX) else PREFIX + key): tensor
        for key, tensor in state.items()
        if not any(mark in key for mark in ours)
    }


def _lora_config(config: Any, targets: Mapping[str, Target], *, conv1d: bool, rslora: bool) -> LoraConfig:
    """PEFT's configuration with the same scaling s for every matrix: α_i = s·r_i, or s·√r_i with rsLoRA.

    `r` is the largest rank and `lora_alpha` the one that goes with it and the commonest scaling: servers that read
    no patterns make room for `r` and scale by the two.
    """
    ranks = {name: target.rank for name, target in targets.items()}
    alphas = {name: t.scaling * (t.rank**0.5 if rslora else t.rank) for name, t in targets.items()}
    alphas = {name: _integral(alpha) for name, alpha in alphas.items()}
    parameters = sorted(name for name, target in targets.items() if target.parameter)
    r = max(ranks.values())
    common = Counter(target.scaling for target in targets.values()).most_common(1)[0][0]
    alpha = _integral(common * (r**0.5 if rslora else r))
    # PEFT reads pattern keys as regular expressions that must match the end of a module's name.
    lora = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        use_rslora=rslora,
        target_modules=sorted(targets.keys() - set(parameters)),
        target_parameters=parameters or None,
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=conv1d,
        lora_dropout=0.0 if parameters else config.dropout,  # which PEFT refuses for parameters
        task_type=config.task_type,
        inference_mode=True,
    )
    lora.base_model_name_or_path = config.base_model_name_or_path
    lora.revision = config.revision
    return lora


def _integral(alpha: float) -> float:
    """Servers expect whole numbers: s·r is one wherever the user's alpha was, up to the last bit."""
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) <= 1e-9 * max(1.0, abs(alpha)) else alpha


def _verify(folder: Path, layers: dict[str, AdapterLayer], adapter_name: str) -> float:
    """Largest relative difference between the adapter's update and the written one, on a random input.

    Raises:
        DynaloraError: A written factor does not fit the written configuration.
    """
    config = LoraConfig.from_pretrained(str(folder))
    state = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    plain = {key.removeprefix(PREFIX): tensor.double() for key, tensor in state.items()}

    def rank_of(target: str) -> int:
        return int(config.rank_pattern.get(f"^{re.escape(target)}", config.r))

    names = [*(config.target_modules or ()), *(config.target_parameters or ())]
    written = factors_in(plain, layers, {name: rank_of(name) for name in names})
    for name, layer in layers.items():
        target, up, down = written[name]
        rank, alpha = rank_of(target), config.alpha_pattern.get(f"^{re.escape(target)}", config.lora_alpha)
        if rank != down.shape[0]:
            raise DynaloraError(
                f"the export of {target} went wrong: rank {rank} in the configuration, {down.shape[0]} in the file."
            )
        scaling = alpha / (rank**0.5 if config.use_rslora else rank)
        x = torch.randn(4, layer.in_features, generator=generator, dtype=torch.float64)
        exact_up, exact_down = (t.detach().cpu().double() for t in layer.factors(adapter_name))
        expected = layer.scaling[adapter_name] * (x @ exact_down.t() @ exact_up.t())
        result = scaling * (x @ down.t() @ up.t())
        size = float(expected.abs().max())
        if size:
            worst = max(worst, float((expected - result).abs().max()) / size)
        elif result.any():
            worst = float("inf")
    return worst
