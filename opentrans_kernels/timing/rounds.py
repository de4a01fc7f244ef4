"""Two calls against each other in rounds, with a look at the machine between the rounds.

A short measurement decides what a model runs from now on, so it must not be decided by whoever else
used the machine in that second. The canary is timed between rounds; a round beside which it was
slow, or that waited for a core, is disturbed: it is measured again, a bounded number of times, and
left out of what is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .canary import CONTENDED_LIMIT, DRIFT_LIMIT, Reading, look, waited
from .spread import Pair, median_pair

#: Fewest undisturbed rounds that may decide, and least share of all: where most were disturbed, the
#: looks between them missed what happened inside the others.
ENOUGH, ENOUGH_SHARE = 3, 0.5
#: Seconds and rounds: of a measurement on a quiet machine, and what disturbed rounds may add to it.
BUDGET_S, ROUNDS = 1.5, (3, 15)
EXTRA_S = 2.0
_LOOK_S = 0.02

Call = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """Seconds of ``wall`` and ``cpu`` time, and a short look at the machine."""

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    look: Callable[[int], Reading] = lambda threads: look(threads=threads, seconds=_LOOK_S)


@dataclass(frozen=True)
class PairTiming:
    """Milliseconds per call of two sides, from one round: their quotient is ``speedup``.

    q1, q3: quartiles of before / after over the ``rounds`` that count. left_out: rounds that were
    disturbed, with ``reasons``. disturbed: too few rounds were quiet, so all count, and the times
    are the smallest of either side: whatever disturbs a call only adds to it.
    """

    before_ms: float
    after_ms: float
    q1: float
    q3: float
    rounds: int
    left_out: int = 0
    disturbed: bool = False
    reasons: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """How many times less time it takes after than before."""
        return self.before_ms / self.after_ms

    @property
    def rule(self) -> str:
        """Which numbers these are, and so what was decided by."""
        count = f"{self.rounds} round{'s' if self.rounds > 1 else ''}"
        if self.disturbed:
            return f"smallest times of {count} on a disturbed machine"
        return f"median round of {count}"

    def notes(self) -> list[str]:
        """What has to be said about the machine; nothing if it was quiet."""
        why = "; ".join(self.reasons)
        if self.disturbed:
            return [
                f"disturbed machine: {why}. Too few of {self.rounds} rounds were quiet, so the "
                "times are the smallest of either side, and these decided"
            ]
        if self.left_out:
            return [
                f"{self.left_out} of {self.rounds + self.left_out} rounds were disturbed, measured "
                f"again and left out: {why}"
            ]
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        own = {**vars(self), "reasons": list(self.reasons)}
        return {**own, "speedup": self.speedup, "rule": self.rule}


@dataclass(frozen=True)
class _Round:
    before_ms: float
    after_ms: float
    waited: bool


def measure_pair(
    before: Call,
    after: Call,
    *,
    budget_s: float = BUDGET_S,
    rounds: tuple[int, int] = ROUNDS,
    extra_s: float = EXTRA_S,
    clock: Clock | None = None,
) -> PairTiming:
    """Time two calls in turns, without gradients, on the threads torch has now.

    With one thread CPU time counts, which interruptions do not add to, else wall time.

    Args:
        budget_s, rounds: seconds, and fewest and most rounds, of a quiet machine; an odd number is
            measured, so that one round is the median.
        extra_s: seconds of further rounds, at most as many again, in place of disturbed ones.
        clock: what to read; None: this process's clocks.
    """
    clock = clock or Clock()
    threads = torch.get_num_threads()
    done: list[_Round] = []
    with torch.no_grad():
        before(), after()  # first touches: memory, oneDNN's primitive cache
        start = clock.wall()
        before(), after()
        lap = max(clock.wall() - start, 1e-6)
        wanted = max(rounds[0], min(rounds[1], int(budget_s / lap)))
        wanted += 1 - wanted % 2
        repeats = max(1, min(25, int(2e-3 / lap)))
        readings = [clock.look(threads)]
        extra_from = 0.0
        while True:
            done.append(_one_round(before, after, repeats, len(done) % 2 == 1, threads, clock))
            readings.append(clock.look(threads))
            if len(done) == wanted:
                extra_from = clock.wall()
            if len(done) < wanted:
                continue
            found = [_reasons(readings, index, one.waited) for index, one in enumerate(done)]
            missing = wanted - sum(not why for why in found)
            spent = clock.wall() - extra_from
            if missing <= 0 or len(done) >= 2 * wanted or spent >= extra_s:
                return _summary(done, found)


def _one_round(
    before: Call, after: Call, repeats: int, swapped: bool, threads: int, clock: Clock
) -> _Round:
    sides = [before, after]
    ms, late = [0.0, 0.0], False
    for side in (1, 0) if swapped else (0, 1):
        wall, cpu = clock.wall(), clock.cpu()
        for _ in range(repeats):
            sides[side]()
        cpu, wall = clock.cpu() - cpu, clock.wall() - wall
        late |= threads == 1 and waited(wall, cpu)
        ms[side] = (cpu if threads == 1 else wall) * 1e3 / repeats
    return _Round(ms[0], ms[1], late)


def _reasons(readings: Sequence[Reading], index: int, late: bool) -> tuple[str, ...]:
    """Kinds of disturbance of round ``index``, which lies between two readings."""
    quiet = min(reading.wall.median for reading in readings)
    beside = readings[index : index + 2]
    found = []
    if max(reading.wall.median for reading in beside) > (1 + DRIFT_LIMIT) * quiet:
        found.append("a fixed dense kernel beside them was slower than at its best")
    if late or any(reading.contended_share > CONTENDED_LIMIT for reading in beside):
        found.append("samples waited for a core")
    return tuple(found)


def _summary(done: Sequence[_Round], found: Sequence[tuple[str, ...]]) -> PairTiming:
    reasons = tuple(dict.fromkeys(reason for why in found for reason in why))
    quiet = [one for one, why in zip(done, found, strict=True) if not why]
    if len(quiet) < max(ENOUGH, ENOUGH_SHARE * len(done)):
        pair = _pair(done)
        best = min(one.before_ms for one in done), min(one.after_ms for one in done)
        q1, q3 = pair.ratios.q1, pair.ratios.q3
        return PairTiming(*best, q1, q3, len(done), 0, True, reasons)
    pair = _pair(quiet)
    left_out = len(done) - len(quiet)
    return PairTiming(
        pair.slow_ms, pair.fast_ms, pair.ratios.q1, pair.ratios.q3, len(quiet), left_out, False,
        reasons,
    )  # fmt: skip


def _pair(rounds: Sequence[_Round]) -> Pair:
    return median_pair([one.before_ms for one in rounds], [one.after_ms for one in rounds])
