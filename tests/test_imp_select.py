"""The arithmetic of pruning: how many weights go when, and which are the smallest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opentrans.imp import ImpSchedule
from opentrans.imp.select import shares, smallest, smallest_units
from opentrans_kernels.errors import PlanError

RN50 = 23_473_152  # weights of CLIP RN50's convolutions without the first


def test_the_counts_of_the_published_schedule() -> None:
    kept = ImpSchedule().kept(RN50)
    assert len(kept) == 22
    assert (kept[0], kept[10], kept[20], kept[21]) == (21_125_837, 7_366_123, 2_568_408, 2_311_567)


@given(st.integers(50, 10**8), st.floats(0.02, 0.6), st.floats(0.01, 0.95))
def test_the_last_round_meets_the_target(total: int, rate: float, target: float) -> None:
    try:
        kept = ImpSchedule(10**4, rate, target).kept(total)
    except PlanError as error:
        assert "larger rate" in str(error) or round(target * total) >= total
        return
    assert kept[-1] == round(target * total)
    counts = [total, *kept]
    for before, after in zip(counts, counts[1:], strict=False):
        assert after < before and before - after <= round(rate * before)
    # Only the last round may be cut.
    assert all(a - b == round(rate * a) for a, b in zip(counts[:-2], counts[1:-1], strict=True))


@pytest.mark.parametrize(
    ("parts", "fix"),
    [
        ({"rounds": 0}, "at least 1"),
        ({"rate": 1.0}, "such as 0.1"),
        ({"rate": float("nan")}, "such as 0.1"),
        ({"period": True}, "whole number"),
        ({"target_density": 0.0}, "between 0 and 1"),
        ({"first_after": 0}, "at least 1"),
    ],
)
def test_a_schedule_that_is_not_possible(parts: dict, fix: str) -> None:
    with pytest.raises(PlanError, match=fix):
        ImpSchedule(**parts)


def test_too_few_rounds_and_a_target_reached_already() -> None:
    with pytest.raises(PlanError, match="Pass rounds=29"):
        ImpSchedule(target_density=0.05).kept(RN50)
    assert len(ImpSchedule(rounds=29, target_density=0.05).kept(RN50)) == 29
    with pytest.raises(PlanError, match="Ask for a lower one"):
        ImpSchedule(target_density=0.5).kept(1000, alive=400)
    with pytest.raises(PlanError, match="larger rate"):
        ImpSchedule(rate=0.01).kept(20)


def test_when_the_rounds_are_due() -> None:
    schedule = ImpSchedule(rounds=3, period=5)
    due = [s for s in range(1, 16) for r in range(3) if s == schedule.steps_before(r)]
    assert due == [5, 10, 15]
    released = ImpSchedule(rounds=3, period=5, first_after=1)
    assert [released.steps_before(r) for r in range(3)] == [1, 6, 11]
    assert not released.is_due(1, 5) and released.is_due(1, 6)


@given(st.lists(st.lists(st.integers(0, 6), max_size=30), min_size=1, max_size=4), st.data())
def test_smallest_is_a_stable_sort(numbers: list[list[int]], data: st.DataObject) -> None:
    """Few distinct values: most cases have ties at the threshold."""
    tensors = [torch.tensor(row, dtype=torch.float32) / 7 for row in numbers]
    joined = torch.cat(tensors)
    count = data.draw(st.integers(0, joined.numel()))
    taken, threshold = smallest(lambda i: tensors[i], count, len(tensors))
    expected = torch.zeros(joined.numel(), dtype=torch.bool)
    expected[torch.argsort(joined, stable=True)[:count]] = True
    assert torch.equal(torch.cat(taken), expected)
    assert threshold == (float(joined[expected].max()) if count else 0.0)


def test_smallest_over_the_whole_range_of_floats() -> None:
    spread = torch.exp(torch.linspace(-100, 85, 4001))  # denormals to almost the largest
    values = torch.cat([torch.zeros(3), spread])[torch.randperm(4004)].view(4, 1001)
    for count in (1, 3, 4, 1999, 4003):
        taken, threshold = smallest(lambda i: values[i], count, 4)
        assert sum(int(t.sum()) for t in taken) == count
        assert threshold == float(values.flatten().sort().values[count - 1])


def test_units_are_taken_whole_and_no_more_than_needed() -> None:
    scores = [torch.tensor([0.5, 0.1, torch.inf]), torch.tensor([0.1, 0.3])]
    sizes = [torch.tensor([4, 2, 0]), torch.tensor([3, 9])]
    for count, expected in ((0, 0), (1, 2), (2, 2), (3, 5), (6, 14), (15, 18), (99, 18)):
        taken, _ = smallest_units(scores, sizes, count)
        held = sum(int(s[t].sum()) for s, t in zip(sizes, taken, strict=True))
        assert held == expected
        assert not taken[0][2]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.data())
def test_shares_add_up(weights: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, sum(weights)))
    parts = shares(count, weights)
    assert sum(parts) == count
    total = max(1, sum(weights))
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - count * weight / total) < 1 and part <= weight
