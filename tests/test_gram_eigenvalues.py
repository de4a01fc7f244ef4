"""Squared singular values against LAPACK: every edge of the tiles, and spectra of every kind."""

from __future__ import annotations

import math
import os
from pathlib import Path

import fresh_process
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectrum_cases import WEIGHTS, same
from test_isa import ALL, supported

import opentrans_kernels as otk
from opentrans_kernels import dispatch
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.ops import gram_eigenvalues
from opentrans_kernels.ops.gram_eigenvalues import OP, reference

ROOT = Path(__file__).resolve().parents[1]
EPS = float(np.finfo(np.float64).eps)
SIZES = (1, 2, 3, 31, 32, 33, 63, 64, 65, 96, 97, 130, 200)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def exact(a: np.ndarray) -> np.ndarray:
    """Squared singular values of a [m, n], ascending, with zeros for the missing ones."""
    found = np.zeros(a.shape[0])
    squares = np.linalg.svd(a, compute_uv=False) ** 2
    found[: len(squares)] = squares
    return np.sort(found)


def check(a: np.ndarray, scale: float = 1.0) -> tuple[np.ndarray, int]:
    """Solve one matrix; the error is within a few n eps of the largest eigenvalue."""
    values, redone = gram_eigenvalues(torch.from_numpy(a)[None], scale)
    found, expected = values[0].numpy(), scale * exact(a)
    assert found.shape == expected.shape and (found >= 0).all() and (np.diff(found) >= 0).all()
    limit = (20 + 4 * a.shape[0]) * EPS * expected[-1]  # of LAPACK's rounding as well
    assert np.abs(found - expected).max() <= limit, (a.shape, np.abs(found - expected).max())
    return found, int(redone)


def with_spectrum(x: np.ndarray, columns: int | None = None, seed: int = 0) -> np.ndarray:
    """A matrix whose squared singular values are x."""
    n = len(x)
    left = np.linalg.qr(normal(n, n, seed=seed))[0]
    right = np.linalg.qr(normal(columns or n, n, seed=seed + 1))[0].T
    return (left * np.sqrt(x)) @ right


@pytest.mark.parametrize("size", SIZES)
def test_every_edge_of_the_tiles(size: int) -> None:
    for columns in (size, size + 1, 2 * size + 3, 5):
        check(normal(size, columns, seed=columns))


@pytest.mark.parametrize("size", [40, 65, 129])
def test_spectra_of_every_kind(size: int) -> None:
    spectra = {
        "graded": np.logspace(-12, 8, size),
        "one cluster": np.full(size, 3.0),
        "two clusters": np.where(np.arange(size) < size // 2, 1.0, 2.0),
        "tight cluster": 1 + 1e-15 * np.arange(size),
        "rank-deficient": np.where(np.arange(size) < size - 7, 0.0, 1.0 + np.arange(size)),
        "one spike": np.where(np.arange(size) < size - 1, 1.0, 1e9),
    }
    for name, x in spectra.items():
        found, _ = check(with_spectrum(x))
        assert np.abs(found - x).max() <= 4 * size * EPS * x.max(), name


def test_structured_matrices() -> None:
    n = 70
    # Reducible from the start: no reflector has anything to do, and all off-diagonals are zero.
    found, _ = check(np.diag(np.arange(1.0, n + 1)))
    np.testing.assert_allclose(found, np.arange(1.0, n + 1) ** 2, rtol=1e-15)
    assert not check(np.zeros((n, n)))[0].any()
    found, _ = check(np.ones((n, n)))
    np.testing.assert_allclose(found[-1], n * n, rtol=1e-14)
    blocks = np.zeros((n, n))
    blocks[:32, :32], blocks[50:, 50:] = normal(32, 32), normal(20, 20)
    check(blocks)
    # The second difference: eigenvalues in closed form.
    step = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    closed = (2 * np.sin(np.arange(1, n + 1) * np.pi / (2 * (n + 1)))) ** 4
    np.testing.assert_allclose(check(step)[0], closed, rtol=1e-7)


@pytest.mark.parametrize("exponent", [-140, -60, -32, -28, -26, -12, 12, 26, 28, 32, 60, 140])
def test_norms_far_from_one(exponent: int) -> None:
    scale = 10.0**exponent
    a = normal(45, 50)
    plain = gram_eigenvalues(torch.from_numpy(a)[None], threshold=0)[0].numpy()
    found = gram_eigenvalues(torch.from_numpy(a * scale)[None], threshold=0)[0].numpy()
    np.testing.assert_allclose(found, plain * scale * scale, rtol=1e-12)


def test_empty_batches_and_sides() -> None:
    for shape in ((0, 4, 5), (3, 0, 5), (3, 4, 0)):
        values, redone = gram_eigenvalues(torch.ones(shape))
        assert values.shape == shape[:2] and values.dtype == torch.float64
        assert not values.any() and redone.tolist() == [0] * shape[0]


@pytest.mark.parametrize("size", [50, 130])
@pytest.mark.parametrize("largest", [1e4, 1e6])
def test_small_eigenvalues_keep_their_digits(size: int, largest: float) -> None:
    """LAPACK on the Gram matrix errs by eps * largest, which the projection wins back."""
    small = np.logspace(-5.5, -2.5, 12)
    x = np.concatenate([small, np.linspace(0.5, 2, size - 13), [largest]])
    a = with_spectrum(x, size + 9)
    values, redone = gram_eigenvalues(torch.from_numpy(a)[None])
    counts = x > 1e-5
    expected = exact(a)
    error = (np.abs(values[0].numpy() - expected) / expected)[counts].max()
    plain = np.linalg.eigvalsh(a @ a.T)
    lost = (np.abs(plain - expected) / expected)[counts].max()
    assert int(redone) > 0 and error < 1e-9 and error < lost / 3, (int(redone), error, lost)
    # What counts decides: with a higher threshold there is nothing to win back.
    assert int(gram_eigenvalues(torch.from_numpy(a)[None], threshold=0.5)[1]) == 0


def test_what_a_projection_cannot_win_back_is_said() -> None:
    x = np.logspace(np.log10(2e-5), 9, 60)
    values, redone = gram_eigenvalues(torch.from_numpy(with_spectrum(x))[None])
    assert int(redone) == -1 and abs(values[0, -1] - 1e9) < 1e-4


def test_equal_small_eigenvalues_are_all_found() -> None:
    x = np.concatenate([np.full(9, 2e-5), np.full(3, 3e-5), np.linspace(1, 2, 50), [1e5]])
    values, redone = gram_eigenvalues(torch.from_numpy(with_spectrum(x))[None])
    assert int(redone) == 12
    np.testing.assert_allclose(values[0, :12], x[:12], rtol=1e-8)


def test_values_that_are_not_finite_stay_in_their_matrix() -> None:
    batch = torch.randn(4, 40, 41)
    good = gram_eigenvalues(batch)[0]
    batch[1, 3, 4], batch[2, 39, 0] = float("nan"), float("inf")
    found = gram_eigenvalues(batch)[0]
    assert found[1].isnan().all() and found[2].isnan().all()
    assert torch.equal(found[[0, 3]], good[[0, 3]])
    assert (
        not gram_eigenvalues(torch.full((1, 3, 3), 1e200, dtype=torch.float64))[0].isfinite().any()
    )


def test_strides_dtypes_batches_and_threads_change_no_bit() -> None:
    batch = torch.randn(5, 70, 33).transpose(1, 2)
    whole, redone = gram_eigenvalues(batch)
    copies = {
        "dense": batch.contiguous(),
        "every second": torch.zeros(5, 33, 140)[:, :, ::2].copy_(batch),
        "batch last": batch.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "double": batch.double(),
    }
    for name, copy in copies.items():
        assert torch.equal(gram_eigenvalues(copy)[0], whole), name
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again = gram_eigenvalues(batch)
        assert torch.equal(again[0], whole) and torch.equal(again[1], redone)
    for i in range(5):
        assert torch.equal(gram_eigenvalues(batch[i : i + 1])[0][0], whole[i])
    same_matrix = batch[:1].expand(3, -1, -1)
    assert torch.equal(gram_eigenvalues(same_matrix)[0], whole[:1].expand(3, -1))


@given(
    rows=st.integers(1, 90), columns=st.integers(1, 90), seed=st.integers(0, 9),
    tail=st.floats(0, 3),
)  # fmt: skip
def test_invariants(rows: int, columns: int, seed: int, tail: float) -> None:
    a = normal(rows, columns, seed=seed) * np.exp(tail * normal(rows, 1, seed=seed + 1))
    x = gram_eigenvalues(torch.from_numpy(a)[None])[0][0].numpy()
    tolerance = 100 * EPS * x[-1] * max(rows, columns)
    np.testing.assert_allclose(x.sum(), np.square(a).sum(), rtol=1e-12)
    other = gram_eigenvalues(torch.from_numpy(a.T.copy())[None])[0][0].numpy()
    shared = min(rows, columns)
    np.testing.assert_allclose(x[rows - shared :], other[columns - shared :], atol=tolerance)
    flipped = gram_eigenvalues(torch.from_numpy(a[::-1].copy())[None])[0][0].numpy()
    np.testing.assert_allclose(x, flipped, atol=tolerance)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("capability", ALL)
def test_every_instruction_set(capability: str) -> None:
    if not supported()[capability]:
        pytest.skip(f"this CPU has no {capability}")
    code = (
        "import torch, test_gram_eigenvalues as t\n"
        "from opentrans_kernels import native\n"
        "torch.set_num_threads(1)\n"
        "for size in (2, 33, 97, 130): t.test_every_edge_of_the_tiles(size)\n"
        "t.test_spectra_of_every_kind(65)\n"
        "t.test_structured_matrices()\n"
        "t.test_small_eigenvalues_keep_their_digits(130, 1e6)\n"
        "t.test_strides_dtypes_batches_and_threads_change_no_bit()\n"
        "print(native.cpu_capability())\n"
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith("OPENTRANS_")}
    environ["OPENTRANS_CPU_CAPABILITY"] = capability
    environ["PYTHONPATH"] = str(ROOT / "tests")
    done = fresh_process.run(code, environment=environ)
    assert done.returncode == 0 and done.stdout.strip() == capability, done.stderr[-2000:]


@pytest.mark.usefixtures("poison")
def test_every_output_is_written_and_no_input_changed() -> None:
    batch = torch.randn(3, 40, 50)
    before = batch.clone()
    values, redone = OP(batch)
    assert not values.isnan().any() and redone.tolist() == [0, 0, 0]
    assert torch.equal(batch, before)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(OpenTransError, match=r"\[k, m, n\], got torch.float32 \(3, 4\). Pass matr"):
        gram_eigenvalues(torch.ones(3, 4))
    with pytest.raises(OpenTransError, match="convert other dtypes with .float()"):
        gram_eigenvalues(torch.ones(1, 3, 4, dtype=torch.bfloat16))


@pytest.mark.usefixtures("extension")
def test_the_compiled_kernel_checks_what_it_is_given() -> None:
    for bad in (torch.ones(3, 4), torch.ones(1, 3, 4).half(), torch.ones(1, 3, 4).long()):
        with pytest.raises(RuntimeError, match="3-d float32 or float64"):
            OP(bad)
    with pytest.raises(RuntimeError, match="at least 0, got -1"):
        OP(torch.ones(1, 3, 4), -1.0)


def test_opcheck_and_compile() -> None:
    batch = torch.randn(2, 34, 40)
    torch.library.opcheck(OP, (batch, 0.5))
    compiled = torch.compile(OP, fullgraph=True, backend="eager")
    assert torch.equal(compiled(batch)[0], OP(batch)[0])


def test_the_reference_agrees_and_flags_the_same(set_env) -> None:
    assert {r.backend for r in dispatch.TABLE if r.op == "gram_eigenvalues"} == {"cpu", "reference"}
    easy = torch.from_numpy(np.stack([normal(30, 35), np.zeros((30, 35)), normal(30, 35, seed=2)]))
    easy[2, 0, 0] = float("nan")
    hard = torch.from_numpy(with_spectrum(np.logspace(-4.9, 7, 40)))[None]
    compiled = [gram_eigenvalues(easy, 0.5), gram_eigenvalues(hard)]
    set_env(OPENTRANS_BACKEND="reference")
    plain = [gram_eigenvalues(easy, 0.5), gram_eigenvalues(hard)]
    assert plain[0][1].tolist() == compiled[0][1].tolist() == [0, 0, 0]
    assert plain[1][1].tolist() == [-1] and compiled[1][1].item() != 0
    torch.testing.assert_close(plain[0][0], compiled[0][0], rtol=1e-11, atol=0, equal_nan=True)
    assert reference.gram_eigenvalues(torch.ones(2, 0, 3))[0].shape == (2, 0)


@pytest.mark.parametrize("fit", ["xmin_peak", "ks", "xmin_mid"])
def test_lapack_serves_where_the_kernel_does_not(fit: str, set_env) -> None:
    here = otk.estimate_alpha(WEIGHTS, fit)
    set_env(OPENTRANS_BACKEND="reference")
    there = otk.estimate_alpha(WEIGHTS, fit)
    assert any("eigvalsh" in row.solver for row in there)
    for row in there:
        if row.name != "orthogonal half":  # exact ties: set by rounding
            assert same(here[row.name].alpha, row.alpha), row.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 3, 4, 37, 1152])
def test_rows_have_one_eigenvalue_each(dtype: torch.dtype, columns: int) -> None:
    a = torch.randn(columns, 5, 1, dtype=dtype).permute(1, 2, 0)  # strided, as depthwise weights
    values, redone = gram_eigenvalues(a, 0.5)
    torch.testing.assert_close(values, 0.5 * a.double().square().sum(2), rtol=1e-14, atol=0)
    assert not redone.any()
    a[2, 0, 0], a[3] = math.inf, 0
    values, _ = gram_eigenvalues(a, 0.5)
    assert math.isnan(values[2, 0]) and values[3, 0] == 0
