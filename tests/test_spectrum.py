"""``estimate_alpha`` against the definition written out in NumPy, for every mode and shape."""

from __future__ import annotations

import math
import statistics

import alpha_reference as oracle
import numpy as np
import pytest
import torch
from spectrum_cases import RELATIVE, WEIGHTS, same

import opentrans_kernels as otk
from opentrans_kernels.spectrum import (
    MODES,
    AlphaTable,
    fit_rows,
)


@pytest.fixture(scope="module")
def tables() -> dict[str, AlphaTable]:
    return {fit: otk.estimate_alpha(WEIGHTS, fit, threads=1) for fit in MODES}


@pytest.mark.parametrize("fit", MODES)
def test_every_mode_agrees_with_the_definition(fit: str, tables) -> None:
    expected = oracle.estimate({name: w.numpy() for name, w in WEIGHTS.items()}, fit)
    table = tables[fit]
    assert list(table.alphas()) == list(expected) and len(expected) == len(WEIGHTS) + 4
    for row in table:
        alpha, distance, index, count = expected[row.name]
        assert same(row.alpha, alpha), (row.name, row.alpha, alpha)
        assert abs(row.ks_distance - distance) <= 1e-7, row.name
        assert (row.num_evals, row.xmin_index) == (count, index), row.name
    finite = [row for row in table if math.isfinite(row.alpha) and row.alpha > 1]
    assert len(finite) >= 24, "hardly a layer was fitted, so this proves little"


def test_freeze_sets_equal_those_of_the_definition(tables) -> None:
    for fit, table in tables.items():
        expected = oracle.estimate({name: w.numpy() for name, w in WEIGHTS.items()}, fit)
        known = [entry[0] for entry in expected.values() if entry[0] >= 0]
        middle = statistics.median(known)
        assert table.median() == pytest.approx(middle, rel=RELATIVE)
        below = {name for name, entry in expected.items() if 0 <= entry[0] < middle}
        assert {row.name for row in table if row.defined and row.alpha < table.median()} == below


def test_modes_differ_where_their_definitions_do(tables) -> None:
    # log10(0.95 * x2) lies far below the peak, so the published window reaches down to 1.2 here.
    generator = np.random.default_rng(1)
    tail = (1 - generator.random(60)) ** (-1 / 1.5)
    cluster = 30 * (1 + 0.03 * generator.random(10))
    x = torch.from_numpy(np.sort(np.concatenate([tail, cluster])))
    published, fixed = (fit_rows([x], fit)[0] for fit in ("xmin_peak", "xmin_peak_fixed"))
    assert published.xmin < 2 and fixed.xmin > 25 and published.alpha < fixed.alpha
    for fit, found in (("xmin_peak", published), ("xmin_peak_fixed", fixed)):
        assert (found.alpha, found.index) == pytest.approx(oracle.fit(x.numpy(), fit)[::2])
    assert tables["ks"]["just below 20"].alpha != tables["weightwatcher"]["just below 20"].alpha
    for name in ("twenty", "linear", "conv3x3", "conv1x1"):
        assert tables["ks"][name].alpha == tables["weightwatcher"][name].alpha


def test_the_eigenvalues_of_a_layer_are_those_of_its_svd() -> None:
    table = otk.estimate_alpha(WEIGHTS, "ks", keep_spectra=True)
    for name, weight in WEIGHTS.items():
        if name not in table:
            continue
        expected = oracle.kept(oracle.eigenvalues(weight.numpy()))
        found = table.spectra[name].numpy()
        assert found.dtype == np.float64 and found.shape == expected.shape, name
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=0, err_msg=name)
        assert np.all(np.diff(found) >= 0)


def test_fields_of_a_row(tables) -> None:
    weight = WEIGHTS["conv3x3"].double().numpy()
    x = oracle.kept(oracle.eigenvalues(weight))
    row = tables["xmin_mid"]["conv3x3"]
    assert (row.shape, row.kind, row.part, row.fit) == ((40, 24, 3, 3), "conv", "", "xmin_mid")
    assert row.num_total == 9 * 24 and row.params == weight.size
    near = pytest.approx
    assert row.norm == near(x.sum()) and row.spectral_norm == near(x[-1])
    assert row.stable_rank == near(x.sum() / x[-1])
    assert row.log_norm == near(np.log10(x.sum())) and row.smallest == near(x[0])
    assert row.log_spectral_norm == near(np.log10(x[-1]))
    assert row.alpha_weighted == near(row.alpha * np.log10(x[-1]))
    assert row.log_alpha_norm == near(np.log10((x**row.alpha).sum()))
    assert row.xmin == near(x[row.xmin_index]) and row.xmin_index == len(x) // 2
    p = x / x.sum() + 1e-10
    assert row.entropy == near(-(p * np.log(p)).sum() / np.log(row.matrix_rank + 1e-10))
    assert row.matrix_rank == row.num_total
    assert tables["ks"]["rank-deficient"].matrix_rank == 13
    # Overflows float64 if summed as it is written.
    top = otk.estimate_alpha({"w": torch.eye(30).double() * torch.linspace(1, 1.001, 30)}, "ks")[0]
    assert top.alpha > 1e3 and math.isfinite(top.log_alpha_norm)


def spectrum(fit: str, *eigenvalues: float):
    """The row of a diagonal matrix with these eigenvalues."""
    weight = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64).sqrt())
    return otk.estimate_alpha({"w": weight}, fit)[0]


@pytest.mark.parametrize("fit", MODES)
def test_an_all_zero_layer_is_undefined(fit: str) -> None:
    row = otk.estimate_alpha({"w": torch.zeros(5, 4, 3, 3)}, fit)[0]
    if fit == "weightwatcher":
        assert row.alpha == -1 and "no eigenvalue above" in row.reason
    else:
        assert math.isnan(row.alpha) and row.reason == "all zero" and row.ks_distance == 1
    assert not row.defined and row.num_evals == 0 and row.norm == 0
    assert row.xmin_index == -1 and math.isnan(row.xmin) and math.isnan(row.stable_rank)


@pytest.mark.parametrize("fit", MODES)
def test_one_eigenvalue(fit: str) -> None:
    row = otk.estimate_alpha({"w": torch.ones(1, 7)}, fit)[0]
    assert row.num_evals == 1 and row.num_total == 1
    if fit == "xmin_mid":
        assert (row.alpha, row.ks_distance, row.xmin_index) == (math.inf, 0, 0)
    else:
        assert not row.defined and row.reason == "one eigenvalue"


def test_two_eigenvalues_have_closed_forms() -> None:
    for fit in ("xmin_peak", "xmin_peak_fixed", "ks"):
        row = spectrum(fit, 1.0, 3.0)
        assert row.alpha == pytest.approx(1 + 2 / math.log(3), rel=1e-12)
        assert row.ks_distance == pytest.approx(0.5 - math.exp(-2), rel=1e-12)
    row = spectrum("xmin_mid", 1.0, 3.0)
    assert (row.alpha, row.ks_distance, row.xmin_index) == (math.inf, 0, 1)
    row = spectrum("weightwatcher", 1.0, 3.0)
    assert row.alpha == pytest.approx(1 + 1 / math.log(3), rel=1e-12)


def test_exact_ties() -> None:
    weight = {"w": math.sqrt(0.5) * torch.eye(16, dtype=torch.float64)}
    row = otk.estimate_alpha(weight, "xmin_mid")[0]
    assert (row.alpha, row.ks_distance) == (math.inf, 7 / 8)
    for fit in ("xmin_peak", "xmin_peak_fixed", "ks"):
        row = otk.estimate_alpha(weight, fit)[0]
        assert (row.alpha, row.ks_distance, row.xmin_index) == (math.inf, 0.5, 14)
    row = otk.estimate_alpha(weight, "weightwatcher")[0]
    assert (row.alpha, row.ks_distance) == (0, 1) and "equal" in row.reason


def test_a_geometric_spectrum_has_a_closed_form() -> None:
    q, count = 1.25, 41
    row = spectrum("xmin_mid", *(q**i for i in range(count)))
    n = count - count // 2
    assert row.alpha == pytest.approx(1 + n / (math.log(q) * n * (n - 1) / 2), rel=1e-12)


@pytest.mark.parametrize("count", [4, 5, 6, 7])
def test_mid_starts_at_the_upper_middle(count: int) -> None:
    row = spectrum("xmin_mid", *(1.0 + i for i in range(count)))
    assert row.xmin_index == count // 2 and row.xmin == pytest.approx(1.0 + count // 2)
    weights = {"w": torch.diag(torch.arange(1.0, count + 1).sqrt())}
    assert otk.estimate_alpha(weights, "xmin_mid", xmin_pos=4)[0].xmin_index == count // 4


def test_an_empty_window() -> None:
    # The fullest bin holds only the largest values, which are no candidate in the fixed rule.
    values = [1.0, 1e8, 1e8 * (1 + 1e-12)]
    fixed = spectrum("xmin_peak_fixed", *values)
    assert fixed.xmin_index == 1, "the middle value is the window"
    values = [1e-4, 2e-2, 1e8, 1e8]
    rows = {fit: spectrum(fit, *values) for fit in ("xmin_peak", "xmin_peak_fixed")}
    assert all(row.alpha > 1 for row in rows.values())
    table = otk.estimate_alpha({"w": torch.diag(torch.tensor([1.0, 1e3]).sqrt())}, bins=1)
    assert table[0].alpha > 1


def test_nearly_orthogonal_weights_give_a_finite_alpha() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    row = otk.estimate_alpha({"w": q}, "xmin_mid")[0]
    assert 1e5 < row.alpha < 1e8, "set by the rounding of the float32 weights"


def test_rank_deficient_below_the_threshold_is_flagged(tables) -> None:
    row = tables["ks"]["below, no rank"]
    assert row.num_evals == 7 and row.num_total == 40 and row.ambiguous
    assert "rank-deficient" in row.reason and "svd" in row.solver
    assert tables["ks"]["all below"].num_evals == 40, "keep all, if all are below"
    assert tables["weightwatcher"]["all below"].alpha == -1
