"""The landscape of two full models, streamed from their files, against full decompositions in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynalora.errors import CheckpointError, ConfigError
from dynalora.forgetting.full_models import model_landscape
from dynalora.spectral import spectrum
from dynalora.spectral.spectrum import matrix_spectrum
from tests.unit import tiny


def reader(matrix: torch.Tensor, widest: list[int]) -> Any:
    def read(rows: slice, columns: slice) -> torch.Tensor:
        part = matrix[rows, columns]
        widest.append(part.numel())
        return part

    return read


@pytest.mark.parametrize("shape", [(90, 30), (30, 90), (40, 40)])
@pytest.mark.parametrize("direct", [True, False])
def test_spectra_of_large_matrices_within_the_stated_error(
    shape: tuple[int, int], direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(spectrum, "_DIRECT", 0)
        monkeypatch.setattr(spectrum, "_BLOCK", 7 * min(shape))
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q for n in shape)
    n = min(shape)
    sigma = torch.logspace(1, -5, n, dtype=torch.float64)
    sigma[-3:] = 0
    matrix = left[:, :n] * sigma @ right[:, :n].T
    widest: list[int] = []
    found = matrix_spectrum(shape, reader(matrix, widest))
    exact = torch.linalg.svdvals(matrix)
    eps = torch.finfo(torch.float64).eps
    bound = n * eps * float(exact[0]) ** 2 / exact.clamp(min=(n * eps) ** 0.5 * float(exact[0]))
    assert bool(((found - exact).abs() <= bound + n * eps * exact[0]).all())
    assert found.dtype == torch.float64
    assert max(widest) <= (matrix.numel() if direct else 7 * n), "a block is all that may be in memory"
    if not direct:
        assert found[-3:].tolist() == [0, 0, 0]


def two_models(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A model, and one whose matrices differ from it by what a fine-tuning might do; the second in shards."""
    base = tiny.model(64, layers=11).to(dtype)
    base.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 2:
                out, width = parameter.shape
                up, down = (torch.randn(out, 3, generator=generator), torch.randn(3, width, generator=generator))
                parameter.add_((0.01 * up @ down).to(dtype))
    base.save_pretrained(folder / "tuned", max_shard_size="100KB")
    assert len(list((folder / "tuned").glob("*.safetensors"))) > 1
    return folder / "tuned", folder / "base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streamed", [False, True])
def test_statistics_of_the_difference(
    dtype: torch.dtype, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streamed:
        monkeypatch.setattr(spectrum, "_DIRECT", 0)
        monkeypatch.setattr(spectrum, "_BLOCK", 5 * 32)
    tuned, base = two_models(tmp_path, dtype)
    told: list[tuple[int, int | None]] = []
    rows = model_landscape(tuned, base, tau=0.02, progress=lambda what, done, total: told.append((done, total)))
    one: dict[str, torch.Tensor] = {}
    for file in tuned.glob("*.safetensors"):
        one |= load_file(file)
    other = load_file(base / "model.safetensors")
    assert {row.module + ".weight" for row in rows} == {name for name, value in other.items() if value.ndim == 2}
    assert told[-1] == (len(rows), len(rows))
    queries = [row for row in rows if row.kind == "q_proj"]
    assert [row.layer for row in queries] == list(range(11)), "ten comes after nine"
    for row in rows:
        difference = one[row.module + ".weight"].double() - other[row.module + ".weight"].double()
        sigma = torch.linalg.svdvals(difference)
        assert row.rank == min(difference.shape)
        assert row.effective_rank == int((sigma > 0.02).sum())
        assert row.nuclear_norm == pytest.approx(float(sigma.sum()), rel=1e-4)
        above = float(sigma[sigma > 0.02].square().sum() / sigma.square().sum())
        assert row.energy == pytest.approx(above, rel=1e-9)


def test_only_the_modules_asked_for(tmp_path: Path) -> None:
    tuned, base = two_models(tmp_path)
    rows = model_landscape(tuned, base, modules=r"layers\.1\..*(q|v)_proj")
    assert [row.module for row in rows] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        model_landscape(tuned, base, modules="(q")
    with pytest.raises(CheckpointError, match=r"no matrix of one name and shape that contains 'nothing'"):
        model_landscape(tuned, base, modules="nothing")


def test_matrices_of_another_shape_are_left_out_aloud(tmp_path: Path) -> None:
    tuned, base = two_models(tmp_path)
    state = load_file(base / "model.safetensors")
    state["lm_head.weight"] = torch.zeros(70, 32)
    save_file(state, base / "model.safetensors")
    with pytest.warns(UserWarning, match=r"1 matrices differ in shape .*lm_head"):
        rows = model_landscape(tuned, base)
    assert "lm_head" not in {row.module for row in rows}


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    tuned, base = two_models(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no full model"):
        model_landscape(tmp_path / "empty", base)
    shard = next(tuned.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=f"{shard.name}.*cannot be read"):
        model_landscape(tuned, base)
    (tuned / "model.safetensors.index.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match=r"index\.json' cannot be read"):
        model_landscape(tuned, base)
    with pytest.raises(ConfigError, match="tau must be at least 0"):
        model_landscape(tuned, base, tau=-1)
