"""What may not change alpha, what is redone for precision, and what is called ambiguous."""

from __future__ import annotations

import math
import os

import alpha_reference as oracle
import numpy as np
import pytest
import torch
from spectrum_cases import WEIGHTS, heavy, same

import opentrans_kernels as otk
from opentrans_kernels.spectrum import (
    MODES,
    AlphaTable,
    FitOptions,
    Spectrum,
    rows_of,
    select,
)


@pytest.fixture(scope="module")
def tables() -> dict[str, AlphaTable]:
    return {fit: otk.estimate_alpha(WEIGHTS, fit, threads=1) for fit in MODES}


@pytest.mark.parametrize("fit", MODES)
def test_rows_columns_and_sides_may_be_permuted(fit: str) -> None:
    w = heavy(60, 44, seed=20)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    changed = {"a": w, "b": w[order], "c": w.T, "d": w.flip(1), "e": w.double()}
    rows = list(otk.estimate_alpha(changed, fit))
    for row in rows[1:]:
        assert row.alpha == pytest.approx(rows[0].alpha, rel=1e-9)
        assert row.xmin_index == rows[0].xmin_index


def test_alpha_does_not_change_with_the_scale() -> None:
    w = 30 * heavy(60, 44, seed=21)
    for fit in ("xmin_mid", "ks", "xmin_peak_fixed", "weightwatcher"):
        one, two = otk.estimate_alpha({"a": w.double(), "b": 3 * w.double()}, fit)
        assert one.num_evals == two.num_evals == 44
        assert two.alpha == pytest.approx(one.alpha, rel=1e-9)
        assert two.norm == pytest.approx(9 * one.norm)


def test_all_layers_at_once_are_each_layer_alone(tables) -> None:
    for name, weight in WEIGHTS.items():
        alone = otk.estimate_alpha({name: weight}, "xmin_peak", linear_aspect=None)
        for row in alone:
            assert row == tables["xmin_peak"][row.name] or math.isnan(row.alpha)


def test_the_number_of_threads_does_not_change_a_bit(tables) -> None:
    for threads in (2, 3):
        table = otk.estimate_alpha(WEIGHTS, "ks", threads=threads, keep_spectra=True)
        one = otk.estimate_alpha(WEIGHTS, "ks", threads=1, keep_spectra=True)
        for name in one.alphas():
            assert torch.equal(one.spectra[name], table.spectra[name]), name
            assert same(table[name].alpha, one[name].alpha, 0), name
    torch.set_num_threads(2)
    otk.estimate_alpha({"w": heavy(8, 9)}, threads=1)
    assert torch.get_num_threads() == 2, "the thread count was put back"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_widened_first(dtype: torch.dtype) -> None:
    w = heavy(32, 40, seed=22).to(dtype)
    found, exact = otk.estimate_alpha({"a": w, "b": w.double()}, "xmin_mid")
    assert found.alpha == exact.alpha


def test_weights_of_any_stride_are_read_in_place() -> None:
    w = heavy(40, 24, 3, 3, seed=23)
    strange = torch.zeros(80, 24, 3, 6)[::2, :, :, ::2]
    strange.copy_(w)
    variants = {"a": w, "b": strange, "c": w.to(memory_format=torch.channels_last)}
    before = strange.clone()
    rows = list(otk.estimate_alpha(variants, "xmin_peak"))
    assert rows[0].alpha == rows[1].alpha == rows[2].alpha
    assert torch.equal(strange, before)


def test_large_layers_in_panels_equal_one_product(monkeypatch, set_env) -> None:
    from opentrans_kernels.spectrum import gram, solvers

    set_env(OPENTRANS_BACKEND="reference")  # LAPACK's path; the compiled one has panels always

    w = heavy(48, 333, seed=24)
    whole = otk.estimate_alpha({"w": w}, "xmin_mid", keep_spectra=True)
    monkeypatch.setattr(gram, "PANEL_FROM", 1)
    monkeypatch.setattr(solvers, "_LARGE_BYTES", 1)
    parts = otk.estimate_alpha({"w": w, "v": w}, "xmin_mid", keep_spectra=True, threads=2)
    torch.testing.assert_close(parts.spectra["w"], whole.spectra["w"], rtol=1e-10, atol=0)
    assert torch.equal(parts.spectra["w"], parts.spectra["v"])


def test_digits_lost_by_squaring_are_won_back() -> None:
    """An eigenvalue of 2e-5 beside one of 1e9 is beneath the rounding of the Gram matrix."""
    generator = torch.Generator().manual_seed(3)
    u = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    x = torch.logspace(math.log10(2e-5), 9, 24, dtype=torch.float64)
    w = u @ torch.diag(x.sqrt()) @ v
    table = otk.estimate_alpha({"w": w, "conv": w.view(24, 24, 1, 1)}, "ks", keep_spectra=True)
    np.testing.assert_allclose(table.spectra["w"], x, rtol=1e-5)
    assert "svd for 1 of 1" in table["w"].solver and "svd" in table["conv"].solver
    assert "svd" not in otk.estimate_alpha({"w": heavy(24, 24)}, "ks")[0].solver


def test_float32_is_kept_where_safe_and_redone_elsewhere() -> None:
    calm = torch.diag(torch.linspace(0.2, 0.9, 50)).sqrt()
    near = torch.diag(torch.cat([torch.tensor([1e-5 + 1e-9]), torch.linspace(0.2, 0.9, 49)])).sqrt()
    weights = {"calm": calm, "near": near, "loud": 50 * heavy(40, 40), "low": 1e-5 * calm}
    for fit in ("ks", "xmin_mid", "xmin_peak"):
        exact = otk.estimate_alpha(weights, fit)
        table = otk.estimate_alpha(weights, fit, precision="float32")
        words = {row.name: row.precision for row in table}
        assert words["near"] == "float32, redone in float64: an eigenvalue near the threshold"
        assert words["low"].startswith("float32, redone in float64: no eigenvalue above")
        if fit == "ks":
            assert words["calm"] == "float32" and "float32 syrk" in table["calm"].solver
            assert words["loud"] == "float32, redone in float64: an eigenvalue above 1"
        for row in table:
            redone = row.precision != "float32"
            assert same(row.alpha, exact[row.name].alpha, 0 if redone else 1e-3), (fit, row.name)
    assert "redone in float64" in str(table)


def test_what_float32_noise_can_change_is_flagged() -> None:
    """No layer whose alpha changes under the published tools' rounding goes without a flag."""
    layers = select({f"w{i}": heavy(40 + i, 64, 3, 3, seed=i) for i in range(12)})
    exact = [torch.from_numpy(oracle.eigenvalues(layer.weight.numpy())) for layer in layers]
    generator = torch.Generator().manual_seed(0)
    changed = flagged = 0
    for fit in ("xmin_peak", "xmin_mid", "ks"):
        options = FitOptions(fit)
        rows = rows_of(layers, [Spectrum(x, "") for x in exact], options)
        flagged += sum(row.ambiguous for row in rows)
        for _ in range(4):
            moved = []
            for x in exact:
                noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                sigma = x.sqrt() + 3e-8 * x[-1].sqrt() * noise
                moved.append(Spectrum((sigma * sigma).sort().values, ""))
            for row, other in zip(rows, rows_of(layers, moved, options), strict=True):
                if not same(other.alpha, row.alpha, 1e-3):
                    changed += 1
                    assert row.ambiguous, (fit, row.name, row.alpha, other.alpha)
    assert flagged < 24, "a flag on everything says nothing"


def test_ambiguity_names_the_other_result() -> None:
    # Two bins of equal count, and a value on the inner edge of one of them.
    values = torch.tensor([1.0] * 5 + [10 ** (50.00001 / 100)] * 5 + [10.0], dtype=torch.float64)
    row = rows_of(
        select({"w": torch.eye(11)}), [Spectrum(values, "")], FitOptions("xmin_peak_fixed")
    )[0]
    assert row.ambiguous and "two bins tie for the peak; the other gives" in row.reason
    values = torch.tensor([1.00000001e-5, *range(1, 7)], dtype=torch.float64)
    row = rows_of(select({"w": torch.eye(7)}), [Spectrum(values, "")], FitOptions("xmin_mid"))[0]
    assert row.ambiguous and "1 eigenvalues near the threshold" in row.reason


def test_progress_counts_every_layer() -> None:
    for threads in (1, 2):
        seen: list[tuple[int, int, str]] = []
        otk.estimate_alpha(
            WEIGHTS,
            "xmin_mid",
            threads=threads,
            progress=lambda done, count, name, log=seen: log.append((done, count, name)),
        )
        assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
        assert {name for _, _, name in seen} == set(otk.estimate_alpha(WEIGHTS, "ks").alphas())


@pytest.mark.slow
def test_memory_of_a_huge_layer_stays_within_three_gram_matrices() -> None:
    """4096 x 11008 in a process of its own; the peak is that of the system."""
    import subprocess
    import sys

    code = """
import resource, torch
from opentrans_kernels import estimate_alpha
estimate_alpha({"w": torch.randn(64, 64)})
w = torch.randn(4096, 11008)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
row = estimate_alpha({"w": w}, "xmin_mid", threads=1)[0]
print(row.alpha, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True
    )
    alpha, extra = map(float, done.stdout.split())
    assert alpha > 1 and extra <= 3 * 4096 * 4096 * 8, f"{extra / 2**20:.0f} MB"
