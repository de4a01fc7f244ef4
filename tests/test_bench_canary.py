"""The canary marks disturbed runs, and an interrupt keeps whole rounds."""

from __future__ import annotations

import pytest

from opentrans_kernels.bench import canary, schema, timing
from opentrans_kernels.bench.timing import Spread


def reading(ms: float, contended: float = 0.0) -> canary.Reading:
    return canary.Reading(Spread.of([ms, ms, ms]), Spread.of([ms]), contended, 100.0 / ms)


def test_a_quiet_run_is_not_marked() -> None:
    found = canary.verdict(reading(1.0), reading(1.05), shares={"ours": 0.1})
    assert not found["disturbed"] and found["reasons"] == []
    assert found["drift"] == pytest.approx(0.05)
    assert list(schema.problems(found, schema.CANARY)) == []


@pytest.mark.parametrize(
    ("before", "after", "shares", "said"),
    [
        (reading(1.0), reading(1.2), {}, "20% slower after the run: 1.000 ms before, 1.200 ms"),
        (reading(1.5), reading(1.0), {}, "50% slower before the run"),
        (reading(1.0), reading(1.0, 0.3), {}, "30% of the fixed kernel's samples after"),
        (reading(1.0), reading(1.0), {"eager": 0.5}, "50% of the samples of eager waited"),
    ],
)
def test_disturbances_are_named(before, after, shares, said: str) -> None:
    found = canary.verdict(before, after, shares=shares)
    assert found["disturbed"] and any(said in reason for reason in found["reasons"])


def test_an_interrupt_keeps_whole_rounds_if_asked() -> None:
    turns: list[str] = []

    def work(name: str) -> None:
        turns.append(name)
        if len(turns) == 4 + 2 * 2 * 2 + 3:  # in the middle of the third round
            raise KeyboardInterrupt

    calls = {name: (lambda name=name: work(name)) for name in "ab"}
    table = timing.interleave(
        calls, rounds=5, warmup_s=0, min_sample_ms=0, settle=1, keep_finished=True
    )
    assert table.interrupted and table.rounds == 2
    assert all(len(table[name].wall_ms) == len(table[name].cpu_ms) == 2 for name in "ab")
    turns.clear()
    with pytest.raises(KeyboardInterrupt):
        timing.interleave(calls, rounds=5, warmup_s=0, min_sample_ms=0, settle=1)


def test_an_interrupt_before_the_first_round_is_raised() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.interleave({"a": stop}, rounds=2, warmup_s=0, keep_finished=True)
    whole = timing.interleave({"a": lambda: None}, rounds=2, warmup_s=0, keep_finished=True)
    assert not whole.interrupted and whole.rounds == 2
