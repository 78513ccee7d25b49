"""Exports for servers: one rank, static snapshots of gates, the servers' rules, a world without dynalora."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import dynalora
from dynalora import DiraConfig, DiselConfig, DisloraConfig, PedyraConfig
from dynalora.adapter.layer import AdapterLayer
from dynalora.errors import ConfigError, DataError, UnsupportedError
from dynalora.export import check_serving, held_gates, snapshot_price
from tests.toys import TOYS

LLAMA = TOYS["llama"]
TARGETS = ["q_proj", "down_proj"]
UNEVEN = {"rank_pattern": {"layers.0.*.q_proj": 2, "layers.1.*.q_proj": 3}}


def adapted(config: type = DiraConfig, toy: Any = LLAMA, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 5, "alpha": 8, "target_modules": TARGETS, "init_weights": False}
    return peft.get_peft_model(toy.build(), config(**{**settings, **options})).eval()


def layers_of(model: Any) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


# The servers' own arithmetic, from their rules ---------------------------------------------------------------


def files(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def vllm_update(folder: Path, module: str) -> torch.Tensor:
    """vLLM reads r, lora_alpha and use_rslora, and nothing of the patterns."""
    config, state = files(folder)
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    a, b = (state[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    assert a.shape[0] == b.shape[1] <= config["r"]
    return scaling * b @ a


def sglang_update(folder: Path, module: str) -> torch.Tensor:
    """SGLang reads r and lora_alpha, and has room for exactly r rows."""
    config, state = files(folder)
    a, b = (state[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    if a.shape[0] != config["r"]:
        return torch.full((b.shape[0], a.shape[1]), torch.nan).double()  # it stops
    return config["lora_alpha"] / config["r"] * b @ a


def llama_cpp_update(folder: Path, module: str) -> torch.Tensor:
    """llama.cpp divides lora_alpha by the tensor's own rank."""
    config, state = files(folder)
    a, b = (state[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    return config["lora_alpha"] / b.shape[1] * b @ a


SERVERS = {"vLLM": vllm_update, "SGLang": sglang_update, "llama.cpp": llama_cpp_update}

CASES = {
    "one rank": {},
    "ranks of their own": UNEVEN,
    "rsLoRA": {"use_rslora": True},
    "rsLoRA, ranks of their own": {"use_rslora": True, **UNEVEN},
    "alphas of their own": {"alpha_pattern": {"q_proj": 3}},
    "ranks and alphas of their own": {"alpha_pattern": {"q_proj": 3}, **UNEVEN},
}


@pytest.mark.parametrize("uniform", [None, 0, 16])
@pytest.mark.parametrize("case", CASES)
def test_a_server_said_to_take_it_computes_the_adapter(case: str, uniform: int | None, tmp_path: Path) -> None:
    model = adapted(**CASES[case])
    report = dynalora.export_lora(model, tmp_path / "lora", uniform_rank=uniform)
    assert report.max_error < 1e-6
    assert [server.server for server in report.serving] == list(SERVERS)
    for server in report.serving:
        wrong = [
            layer.name
            for layer in layers_of(model)
            if not torch.allclose(
                SERVERS[server.server](tmp_path / "lora", layer.name),
                layer.get_delta_weight("default").double(),
                atol=1e-5,
            )
        ]
        assert bool(wrong) == bool(server.problems), (server, wrong)
    if uniform is not None:
        assert not any(server.problems for server in report.serving)
        config, state = files(tmp_path / "lora")
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        rank = uniform or 5
        assert {t.shape[0] for name, t in state.items() if "lora_A" in name} == {rank} == {config["r"]}
        assert set(report.ranks.values()) == {rank}
    plain = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "lora")
    torch.testing.assert_close(LLAMA.logits(plain), LLAMA.logits(model), atol=1e-5, rtol=1e-5)


def test_vllm_is_told_its_flag_and_held_to_it(tmp_path: Path) -> None:
    dynalora.export_lora(adapted(r=9), tmp_path / "lora")
    vllm, *_ = check_serving(tmp_path / "lora")
    assert str(vllm) == "vLLM: yes (--max-lora-rank 16)"
    vllm, *_ = check_serving(tmp_path / "lora", max_lora_rank=8)
    assert vllm.problems == ("rank 9 is above max_lora_rank=8",)
    vllm, *_ = check_serving(tmp_path / "lora", max_lora_rank=16)
    assert str(vllm) == "vLLM: yes"


def test_what_servers_refuse_is_named(tmp_path: Path) -> None:
    dynalora.export_lora(adapted(modules_to_save=["lm_head"]), tmp_path / "head")
    dynalora.export_lora(adapted(PedyraConfig, use_dora=True), tmp_path / "dora")
    gpt2 = adapted(toy=TOYS["gpt2"], target_modules=["c_attn"])
    dynalora.export_lora(gpt2, tmp_path / "gpt2")
    for folder, words in (("head", "modules_to_save (lm_head)"), ("dora", "knows no DoRA")):
        for server in check_serving(tmp_path / folder):
            assert any(words in problem for problem in server.problems), server
    assert "Conv1D" in check_serving(tmp_path / "gpt2")[2].problems[0]
    dynalora.export_lora(adapted(), tmp_path / "lora")
    config, state = files(tmp_path / "lora")
    save_file(
        {**state, "base_model.model.lm_head.weight": torch.zeros(2)}, tmp_path / "lora" / "adapter_model.safetensors"
    )
    for server in check_serving(tmp_path / "lora"):
        assert server.problems == (
            "it takes no tensors besides lora_A and lora_B, and there is 'base_model.model.lm_head.weight'",
        )
    save_file(state, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**config, "bias": "all", "r": 4}))
    vllm, _, llama_cpp = check_serving(tmp_path / "lora")
    assert any("bias='all'" in problem for problem in llama_cpp.problems)
    assert any("r=4 for the largest rank, which is 5" in problem for problem in vllm.problems)


@pytest.mark.parametrize("uniform", [3, -1])
def test_a_uniform_rank_cuts_nothing(uniform: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"uniform_rank={uniform}"):
        dynalora.export_lora(adapted(), tmp_path / "lora", uniform_rank=uniform)
    if uniform > 0:
        report = dynalora.export_lora(adapted(), tmp_path / "cut", uniform_rank=uniform, max_rank=uniform)
        assert set(report.ranks.values()) == {3}
        assert report.lost > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_of_a_narrow_type_is_reported(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(**UNEVEN)
    report = dynalora.export_lora(model, tmp_path / "lora", dtype=dtype, uniform_rank=0)
    assert {t.dtype for t in files(tmp_path / "lora")[1].values()} == {dtype}
    eps = torch.finfo(dtype).eps
    assert eps / 10 < report.max_error < 4 * eps


EVERYONE: dict[str, tuple[type, dict[str, Any]]] = {
    "dira": (DiraConfig, UNEVEN),
    "pedyra": (PedyraConfig, UNEVEN),
    "pedyra-dora": (PedyraConfig, {"use_dora": True}),
    "dislora": (DisloraConfig, {"tsd_count": 2, "r": 4}),
    "disel": (DiselConfig, {"gate_bias_init": 0.0}),
}


def test_exports_load_where_dynalora_cannot_be_imported(tmp_path: Path) -> None:
    for name, (config, options) in EVERYONE.items():
        model = adapted(config, **options)
        gates = dynalora.record_gates(model, [LLAMA.batch(1)]) if config is DiselConfig else None
        dynalora.export_lora(model, tmp_path / name, gates=gates)
        with held_gates(model, gates) if gates else torch.no_grad():
            save_file({"logits": LLAMA.logits(model)}, tmp_path / f"{name}.safetensors")
    script = """
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "dynalora":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Refuse())
        try:
            import dynalora
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("dynalora is importable")
        import torch
        from peft import LoraModel, PeftModel
        from safetensors.torch import load_file
        from tests.toys import TOYS

        toy, folder, *names = TOYS["llama"], *sys.argv[1:]
        assert len(names) == 5
        for name in names:
            loaded = PeftModel.from_pretrained(toy.build(), f"{folder}/{name}")
            assert isinstance(loaded.base_model, LoraModel)
            expected = load_file(f"{folder}/{name}.safetensors")["logits"]
            torch.testing.assert_close(toy.logits(loaded), expected, atol=2e-5, rtol=2e-5)
        assert "dynalora" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), *EVERYONE]
    subprocess.run(command, check=True, timeout=900)


# Snapshots of gates --------------------------------------------------------------------------------------------


def batches(seeds: range) -> list[dict[str, torch.Tensor]]:
    made = []
    for seed in seeds:
        ids = LLAMA.batch(seed)["input_ids"]
        labels = ids.clone()
        labels[:, :3] = -100
        labels[0, -2:] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def snapshot_by_hand(model: Any, record: Any) -> Any:
    """The base model with s·up·diag(ḡ)·down added to its weights."""
    base = LLAMA.build()
    means = {row.module: row.mean for row in record}
    for layer in layers_of(model):
        up, down = (layer.parameter(role, "default").detach().double() for role in ("up", "down"))
        delta = layer.scaling["default"] * up @ means[layer.name].diag() @ down
        weight = base.get_submodule(layer.name).weight
        weight.data = (weight.double() + delta).to(weight.dtype)
    return base.eval()


def test_a_snapshot_equals_mean_gates_by_hand(tmp_path: Path) -> None:
    model = adapted(DiselConfig, gate_bias_init=0.0)
    record = dynalora.record_gates(model, batches(range(2)))
    gated = LLAMA.logits(model)
    expected = LLAMA.logits(snapshot_by_hand(model, record))
    report = dynalora.export_lora(model, tmp_path / "lora", gates=record)
    assert report.max_error < 1e-6
    plain = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "lora")
    torch.testing.assert_close(LLAMA.logits(plain), expected, atol=1e-5, rtol=1e-5)
    assert (expected - gated).abs().max() > 1e-3
    assert torch.equal(LLAMA.logits(model), gated)  # the gates move again
    with held_gates(model, record):
        torch.testing.assert_close(LLAMA.logits(model), expected, atol=1e-5, rtol=1e-5)
        merged = [layer.get_delta_weight("default") for layer in layers_of(model)]
        assert len(merged) == 4
    with pytest.raises(UnsupportedError, match="record_gates"):
        dynalora.export_lora(model, tmp_path / "again")


def test_the_price_of_a_snapshot_equals_one_by_hand() -> None:
    model = adapted(DiselConfig, gate_bias_init=0.0)
    record, held_out = dynalora.record_gates(model, batches(range(2))), batches(range(4, 7))
    price = snapshot_price(model, record, held_out)
    frozen, base = snapshot_by_hand(model, record), LLAMA.build().eval()
    kl, losses, tokens = 0.0, [0.0, 0.0, 0.0], 0
    for batch in held_out:
        with torch.no_grad():
            logits = [m(input_ids=batch["input_ids"]).logits.double() for m in (base, model, frozen)]
        for row, labels in enumerate(batch["labels"]):
            for place in range(1, len(labels)):
                if labels[place] == -100:
                    continue
                p = [F.log_softmax(x[row, place - 1], -1) for x in logits]
                kl += float((p[1].exp() * (p[1] - p[2])).sum())
                losses = [total - float(q[labels[place]]) for total, q in zip(losses, p, strict=True)]
                tokens += 1
    assert price.tokens == tokens
    assert price.kl == pytest.approx(kl / tokens, rel=1e-3, abs=1e-6)
    assert price.kl > 1e-6
    found = (price.base_loss, price.gated_loss, price.snapshot_loss)
    assert found == pytest.approx([total / tokens for total in losses], rel=1e-4)


def test_what_has_no_snapshot_says_so(tmp_path: Path) -> None:
    model = adapted(DiselConfig)
    record = dynalora.record_gates(model, batches(range(1)))
    with pytest.raises(ConfigError, match=r"5 gates for .* has 3"):
        dynalora.export_lora(adapted(DiselConfig, r=3), tmp_path / "x", gates=record)
    with pytest.raises(ConfigError, match=r"no gates for .*down_proj"):
        dynalora.export_lora(model, tmp_path / "x", gates=record[:1])
    with pytest.raises(UnsupportedError, match="no gates to hold"):
        dynalora.export_lora(adapted(), tmp_path / "x", gates=record)
    silent = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches(range(1))]
    with pytest.raises(DataError, match="no token counts"):
        snapshot_price(model, record, silent)
    assert not (tmp_path / "x").exists()
