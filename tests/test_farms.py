"""``method="farms"``: alpha from blocks and windows, against loops in plain PyTorch."""

from __future__ import annotations

import math

import alpha_reference
import farms_reference as oracle
import pytest
import torch
from spectrum_cases import heavy
from torch import nn

from opentrans_kernels.errors import OpenTransError, UnsupportedModelError
from opentrans_kernels.spectrum import AlphaTable, estimate_alpha, estimate_alphas, select
from opentrans_kernels.spectrum.farms import samples_of, window_starts

JUDGED = {
    "tall 1x1": heavy(96, 40, 1, 1),
    "wide 1x1": heavy(40, 96, 1, 1, seed=1),
    "square 1x1": heavy(48, 48, 1, 1, seed=2),
    "tall 3x3": heavy(70, 16, 3, 3, seed=3),
    "wide 3x3": heavy(16, 70, 3, 3, seed=4),
    "square 3x3": heavy(24, 24, 3, 3, seed=5),
    "conv1d": heavy(20, 45, 7, seed=6),
    "linear square": heavy(100, 100, seed=7),
    "linear tall": heavy(230, 104, seed=8),
    "linear wide": heavy(101, 420, seed=9),
    "half": heavy(64, 32, 3, 3, seed=10).half(),
}


@pytest.mark.parametrize("fit", ["xmin_mid", "xmin_peak", "ks"])
def test_alpha_is_that_of_the_loops(fit: str) -> None:
    table = estimate_alpha(JUDGED, fit, method="farms", threads=1)
    for name, weight in JUDGED.items():
        alpha, distance, count = oracle.alpha(weight, fit)
        row = table[name]
        assert row.alpha == pytest.approx(alpha, rel=1e-6), name
        assert row.ks_distance == pytest.approx(distance, abs=1e-7), name
        assert row.num_evals == row.num_total == count and row.shape == tuple(weight.shape)
    assert table.label == f"farms {fit}" and f"fit farms {fit}" in str(table)


def test_the_published_fit_and_threshold_are_the_defaults() -> None:
    weights = {"w": heavy(64, 32, 3, 3, scale=1e-3)}  # all its eigenvalues are below 1e-5
    table = estimate_alpha(weights, method="farms")
    assert table.fit == "xmin_mid" and table.parameters["evals_threshold"] == 0
    assert table.method == "farms" and estimate_alpha(weights).fit == "xmin_peak"
    assert table["w"].alpha == pytest.approx(oracle.alpha(weights["w"])[0], rel=1e-6)
    some = estimate_alpha({"w": heavy(64, 32, 3, 3, scale=0.02)}, method="farms",
                          evals_threshold=1e-5)["w"]  # fmt: skip
    assert 0 < some.num_evals < some.num_total == 2 * 32 * 9


def test_a_square_slice_is_one_block_and_equals_the_whole_layer() -> None:
    weights = {"1x1": heavy(48, 48, 1, 1), "3x3": heavy(24, 24, 3, 3, seed=1)}
    farms = estimate_alpha(weights, "ks", method="farms")
    whole = estimate_alpha(weights, "ks", evals_threshold=0)
    for name in weights:
        one, two = farms[name], whole[name]
        assert (one.alpha, one.ks_distance, one.xmin_index) == (
            two.alpha, two.ks_distance, two.xmin_index,
        )  # fmt: skip
        assert (one.norm, one.stable_rank, one.matrix_rank) == (
            two.norm, two.stable_rank, two.matrix_rank,
        )  # fmt: skip


def test_blocks_are_cut_by_hand_as_described() -> None:
    """Two known blocks of a wide 1x1, and remainder columns that nobody may read."""
    first = torch.diag(torch.arange(1.0, 41.0))
    second = torch.diag(torch.arange(1.0, 41.0) ** 3)
    rest = torch.full((40, 17), 1e6)
    weight = torch.cat([first, second, rest], 1).view(40, 97, 1, 1)
    row = estimate_alpha({"w": weight}, "xmin_mid", method="farms")["w"]
    singly = [
        alpha_reference.fit((0.5 * block.diagonal().double() ** 2).numpy(), "xmin_mid")
        for block in (first, second)
    ]
    assert row.alpha == pytest.approx((singly[0][0] + singly[1][0]) / 2, rel=1e-9)
    # The sqrt(0.5): the largest eigenvalues are half of 40^2 and of 40^6.
    assert row.spectral_norm == pytest.approx((0.5 * 40**2 + 0.5 * 40**6) / 2, rel=1e-9)
    assert row.norm < 1e10 < 1e12 / 2, "the remainder was read"
    assert row.num_evals == 80 and row.solver.startswith("farms, 2 blocks of 40x40: ")
    assert row.xmin_index == -1 and row.smallest == pytest.approx(0.5)


def test_slices_of_a_kernel_are_pooled_before_the_fit() -> None:
    slices = [torch.diag(torch.arange(1.0, 17.0)) * (k + 1) for k in range(9)]
    weight = torch.stack(slices, 2).view(16, 16, 3, 3)
    row = estimate_alpha({"w": weight}, "ks", method="farms", keep_spectra=True)
    pooled = torch.cat([0.5 * one.diagonal().double() ** 2 for one in slices]).sort().values
    torch.testing.assert_close(row.spectra["w"], pooled, rtol=1e-12, atol=0)
    assert row["w"].alpha == pytest.approx(alpha_reference.fit(pooled.numpy(), "ks")[0], rel=1e-9)


@pytest.mark.parametrize(
    ("size", "starts"),
    [
        (100, [0]),
        (101, [0, 1]),
        (107, [0, 1, 2, 3, 4, 5, 6, 7]),
        (300, [0, 25, 50, 75, 100, 125, 150, 175, 200]),
        (384, [0, 35, 70, 105, 140, 175, 210, 245, 280]),  # the last four are in no window
    ],
)
def test_windows_of_a_linear_layer(size: int, starts: list[int]) -> None:
    assert window_starts(size) == starts == oracle.starts(size)


def test_nine_windows_a_side_share_one_fit() -> None:
    (layer,) = select({"w": heavy(384, 300)})
    (group,) = samples_of(layer).groups
    assert len(group) == 81 and {piece.shape for piece in group} == {(100, 100)}
    assert all(piece.scale == 1 for piece in group), "a linear weight has no factor"
    assert torch.equal(group[-1].weight, layer.weight[280:380, 200:300])


UNJUDGED = {
    "stem": (heavy(32, 3, 3, 3), "10 blocks of 3x3 with 27 eigenvalues each"),
    "stem 7x7": (heavy(64, 3, 7, 7), "21 blocks of 3x3 with 147 eigenvalues each"),
    "depthwise": (heavy(64, 1, 3, 3), "64 blocks of 1x1 with 9 eigenvalues each"),
    "narrow 1x1": (heavy(96, 16, 1, 1), "6 blocks of 16x16 with 16 eigenvalues each"),
    "square but small": (heavy(4, 4, 3, 3), "1 block of 4x4 with 36 eigenvalues each"),
    "linear": (heavy(99, 120), "99x120 holds no 100x100 window"),
}


def test_layers_it_cannot_judge_are_flagged_and_have_no_alpha() -> None:
    weights = {name: weight for name, (weight, _) in UNJUDGED.items()}
    table = estimate_alpha(weights | JUDGED, method="farms")
    for name, (_, words) in UNJUDGED.items():
        row = table[name]
        assert math.isnan(row.alpha) and not row.defined and not row.ambiguous
        assert row.reason.startswith("farms cannot judge it: ") and words in row.reason
    known = sorted(table[name].alpha for name in JUDGED)
    assert table.median() == pytest.approx(known[len(known) // 2]), "they do not count"
    alone = estimate_alpha(weights, method="farms", keep_spectra=True)
    assert math.isnan(alone.median()) and alone.spectra["stem"].numel() == 0
    back = AlphaTable.from_json(table.to_json())
    assert repr(back.rows) == repr(table.rows) and back.label == "farms xmin_mid"


def test_a_block_without_an_alpha_leaves_the_layer_without_one() -> None:
    weight = heavy(96, 40, 1, 1)
    weight[:40] = 0
    row = estimate_alpha({"w": weight}, method="farms")["w"]
    assert math.isnan(row.alpha) and row.reason == "no alpha in 1 of 2 blocks: all zero"
    equal = estimate_alpha({"w": torch.eye(40).repeat(2, 1).view(80, 40, 1, 1)}, method="farms")
    assert equal["w"].alpha == math.inf


def test_threads_batches_and_strides_change_no_bit() -> None:
    one = estimate_alpha(JUDGED, method="farms", threads=1)
    assert [row.alpha for row in one] == [
        row.alpha for row in estimate_alpha(JUDGED, method="farms", threads=2)
    ]
    for name, weight in JUDGED.items():
        turned = weight.double().transpose(0, 1).contiguous().transpose(0, 1)
        alone = estimate_alpha({name: turned}, method="farms")[name]
        assert alone.alpha == pytest.approx(one[name].alpha, rel=1e-12)


def test_several_fits_from_one_solve() -> None:
    both = estimate_alphas(JUDGED, ("xmin_peak", "ks"), method="farms")
    assert [table.fit for table in both] == ["xmin_peak", "ks"]
    for table in both:
        alone = estimate_alpha(JUDGED, table.fit, method="farms")
        assert table.alphas() == alone.alphas()
    whole = estimate_alphas(JUDGED, ("xmin_mid", "weightwatcher"), keep_spectra=True)
    for table in whole:
        alone = estimate_alpha(JUDGED, table.fit, keep_spectra=True)
        assert table.rows == alone.rows
        assert all(torch.equal(table.spectra[k], alone.spectra[k]) for k in JUDGED)


def test_progress_counts_layers() -> None:
    seen: list[tuple[int, int, str]] = []
    weights = {"a": heavy(96, 40, 1, 1), "b": heavy(120, 110), "stem": heavy(32, 3, 3, 3)}
    estimate_alpha(weights, method="farms", progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(1, 2), (2, 2)]
    assert {step[2] for step in seen} == {"a", "b"}


def test_bad_input_is_refused() -> None:
    with pytest.raises(OpenTransError, match="method='farm' is not known.*'whole', 'farms'"):
        estimate_alpha(JUDGED, method="farm")
    with pytest.raises(OpenTransError, match="precision='float32' is for whole.*float64"):
        estimate_alpha(JUDGED, method="farms", precision="float32")
    weight = heavy(64, 24, 1, 1)
    weight[-1, 0] = math.nan  # in the remainder, which no block reads
    with pytest.raises(UnsupportedModelError, match="layer 'w': its weight holds 1 NaN"):
        estimate_alpha({"w": weight}, method="farms")


def test_fused_projections_are_judged_by_their_parts() -> None:
    model = nn.Module()
    model.attn = nn.Linear(128, 384)
    with torch.no_grad():
        model.attn.weight.copy_(heavy(384, 128))
    table = estimate_alpha(model, method="farms")
    assert [row.name for row in table] == ["attn_q", "attn_k", "attn_v"]
    for row, part in zip(table, model.attn.weight.detach().chunk(3), strict=True):
        assert row.alpha == pytest.approx(oracle.alpha(part)[0], rel=1e-6)
