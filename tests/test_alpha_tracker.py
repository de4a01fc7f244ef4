"""Tracking alpha during training: the proof holds, what is skipped is said, nothing is stale."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from freeze_cases import Chain
from hypothesis import given, settings
from torch import nn

from opentrans_kernels.errors import OpenTransError, UnsupportedModelError
from opentrans_kernels.spectrum import estimate_alpha, select
from opentrans_kernels.spectrum.certificate import (
    NORM_LEVELS,
    UNKNOWN,
    alpha_interval,
    norm_bound,
)
from opentrans_kernels.spectrum.parts import spectra_of
from opentrans_kernels.spectrum.sampled import Sample, Warm, parse_approx
from opentrans_kernels.spectrum.tracker import AlphaTracker
from opentrans_kernels.spectrum.updates import LayerState, undecided

THRESHOLD = 1e-5
SHAPES = ((12, 20), (20, 12), (6, 9, 3, 3), (16, 1, 3, 3), (24, 24, 1, 1))


def matrices(seed: int, shape: tuple[int, ...], tail: float) -> torch.Tensor:
    """A weight with a heavy tail: rows and columns scaled by powers of uniform numbers."""
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=gen, dtype=torch.float64)
    for axis in (0, 1):
        factor = torch.rand(shape[axis], generator=gen, dtype=torch.float64) + 1e-3
        view = [1] * len(shape)
        view[axis] = shape[axis]
        weight = weight * factor.pow(-tail).view(view)
    return weight


def interval(weight: torch.Tensor, change: torch.Tensor, level: str) -> tuple[float, float]:
    (layer,) = select({"w": weight}, linear_aspect=None)
    (moved,) = select({"w": weight + change}, linear_aspect=None)
    (spectrum,) = spectra_of([layer], threshold=THRESHOLD)
    difference = moved.matrices() - layer.matrices()
    return alpha_interval(
        spectrum.values,
        layer,
        norm_bound(difference, level),
        float(difference.norm()),
        threshold=THRESHOLD,
    )


@given(
    st.integers(0, 10**6), st.sampled_from(SHAPES), st.floats(0, 0.6), st.floats(-7, 0),
    st.sampled_from(NORM_LEVELS), st.booleans(), st.floats(-4, 1),
)  # fmt: skip
@settings(max_examples=250)
def test_the_interval_always_holds_the_true_alpha(
    seed, shape, tail, size, level, rank_one, scale
) -> None:
    weight = matrices(seed, shape, tail)
    weight = weight * (10**scale / float(weight.norm()) * math.sqrt(weight.numel()))
    gen = torch.Generator().manual_seed(seed + 1)
    change = torch.randn(shape, generator=gen, dtype=torch.float64)
    if rank_one:  # along singular vectors, where Weyl's inequality is an equality
        stack = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
        change = torch.zeros_like(stack)
        for k in range(stack.shape[2]):
            u, _, vh = torch.linalg.svd(stack[:, :, k], full_matrices=False)
            index = int(torch.randint(len(vh), (1,), generator=gen))
            change[:, :, k] = torch.outer(u[:, index], vh[index])
        change = change.reshape(shape)
    change = change * (10**size * float(weight.norm()) / float(change.norm()))
    low, high = interval(weight, change, level)
    true = estimate_alpha({"w": weight + change}, "xmin_mid", linear_aspect=None)["w"]
    before = estimate_alpha({"w": weight}, "xmin_mid", linear_aspect=None)["w"]
    if (low, high) != UNKNOWN:
        assert low <= true.alpha <= high and low <= before.alpha <= high
        assert true.num_evals >= 2


def test_the_interval_is_not_vacuous() -> None:
    weight = matrices(0, (64, 96), 0.3)
    change = torch.randn(64, 96, dtype=torch.float64) * 1e-4 * float(weight.norm()) / 78
    widths = {}
    for level in NORM_LEVELS:
        low, high = interval(weight, change, level)
        assert 1 < low < high < math.inf
        widths[level] = (high - low) / low
    assert widths["schatten8"] < widths["schatten4"] < widths["entries"] < 0.05
    same_low, same_high = interval(weight, torch.zeros_like(weight), "entries")
    assert (same_high - same_low) / same_low < 1e-6


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=80)
def test_norm_bounds_are_never_below_the_norm(seed, count, small, more) -> None:
    gen = torch.Generator().manual_seed(seed)
    stack = torch.randn(count, small, small + more - 1, generator=gen, dtype=torch.float64)
    true = float(torch.linalg.matrix_norm(stack, 2).max())
    found = [norm_bound(stack, level) for level in NORM_LEVELS]
    assert min(found) >= true
    assert found[2] <= found[1] * (1 + 1e-8) and found[2] <= true * small**0.125 * (1 + 1e-8)


def test_eigenvalues_at_the_threshold_widen_the_interval() -> None:
    values = torch.tensor([0.9e-5, 1.1e-5, 0.1, 0.2, 0.4, 0.8], dtype=torch.float64)
    weight = torch.diag(values.sqrt())
    low, high = interval(weight, torch.eye(6, dtype=torch.float64) * 5e-4, "schatten8")
    for kept in (values[2:], values[1:], values):
        tail = kept[len(kept) // 2 :]
        alpha = 1 + len(tail) / float((tail / tail[0]).log().sum())
        assert low <= alpha <= high
    assert interval(weight * 1e-4, weight * 1e-6, "entries") == UNKNOWN


def nets(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Chain(9, width=16)
    with torch.no_grad():
        for i in range(9):
            conv = getattr(model, f"conv{i}")
            rows = torch.rand(conv.weight.shape[0]) + 1e-2
            conv.weight.mul_(rows.pow(-0.08 * i).view(-1, 1, 1, 1))
    return model


def below(table) -> set[str]:
    return {row.name for row in table if row.alpha < table.median()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [1e-6, 1e-4, 3e-3])
def test_sides_of_the_median_are_those_of_a_full_estimate(seed: int, step: float) -> None:
    model = nets(seed)
    tracker = AlphaTracker(model)
    assert tracker.update().count("computed") == 9
    skipped = 0
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * step * parameter.abs().mean())
        update = tracker.update()
        full = estimate_alpha(model, "xmin_mid")
        assert update.certain
        assert below(update.table) == below(full)
        for state, row in zip(update.states, full, strict=True):
            assert state.low <= row.alpha <= state.high
            assert state.exact == (state.action == "computed")
        skipped += update.count("certified")
        assert update.count("computed") + update.count("certified") == 9
    assert skipped > (20 if step < 1e-3 else 0) or step > 1e-3


def test_what_was_skipped_is_said() -> None:
    model = nets(0)
    tracker = AlphaTracker(model)
    tracker.update()
    model.conv3.weight.data.add_(1e-5 * torch.randn_like(model.conv3.weight))
    update = tracker.update()
    state = update.states[3]
    row = update.table["conv3"]
    assert state.action == "certified" and state.age == 1 and 0 < state.change < 1e-3
    assert row.approx.startswith("certified: 1 updates old, alpha now in [")
    assert "conv3: certified" in str(update) and "8 unchanged, 1 certified" in str(update)
    assert all(one.action == "unchanged" for one in update.states if one.name != "conv3")


def test_frozen_layers_are_never_solved_again(monkeypatch) -> None:
    model = nets(1)
    tracker = AlphaTracker(model, "xmin_peak")
    first = tracker.update().table
    frozen = {"conv0", "conv2", "conv5"}
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    solved: list[str] = []
    monkeypatch.setattr(
        "opentrans_kernels.spectrum.tracker.spectra_of",
        lambda layers, **rest: (
            solved.extend(one.name for one in layers),
            spectra_of(layers, threshold=rest["threshold"]),
        )[1],
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        update = tracker.update()
    assert set(solved) == {f"conv{i}" for i in range(9)} - frozen and len(solved) == 12
    full = estimate_alpha(model, "xmin_peak")
    assert update.table.alphas() == full.alphas()
    assert {name: update.table[name].alpha for name in frozen} == {
        n: first[n].alpha for n in frozen
    }
    assert [row.params for row in update.table] == [row.params for row in full]


def test_round_robin_reaches_every_layer() -> None:
    model = nets(2)
    tracker = AlphaTracker(model, "ks", max_layers=2)
    tracker.update()
    seen: set[str] = set()
    for turn in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01).add_(0.01 * torch.randn_like(parameter))
        update = tracker.update()
        assert update.count("computed") == 2 and not update.certain
        computed = {state.name for state in update.states if state.action == "computed"}
        assert turn >= 4 or not computed & seen
        seen |= computed
        for state in update.states:
            if state.action == "waiting":
                assert "waiting" in update.table[state.name].approx
    assert len(seen) == 9


@pytest.mark.parametrize(
    ("lows", "highs", "found"),
    [
        ((1, 2, 3), (1, 2, 3), ""),
        ((1, 2, 3), (1.5, 2, 3), ""),
        ((1, 2, 3), (2.5, 2, 3), "a"),
        ((1, 2, 3, 4), (1, 2.4, 3.5, 4), ""),  # the median moves, no side does
        ((1, 2, 2.4, 4), (1, 2.5, 3.5, 4), "bc"),
        ((0, 2, 3), (math.inf, 2, 3), "a"),
        ((math.nan, 2, 3), (math.nan, 2, 3), ""),
    ],
)
def test_what_is_undecided(lows, highs, found) -> None:
    states = [
        LayerState(name, "computed" if low == high or low != low else "certified", low, high, 0)
        for name, low, high in zip("abcd", lows, highs, strict=False)
    ]
    open_ones = undecided(states)
    assert set(found) <= set(open_ones) and bool(open_ones) == bool(found)


def test_sampled_rows_name_their_mode_and_measured_error() -> None:
    weights = {"big": matrices(3, (96, 128), 0.2).float(), "small": matrices(4, (24, 32), 0.2)}
    tracker = AlphaTracker(weights, "xmin_mid", approx="sample:48x3", refresh=3)
    exact = tracker.update()
    assert exact.certain and all(state.action == "computed" for state in exact.states)
    weights["big"] *= 1.5
    weights["small"] *= 1.5
    update = tracker.update()
    big, small = update.states
    assert (big.action, small.action) == ("approximated", "computed") and not update.certain
    row = update.table["big"]
    assert row.approx == f"sample:48x3, error {big.error:.1e} when last measured"
    assert "of sample:48x3" in row.solver and update.table["small"].approx == ""
    assert 0 < big.error < 0.5
    # The same draw before and now, and alpha does not depend on the scale.
    assert abs(row.alpha / exact.table["big"].alpha - 1) == pytest.approx(big.error, rel=1e-3)
    for _ in range(2):
        weights["big"] += 1e-3
        last = tracker.update()
    assert last.states[0].action == "computed" and last.table["big"].approx == ""


def test_warm_start_is_second_order() -> None:
    errors = []
    for step in (1e-2, 1e-3):
        weight = matrices(5, (32, 40), 0.3)
        weights = {"w": weight.clone()}
        tracker = AlphaTracker(weights, "xmin_mid", approx="warm", refresh=2)
        tracker.update()
        gen = torch.Generator().manual_seed(0)
        change = torch.randn(32, 40, generator=gen, dtype=torch.float64)
        weights["w"] = weight + change * step * float(weight.norm()) / float(change.norm())
        update = tracker.update()
        row = update.table["w"]
        assert row.approx == "warm, error not yet measured"
        true = estimate_alpha(weights, "xmin_mid")["w"].alpha
        errors.append(abs(row.alpha / true - 1))
        weights["w"] = weights["w"] * 1.0 + 1e-9
        measured = tracker.update().states[0]
        assert measured.action == "computed" and measured.error == pytest.approx(
            errors[-1], rel=1e-2
        )
    assert errors[1] < 0.1 * errors[0] and errors[0] < 0.05


def test_parse_approx() -> None:
    assert parse_approx(None) is None
    assert parse_approx("sample:512") == Sample(512, 2)
    assert parse_approx("sample:64x5") == Sample(64, 5) and parse_approx("warm") == Warm()
    for text in ("sample", "sample:4", "sample:axb", "lanczos", "warm:3", "sample:64x"):
        if text == "sample:64x":
            assert parse_approx(text) == Sample(64, 2)
            continue
        with pytest.raises(OpenTransError, match=r"'sample:512' \(two random"):
            parse_approx(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(fit="ks", certify=True), "Use fit='xmin_mid', or certify=False"),
        (dict(certify=True, approx="warm"), "Leave one out"),
        (dict(max_layers=0), "max_layers=0 must be at least 1"),
        (dict(refresh=0), "refresh=0"),
        (dict(fit="middle"), "xmin_mid"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(OpenTransError, match=message):
        AlphaTracker(nets(0), **arguments)


def test_a_weight_that_turns_nan_is_an_error_and_new_layers_are_found() -> None:
    weights = {"a": torch.randn(8, 8), "b": torch.randn(8, 8)}
    tracker = AlphaTracker(weights)
    tracker.update()
    weights["c"] = torch.randn(6, 8)
    weights["a"] = torch.randn(10, 8)  # another shape: a new layer under an old name
    update = tracker.update()
    assert [state.action for state in update.states] == ["computed", "unchanged", "computed"]
    weights["b"][0, 0] = math.nan
    with pytest.raises(UnsupportedModelError, match="b"):
        tracker.update()
    del weights["b"]
    assert len(tracker.update().states) == 2
