"""Where an exported LoRA can be served: the rules of vLLM, SGLang and llama.cpp, checked on the written files.

They read less of `adapter_config.json` than PEFT does, and where they do not refuse an adapter they may compute
something else from it:

* vLLM (`vllm.lora.peft_helper.PEFTHelper`) takes `r`, `lora_alpha`, `use_rslora` and not the patterns, so one
  scaling must hold for all matrices and `r` must be the largest rank, which `--max-lora-rank` must allow for. It
  refuses trained biases (unless enabled), `modules_to_save`, DoRA and other tensors than `lora_A` and `lora_B`, but for
  an embedding's. Experts of fused parameters it takes in PEFT's form, as far as it knows the model's, and it takes
  those of one parameter for those of the down projection.
* SGLang (`sglang.srt.lora`) takes `r` and `lora_alpha`, copies every factor into room of exactly `r` rows, and scales
  all by `lora_alpha / r`; it does not read `use_rslora`. Target modules must be a list of names.
* llama.cpp (`convert_lora_to_gguf.py`) keeps `lora_alpha` only, and divides it by each tensor's own rank, so all
  matrices must have one rank, and rsLoRA is not known. It refuses other tensors than `lora_A` and `lora_B`, and
  transposes the matrices of GPT-2's `Conv1D` as if they were its weights.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from dynalora.adapter.patterns import of_module
from dynalora.common.names import PREFIX

#: Values that vLLM's --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Serving:
    """Whether a server takes an adapter as it is.

    Attributes:
        server: `"vLLM"`, `"SGLang"` or `"llama.cpp"`.
        problems: What it refuses, or would compute wrongly; empty if nothing.
        needs: What it has to be told, such as a flag.
    """

    server: str
    problems: tuple[str, ...]
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line: the server, and what keeps it from serving the adapter or what it needs."""
        if self.problems:
            return f"{self.server}: no ({'; '.join(self.problems)})"
        return f"{self.server}: yes" + (f" ({'; '.join(self.needs)})" if self.needs else "")


def check_serving(folder: str | os.PathLike[str], max_lora_rank: int | None = None) -> tuple[Serving, ...]:
    """Check a plain LoRA's files against the servers' rules.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        max_lora_rank: What vLLM was started with; None says what it has to be.

    Returns:
        One entry for each of vLLM, SGLang and llama.cpp.
    """
    config: Any = LoraConfig.from_pretrained(str(folder))
    with safe_open(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    # Linear layers may be targets by their weight.
    weights = {name.removesuffix(".weight") for name in config.target_parameters or () if name.endswith(".weight")}
    parameters = [name for name in config.target_parameters or () if not name.endswith(".weight")]
    experts = Counter(name.rpartition(".")[0] for name in parameters)
    matrices = {name: _rank(config, name) for name in parameters}
    others, kernels, embeddings = [], [], []
    for name, shape in shapes.items():
        module, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        known = name.startswith(PREFIX) and part in ("A.weight", "B.weight", "embedding_A", "embedding_B")
        if not known:
            others.append(name)
        elif "A" in part and module.removesuffix(".base_layer") not in experts:
            matrices[module] = shape[0]
            kernels += [module] if len(shape) > 2 else []
            embeddings += [module] if part == "embedding_A" else []
    scalings = {m: _scaling(config, f"{m}.weight" if m in weights else m) for m in matrices}
    common = []
    if config.use_dora:
        common.append("it knows no DoRA; merge the adapter into the base model instead")
    if config.modules_to_save:
        common.append(f"it takes no modules_to_save ({', '.join(sorted(config.modules_to_save))})")
    if kernels:
        common.append(f"it takes no convolutions, and {kernels[0]!r} is one")
    rest = [] if config.use_dora or config.modules_to_save else others
    if rest:
        common.append(f"it takes no tensors besides lora_A and lora_B, and there is {rest[0]!r}")
    if config.bias != "none":
        common.append(f"it takes no trained biases (bias={config.bias!r})")
    vllm = list(common)
    if partial := next((owner for owner, count in experts.items() if count == 1), None):
        vllm.append(f"it takes experts with both of their parameters, and of {partial!r} one is adapted")
    if embeddings:
        common.append(f"it takes no LoRA of embeddings, and {embeddings[0]!r} is one")
    if experts:
        common.append(f"it takes no experts in fused parameters, as {next(iter(experts))!r}; merge the adapter instead")
    return (
        Serving("vLLM", *_for_vllm(config, matrices, scalings, vllm, max_lora_rank)),
        Serving("SGLang", *_for_sglang(config, matrices, scalings, common)),
        Serving("llama.cpp", *_for_llama_cpp(config, matrices, scalings, common)),
    )


def _for_vllm(
    config: Any, matrices: dict[str, int], scalings: dict[str, float], common: list[str], max_lora_rank: int | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    problems, needs = list(common), []
    common_scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    if any(not _close(s, common_scaling) for s in scalings.values()):
        problems.append("it scales all matrices alike, and these differ; export with a uniform rank")
    rank = max(matrices.values(), default=0)
    if rank > config.r:
        problems.append(f"it takes r={config.r} for the largest rank, which is {rank}")
    flag = next((size for size in VLLM_RANKS if size >= max(rank, config.r)), None)
    if flag is None:
        problems.append(f"rank {rank} is above its largest, {VLLM_RANKS[-1]}; export with max_rank")
    elif max_lora_rank is not None and max(rank, config.r) > max_lora_rank:
        problems.append(f"rank {max(rank, config.r)} is above max_lora_rank={max_lora_rank}")
    elif max_lora_rank is None:
        needs.append(f"--max-lora-rank {flag}")
    return tuple(problems), tuple(needs)


def _for_sglang(
    config: Any, matrices: dict[str, int], scalings: dict[str, float], common: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    problems = list(common)
    if any(not _close(s, config.lora_alpha / config.r) for s in scalings.values()):
        reason = "has no rsLoRA" if config.use_rslora else "scales all matrices by lora_alpha / r"
        problems.append(f"it {reason}, which would scale wrongly; export with a uniform rank")
    if odd := next((rank for rank in matrices.values() if rank != config.r), None):
        problems.append(f"it takes rank r={config.r} for all matrices, and one has {odd}; export with a uniform rank")
    if isinstance(config.target_modules, str):
        problems.append(f"it takes a list of target modules, and {config.target_modules!r} is a pattern")
    return tuple(problems), ("--enable-lora --lora-paths NAME=FOLDER",)


def _for_llama_cpp(
    config: Any, matrices: dict[str, int], scalings: dict[str, float], common: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    problems = list(common)
    if any(not _close(s, config.lora_alpha / matrices[m]) for m, s in scalings.items()):
        reason = "has no rsLoRA" if config.use_rslora else "divides one alpha by each matrix's rank"
        problems.append(f"it {reason}, which would scale wrongly; export with a uniform rank")
    if config.fan_in_fan_out:
        problems.append("it transposes the matrices of GPT-2's Conv1D; merge the adapter instead")
    needs = () if config.base_model_name_or_path else ("convert_lora_to_gguf.py --base FOLDER",)
    return tuple(problems), needs


def _rank(config: Any, module: str) -> int:
    """The rank of a matrix as PEFT reads the configuration."""
    return int(of_module(config.rank_pattern, module, config.r))


def _scaling(config: Any, module: str) -> float:
    """The scaling of a matrix as PEFT reads the configuration."""
    rank = _rank(config, module)
    alpha = of_module(config.alpha_pattern, module, config.lora_alpha)
    return float(alpha / (rank**0.5 if config.use_rslora else rank))


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
