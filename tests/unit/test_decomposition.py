from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynalora.common import progress
from dynalora.errors import ConfigError, DynaloraError
from dynalora.spectral import cache as decomposition_cache
from dynalora.spectral import decomposition, lanczos, triplets
from dynalora.spectral.decomposition import DecompositionError, Triplets, largest_triplets, smallest_triplets
from tests.decompositions import decompose

Which = Literal["smallest", "largest"]
TRIPLETS: dict[str, Callable[[Tensor, int], Triplets]] = {"smallest": smallest_triplets, "largest": largest_triplets}
both = pytest.mark.parametrize("which", list(TRIPLETS))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(decomposition_cache.SIZE_VARIABLE, raising=False)
    monkeypatch.setattr(decomposition_cache, "_warned", False)


@pytest.fixture
def iterate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices too take the way of large ones."""
    monkeypatch.setattr(triplets, "_DENSE_SIDE", 40)


@pytest.fixture
def no_fallback(iterate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that way gets them there."""

    def full(*_: object) -> None:
        raise AssertionError("fell back to the full decomposition")

    monkeypatch.setattr(triplets, "_full", full)


def matrix(
    out: int, width: int, spectrum: Tensor | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A Gaussian matrix, or one with given singular values."""
    generator = torch.Generator().manual_seed(seed)
    if spectrum is None:
        return torch.randn(out, width, generator=generator, dtype=torch.float64).to(dtype)
    rank = len(spectrum)
    left = torch.linalg.qr(torch.randn(out, rank, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64)).Q
    return ((left * spectrum.double()) @ right.T).to(dtype)


def part(k: int, which: str) -> slice:
    return slice(-k, None) if which == "smallest" else slice(0, k)


def check(weight: Tensor, k: int, which: str, *, subspace: bool = True) -> Triplets:
    """Everything that must hold, against the full decomposition in float64."""
    made = TRIPLETS[which](weight, k)
    out, width = weight.shape
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    eps = 1e-12 if wide == torch.float64 else 1e-6
    assert made.up.shape == (out, k)
    assert made.values.shape == (k,)
    assert made.down.shape == (k, width)
    assert {made.up.dtype, made.values.dtype, made.down.dtype} == {wide}
    assert made.up.is_contiguous()
    assert made.down.is_contiguous()

    exact = weight.detach().double()
    up, values, down = made.up.double(), made.values.double(), made.down.double()
    full_up, full_values, full_down = torch.linalg.svd(exact, full_matrices=False)
    norm = float(full_values[0])
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(up.T @ up, eye, atol=3 * eps, rtol=0)
    torch.testing.assert_close(down @ down.T, eye, atol=3 * eps, rtol=0)
    chosen = part(k, which)
    torch.testing.assert_close(values, full_values[chosen], atol=3 * eps * norm, rtol=0)
    assert bool((values >= 0).all())
    assert bool((values[:-1] >= values[1:]).all())
    assert float((exact @ down.T - up * values).norm(dim=0).max()) <= 3 * eps * norm
    assert float((exact.T @ up - down.T * values).norm(dim=0).max()) <= 3 * eps * norm
    if subspace:
        ours, theirs = down.T @ down, full_down[chosen].T @ full_down[chosen]
        assert float(torch.linalg.matrix_norm(ours - theirs, 2)) < 2e-4
        ours, theirs = up @ up.T, full_up[:, chosen] @ full_up[:, chosen].T
        assert float(torch.linalg.matrix_norm(ours - theirs, 2)) < 2e-4
    return made


def separated(count: int) -> Tensor:
    """Values with gaps everywhere, so that subspaces are well determined."""
    return torch.linspace(3.0, 0.5, count)


@given(
    out=st.integers(1, 70),
    width=st.integers(1, 70),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    which=st.sampled_from(["smallest", "largest"]),
)
def test_any_small_shape(out: int, width: int, data: st.DataObject, dtype: torch.dtype, which: str) -> None:
    k = data.draw(st.integers(1, min(out, width)))
    seed = data.draw(st.integers(0, 1000))
    check(matrix(out, width, separated(min(out, width)), seed, dtype), k, which)
    check(matrix(out, width, None, seed, dtype), k, which, subspace=False)


@given(
    out=st.integers(150, 320),
    width=st.integers(150, 320),
    k=st.integers(1, 9),
    seed=st.integers(0, 1000),
    which=st.sampled_from(["smallest", "largest"]),
)
def test_any_shape_of_the_iteration(iterate: None, out: int, width: int, k: int, seed: int, which: str) -> None:
    check(matrix(out, width, None, seed), k, which)


@both
@pytest.mark.parametrize(("out", "width"), [(450, 450), (420, 900), (900, 420)])
def test_as_large_ones_are_done(no_fallback: None, out: int, width: int, which: str) -> None:
    check(matrix(out, width), 16, which)


@both
@pytest.mark.parametrize("exponent", [2, 4, 7])
def test_decaying_spectra(no_fallback: None, exponent: int, which: str) -> None:
    weight = matrix(260, 240, torch.logspace(0, -exponent, 240))
    check(weight, 8, which, subspace=which == "largest" or exponent < 7)


@pytest.mark.parametrize("tiny", [1e-3, 1e-6, 0.0])
def test_a_few_tiny_values_below_all_others(no_fallback: None, tiny: float) -> None:
    spectrum = torch.cat([separated(236), torch.full((4,), tiny)])
    for out, width in ((240, 240), (300, 240), (240, 300)):
        weight = matrix(out, width, spectrum)
        check(weight, 4, "smallest", subspace=False)
        made = check(weight, 8, "smallest", subspace=False)
        full = torch.linalg.svd(weight.double(), full_matrices=False)
        # The four, and not some others; on the longer side the kernel is larger than that.
        own, theirs = (made.down, full.Vh) if out >= width else (made.up.T, full.U.T)
        own, theirs = own[-4:].double(), theirs[-4:]
        assert float(torch.linalg.matrix_norm(own.T @ own - theirs.T @ theirs, 2)) < 2e-4


@both
def test_repeated_values(no_fallback: None, which: str) -> None:
    check(torch.eye(240), 8, which, subspace=False)
    check(torch.eye(240, 300) * 0.01, 8, which, subspace=False)
    ends = torch.cat([torch.full((8,), 5.0), separated(220), torch.full((12,), 0.1)])
    check(matrix(250, 240, ends), 8, which, subspace=which == "largest")
    check(matrix(250, 240, torch.cat([torch.full((200,), 2.0), torch.full((40,), 1.0)])), 8, which, subspace=False)


@both
@pytest.mark.parametrize(("out", "width"), [(240, 240), (240, 300), (300, 240), (12, 30), (30, 12)])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_deficient_rank(out: int, width: int, rank: int, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triplets, "_DENSE_SIDE", 40)
    weight = matrix(out, width, separated(rank)) if rank else torch.zeros(out, width)
    for k in (1, 8):
        check(weight, k, which, subspace=False)


def test_rows_and_columns_of_zeros(no_fallback: None) -> None:
    weight = matrix(240, 260)
    weight[3] = 0
    weight[:, 7:17] = 0
    made = check(weight, 6, "smallest", subspace=False)
    assert float(made.values[-1]) < 1e-5
    assert float(made.up[3, -1].abs()) > 0.999  # the left vector that belongs to it


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(iterate: None, dtype: torch.dtype, which: str) -> None:
    check(matrix(450, 410, None, 0, dtype), 8, which)


@both
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scales(dtype: torch.dtype, scale: float, which: str) -> None:
    scale = scale if dtype == torch.float32 else scale**6
    weight = matrix(60, 50, separated(50), 0, torch.float64)
    made = TRIPLETS[which]((weight * scale).to(dtype), 4)
    expected = torch.linalg.svdvals(weight)[part(4, which)]
    torch.testing.assert_close(made.values.double() / scale, expected, rtol=1e-5, atol=0)


@both
def test_all_of_them(which: str) -> None:
    weight = matrix(30, 20)
    made = check(weight, 20, which)
    torch.testing.assert_close(made.up @ torch.diag(made.values) @ made.down, weight, atol=1e-5, rtol=0)


@both
def test_batches_and_views(which: str) -> None:
    batch = torch.stack([matrix(60, 50, seed=seed) for seed in range(3)])
    batch[1] = 0
    made = TRIPLETS[which](batch, 5)
    assert made.up.shape == (3, 60, 5)
    for item, up, values, down in zip(batch, made.up, made.values, made.down, strict=True):
        alone = TRIPLETS[which](item, 5)
        assert torch.equal(up, alone.up)
        assert torch.equal(values, alone.values)
        assert torch.equal(down, alone.down)
    view = torch.randn(100, 120)[::2, 10:].T.requires_grad_()
    made = check(view, 5, which, subspace=False)
    assert not made.up.requires_grad


def test_stacks_as_accelerators_take_them(iterate: None) -> None:
    """The stacked form is for accelerators, but must hold anywhere."""
    spectra = [None, separated(200), torch.logspace(0, -4, 200), torch.cat([separated(190), torch.zeros(10)])]
    batch = torch.stack([matrix(220, 200, spectrum) for spectrum in spectra])
    for which in ("smallest", "largest"):
        up, values, down = triplets.of_one(batch, 6, which, torch.float32)  # type: ignore[arg-type]
        for item, u, s, v in zip(batch, up, values, down, strict=True):
            norm = float(torch.linalg.matrix_norm(item, 2))
            expected = torch.linalg.svdvals(item.double())[part(6, which)].float()
            torch.testing.assert_close(s, expected, atol=3e-6 * norm, rtol=0)
            assert float((item @ v.T - u * s).norm(dim=0).max()) < 1e-5 * norm
            assert float((item.T @ u - v.T * s).norm(dim=0).max()) < 1e-5 * norm
            torch.testing.assert_close(u.T @ u, torch.eye(6), atol=1e-5, rtol=0)


@both
def test_the_same_each_time_and_no_global_randomness(iterate: None, which: str) -> None:
    weight = matrix(450, 420)
    state = torch.get_rng_state()
    first = TRIPLETS[which](weight, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    second = TRIPLETS[which](weight.clone(), 8)
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.down, second.down)


@both
def test_defaults_of_dtype_and_autocast_change_nothing(iterate: None, which: str) -> None:
    weight = matrix(450, 420)
    expected = TRIPLETS[which](weight, 8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = TRIPLETS[which](weight, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(made.up, expected.up)


# ------------------------------------------------------------------------------------------------- checks, fallback


def counted_full(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    full = triplets._full

    def counting(*args: object) -> object:
        calls.append(1)
        return full(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(triplets, "_full", counting)
    return calls


@both
@pytest.mark.parametrize("garbage", ["random", "neighbours", "not converged", "not a number"])
def test_garbage_of_the_fast_way_is_noticed(
    iterate: None, which: str, garbage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, k = matrix(450, 420), 8
    calls = counted_full(monkeypatch)
    check(weight, k, which)
    assert not calls
    full = torch.linalg.svd(weight.double(), full_matrices=False)

    def fake(edge: lanczos.Edge) -> lanczos.Edge:
        block = edge.vectors.shape[-1]
        vectors, converged = edge.vectors, edge.converged
        if garbage == "random":
            vectors = torch.linalg.qr(torch.randn(420, block, dtype=torch.float64)).Q
        elif garbage == "neighbours":  # exact singular vectors, with one of the wanted ones left out
            order = full.Vh.flip(0) if which == "smallest" else full.Vh
            vectors = order[[i for i in range(block + 1) if i != 3]].T
        elif garbage == "not converged":
            converged = torch.zeros_like(converged)
        else:
            vectors = torch.full_like(vectors, torch.nan)
        return lanczos.Edge(vectors, edge.ritz, converged, edge.factor)

    name = f"{which}_edge"
    genuine = getattr(triplets, name)
    monkeypatch.setattr(triplets, name, lambda *args: fake(genuine(*args)))
    check(weight, k, which)
    assert calls


def test_an_iteration_cut_short_falls_back(iterate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_full(monkeypatch)
    monkeypatch.setattr(lanczos, "_MAX_STEPS", 2)
    check(matrix(450, 420), 8, "smallest")
    assert calls


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, which: str) -> None:
    weight = torch.ones(5, 4)
    weight[2, 1] = value
    with pytest.raises(DecompositionError, match="not finite, so it has no singular values; load intact"):
        TRIPLETS[which](weight, 2)


@pytest.mark.parametrize(
    ("weight", "k", "message"),
    [
        (torch.ones(5, 4), 0, "k must be a whole number from 1 to 4 for a weight of 5 × 4, got 0"),
        (torch.ones(5, 4), 5, "got 5"),
        (torch.ones(5, 4), True, "got True"),
        (torch.ones(5), 1, r"floating-point matrix, got shape \(5,\)"),
        (torch.ones(5, 4, dtype=torch.int8), 1, "of torch.int8; dequantise"),
        (torch.ones(0, 4), 1, "got shape"),
        (torch.ones(5, 4, device="meta"), 1, "meta device"),
    ],
)
def test_what_cannot_be_decomposed(weight: Tensor, k: int, message: str) -> None:
    for function in TRIPLETS.values():
        with pytest.raises(DecompositionError, match=message) as raised:
            function(weight, k)
        assert isinstance(raised.value, DynaloraError)
        assert isinstance(raised.value, ValueError)


# ------------------------------------------------------------------------------------------------ many, and the cache


def folder() -> Path:
    return Path(os.environ["DYNALORA_CACHE"]) / "decompositions"


def same(one: Triplets, other: Triplets) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("up", "values", "down"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what was computed rather than read."""
    shapes: list[tuple[int, ...]] = []
    genuine = decomposition._triplets

    def recording(weight: Tensor, k: int, which: Which) -> Triplets:
        shapes.append(tuple(weight.shape))
        return genuine(weight, k, which)

    monkeypatch.setattr(decomposition, "_triplets", recording)
    return shapes


@both
def test_many(which: Which, computed: list[tuple[int, ...]]) -> None:
    weights = [matrix(20, 30), matrix(30, 20, seed=1).bfloat16(), matrix(20, 30, seed=2), matrix(9, 9).double()]
    ranks = [4, 3, 4, 9]
    made = decompose([lambda w=w: w for w in weights], ranks, which=which)  # type: ignore[misc]
    assert len(computed) == 4
    for weight, k, one in zip(weights, ranks, made, strict=True):
        assert same(one, TRIPLETS[which](weight, k))
    computed.clear()
    again = decompose([lambda w=w: w for w in weights], ranks, which=which)  # type: ignore[misc]
    assert not computed
    assert all(same(one, other) for one, other in zip(made, again, strict=True))


def test_weights_are_let_go() -> None:
    import weakref

    seen: list[weakref.ref[Tensor]] = []

    def make(seed: int) -> Tensor:
        assert sum(ref() is not None for ref in seen) <= 1
        weight = matrix(20, 30, seed=seed)
        seen.append(weakref.ref(weight))
        return weight

    decompose([lambda seed=seed: make(seed) for seed in range(4)], [2] * 4)  # type: ignore[misc]


def test_the_key_has_everything_that_matters(computed: list[tuple[int, ...]]) -> None:
    weight = matrix(20, 30)
    square = torch.ones(2, 8)
    cases: list[tuple[Tensor, int, Which]] = [
        (weight, 3, "smallest"),
        (weight, 4, "smallest"),
        (weight, 3, "largest"),
        (weight.double(), 3, "smallest"),
        (weight.reshape(30, 20), 3, "smallest"),
        (square, 1, "smallest"),
        (square.T.contiguous(), 1, "smallest"),
    ]
    for tensor, k, which in cases:
        decompose([lambda tensor=tensor: tensor], [k], which=which)  # type: ignore[misc]
    assert len(computed) == len(cases)
    decompose([lambda: weight.T.contiguous().T], [3])  # the same content, laid out otherwise
    assert len(computed) == len(cases)


def test_without_the_cache(computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(20, 30)
    decompose([lambda: weight], [2], cache=False)
    monkeypatch.setenv(decomposition_cache.SIZE_VARIABLE, "0")
    decompose([lambda: weight], [2])
    assert len(computed) == 2
    assert not folder().exists()


def swap(file: Path, change: Callable[[dict[str, Tensor]], None], *, sealed: bool) -> None:
    """Change what a file holds, with a digest that fits (as from a faulty writer) or without."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    digest = decomposition_cache._digest(file.stem, tensors) if sealed else "other"
    save_file(tensors, file, metadata={"digest": digest})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "text": lambda file: file.write_text("not this"),
    "one bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "no digest": lambda file: swap(file, lambda tensors: None, sealed=False),
    "other shape": lambda file: swap(
        file, lambda tensors: tensors.update(up=tensors["up"][:-1].contiguous()), sealed=True
    ),
    "other dtype": lambda file: swap(file, lambda tensors: tensors.update(up=tensors["up"].half()), sealed=True),
    "missing": lambda file: swap(file, lambda tensors: tensors.pop("up"), sealed=True),  # type: ignore[arg-type,return-value]
    "not orthonormal": lambda file: swap(file, lambda tensors: tensors["down"][0].mul_(1.1), sealed=True),  # type: ignore[arg-type,return-value]
    "not a number": lambda file: swap(file, lambda tensors: tensors["up"].fill_(torch.nan), sealed=True),  # type: ignore[arg-type,return-value]
    "wrong order": lambda file: swap(
        file, lambda tensors: tensors.update(values=tensors["values"].flip(0)), sealed=True
    ),
    "another weight's": lambda file: swap(file, lambda tensors: tensors["values"].mul_(2), sealed=True),  # type: ignore[arg-type,return-value]
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_files_are_made_anew(damage: str, computed: list[tuple[int, ...]]) -> None:
    weight = matrix(20, 30)
    (first,) = decompose([lambda: weight], [3])
    (file,) = folder().iterdir()
    intact = file.read_bytes()
    DAMAGE[damage](file)
    assert file.read_bytes() != intact
    (second,) = decompose([lambda: weight], [3])
    assert same(first, second)
    assert len(computed) == 2
    assert file.read_bytes() == intact


def test_the_least_recently_used_go_first(computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [matrix(50, 60, seed=seed) for seed in range(4)]
    makers = [lambda w=w: w for w in weights]  # type: ignore[misc]
    decompose(makers[:3], [4] * 3)
    files = list(folder().iterdir())
    size = files[0].stat().st_size
    for age, seed in ((300, 0), (200, 1), (100, 2)):
        key = decomposition._cache_key(weights[seed], 4, "smallest")
        when = (folder() / f"{key}.safetensors").stat().st_mtime - age
        os.utime(folder() / f"{key}.safetensors", (when, when))
    decompose(makers[:1], [4])  # used, so no longer the oldest
    monkeypatch.setenv(decomposition_cache.SIZE_VARIABLE, str(3.5 * size / 2**30))
    decompose(makers[3:], [4])
    assert len(list(folder().iterdir())) == 3
    computed.clear()
    decompose([makers[0], makers[2], makers[3]], [4] * 3)
    assert not computed
    decompose([makers[1]], [4])
    assert len(computed) == 1


def test_too_large_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(decomposition_cache.SIZE_VARIABLE, "1e-9")
    decompose([lambda: matrix(20, 30)], [3])
    assert not folder().exists()


@pytest.mark.parametrize("size", ["much", "-1", "nan", "inf"])
def test_a_size_that_is_no_number(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(decomposition_cache.SIZE_VARIABLE, size)
    with pytest.raises(ConfigError, match=f"must be a number of GiB of at least 0, got '{size}'"):
        decompose([lambda: matrix(20, 30)], [3])


def test_what_interrupted_writers_left_is_removed() -> None:
    folder().mkdir(parents=True)
    old, new = folder() / "a.safetensors.1.partial", folder() / "b.safetensors.2.partial"
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (0, 0))
    decompose([lambda: matrix(20, 30)], [3])
    assert not old.exists()
    assert new.exists()  # perhaps being written


def test_a_folder_that_cannot_be_written_is_said_once() -> None:
    folder().parent.mkdir(parents=True)
    folder().write_text("a file where the folder should be")
    weight = matrix(20, 30)
    with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*make the folder writable") as said:
        made = decompose([lambda: weight, lambda: weight], [3, 4])
    assert len(said) == 1
    assert same(made[0], smallest_triplets(weight, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decompose([lambda: weight], [3])


def test_many_at_once() -> None:
    weights = [matrix(40, 50, seed=seed) for seed in range(6)]
    expected = [smallest_triplets(weight, 3) for weight in weights]
    wrong: list[str] = []
    cap = 3 * (40 + 50 + 1) * 4 * 3  # so small that files vanish all the time
    store = decomposition_cache.DecompositionCache(folder(), cap)

    def work() -> None:
        try:
            for _ in range(8):
                for weight, right in zip(weights, expected, strict=True):
                    key = decomposition._cache_key(weight, 3, "smallest")
                    kept = decomposition._read(store, key, weight, 3)
                    if kept is not None and not same(kept, right):
                        wrong.append("other content")
                    store.write(key, {"up": right.up, "values": right.values, "down": right.down})
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert not [file for file in folder().iterdir() if file.suffix == ".partial"]


def test_ranks_and_weights_must_match() -> None:
    with pytest.raises(DecompositionError, match="got 1 weights and 2 ranks"):
        decompose([lambda: torch.ones(3, 3)], [1, 1])
    with pytest.raises(DecompositionError, match="which must be 'smallest' or 'largest', got 'middle'"):
        decompose([lambda: torch.ones(3, 3)], [1], which="middle")  # type: ignore[arg-type]
    assert decompose([], []) == []


def test_progress_of_long_jobs_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    makers = [lambda seed=seed: matrix(20, 30, seed=seed) for seed in range(3)]  # type: ignore[misc]
    decompose(makers, [2] * 3, cache=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress, "_PLAIN_EVERY", 0.0)
    decompose(makers, [2] * 3, cache=False, describe="Looking")
    said = capsys.readouterr()
    assert said.out == ""
    assert "Looking: 1 of 3" in said.err
    assert "Looking: 2 of 3" in said.err
