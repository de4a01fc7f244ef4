"""Interleaved timing of named callables in one process.

One clock reading says little on a machine whose clock drifts and whose cores are shared. Every
callable therefore runs in every round, in an order that rotates from round to round, and two
callables are compared by the ratio *within* a round. Wall time is what a user waits for; CPU time
(all threads of the process) beside it shows when somebody else held the core.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import OpenTransError
from ..timing.canary import waited
from ..timing.spread import Pair, Spread, median_pair


@dataclass
class Timing:
    """Samples of one callable: milliseconds per call, one entry per round."""

    name: str
    calls_per_sample: int
    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    @property
    def wall(self) -> Spread:
        """Wall milliseconds per call."""
        return Spread.of(self.wall_ms)

    @property
    def cpu(self) -> Spread:
        """CPU milliseconds per call, summed over the threads of the process."""
        return Spread.of(self.cpu_ms)

    def by(self, clock: str) -> Spread:
        """:attr:`wall` or :attr:`cpu`, by name."""
        return self.cpu if clock == "cpu" else self.wall

    def contended_share(self) -> float:
        """Share of samples with clearly more wall than CPU time (meaningful for one thread)."""
        pairs = list(zip(self.wall_ms, self.cpu_ms, strict=True))
        if not pairs:
            return 0.0
        return sum(waited(wall, cpu) for wall, cpu in pairs) / len(pairs)

    def to_dict(self) -> dict[str, Any]:
        """Summary and raw samples for JSON."""
        return {
            "ms": self.wall.median,
            "cpu_ms": self.cpu.median,
            "wall": self.wall.to_dict(),
            "cpu": self.cpu.to_dict(),
            "calls_per_sample": self.calls_per_sample,
            "contended_share": self.contended_share(),
            "wall_samples_ms": list(self.wall_ms),
        }


@dataclass
class TimingTable:
    """Timings of one interleaved run; index ``i`` of every list belongs to the same round."""

    timings: dict[str, Timing]
    rounds: int
    warmup_s: float
    interrupted: bool = False

    def __getitem__(self, name: str) -> Timing:
        return self.timings[name]

    def fastest(self, names: Iterable[str], clock: str = "wall") -> str:
        """Name with the lowest median ``"wall"`` or ``"cpu"`` time among ``names``."""
        return min(names, key=lambda name: self.timings[name].by(clock).median)

    def pair(self, slow: str, fast: str, clock: str = "wall") -> Pair:
        """The round whose ratio of ``slow`` to ``fast`` is the median, and the spread of them."""
        sides = (getattr(self.timings[name], f"{clock}_ms") for name in (slow, fast))
        return median_pair(*sides)

    def ratio(self, slow: str, fast: str, clock: str = "wall") -> Spread:
        """Speed-up of ``fast`` over ``slow``: time(slow) / time(fast) of each round, summarised."""
        return self.pair(slow, fast, clock).ratios

    def to_dict(self) -> dict[str, Any]:
        """All timings for JSON."""
        return {name: timing.to_dict() for name, timing in self.timings.items()}


def interleave(
    callables: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup_s: float = 0.5,
    settle: int = 1,
    min_sample_ms: float = 5.0,
    before: Mapping[str, Callable[[], object]] | None = None,
    on_round: Callable[[int, int], None] | None = None,
    keep_finished: bool = False,
) -> TimingTable:
    """Time callables against each other, round robin.

    Args:
        callables: name -> function without arguments. Each is warmed up on its own first.
        rounds: samples per callable.
        warmup_s: seconds of warm-up per callable (time-based: a fixed count is too short for
            small functions and too long for large ones); at least two calls.
        settle: untimed calls before each sample, so that no callable pays for the caches its
            predecessor left behind.
        min_sample_ms: calls are repeated inside one sample until it lasts about this long.
        before: name -> untimed preparation run before each turn (for instance a thread count).
        on_round: called with (finished rounds, all rounds).
        keep_finished: an interrupt (Ctrl-C) after at least one whole round ends the run there; the
            table holds the whole rounds and says ``interrupted``. Otherwise it is raised.

    Raises:
        OpenTransError: no callable, or fewer than one round.
    """
    if not callables or rounds < 1:
        raise OpenTransError(
            f"interleave needs at least one callable and one round, got {len(callables)} "
            f"callables and rounds={rounds}. Pass a non-empty mapping and rounds >= 1."
        )
    before = before or {}
    timings: dict[str, Timing] = {}
    for name, call in callables.items():
        if name in before:
            before[name]()
        per_call = _warm_up(call, warmup_s)
        repeats = max(1, round(min_sample_ms / 1e3 / max(per_call, 1e-7)))
        timings[name] = Timing(name, repeats)
    names = list(callables)
    finished = 0
    try:
        for index in range(rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                if name in before:
                    before[name]()
                _sample(callables[name], timings[name], settle)
            finished = index + 1
            if on_round is not None:
                on_round(finished, rounds)
    except KeyboardInterrupt:
        if not (keep_finished and finished):
            raise
        for timing in timings.values():
            del timing.wall_ms[finished:], timing.cpu_ms[finished:]
    return TimingTable(timings, finished, warmup_s, finished < rounds)


def _warm_up(call: Callable[[], object], seconds: float) -> float:
    """Run for ``seconds`` (at least two calls); returns the shortest call in seconds."""
    deadline = time.perf_counter() + seconds
    shortest = float("inf")
    count = 0
    while count < 2 or time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
        count += 1
    return shortest


def _sample(call: Callable[[], object], timing: Timing, settle: int) -> None:
    for _ in range(settle):
        call()
    repeats = timing.calls_per_sample
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    for _ in range(repeats):
        call()
    cpu = time.process_time_ns() - cpu
    wall = time.perf_counter_ns() - wall
    timing.wall_ms.append(wall / 1e6 / repeats)
    timing.cpu_ms.append(cpu / 1e6 / repeats)


def available_cpus() -> list[int] | None:
    """CPU numbers this process may run on, or None where the system cannot tell."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return sorted(os.sched_getaffinity(0))


def pin(cpus: Sequence[int]) -> list[int]:
    """Pin this process to ``cpus``; returns the CPUs in force. Call it before threads exist.

    Raises:
        OpenTransError: the system has no CPU affinity, or a CPU is not available.
    """
    wanted = sorted(set(cpus))
    allowed = available_cpus()
    if allowed is None:
        raise OpenTransError(
            "this system offers no CPU affinity, so the benchmark cannot be pinned to CPUs "
            f"{wanted}. Leave out --cpus; the result then records 'pinned': null."
        )
    missing = sorted(set(wanted) - set(allowed))
    if missing or not wanted:
        raise OpenTransError(
            f"cannot pin to CPUs {wanted}: {missing or 'an empty list'} not available to this "
            f"process, which may use {allowed}. Choose among those."
        )
    os.sched_setaffinity(0, wanted)
    return sorted(os.sched_getaffinity(0))


def choose_cpus(threads: int) -> list[int] | None:
    """The last ``threads`` available CPUs (CPU 0 serves most interrupts), None without affinity.

    Raises:
        OpenTransError: fewer CPUs than threads are available.
    """
    allowed = available_cpus()
    if allowed is None:
        return None
    if threads > len(allowed):
        raise OpenTransError(
            f"{threads} threads were asked for, but this process may use {len(allowed)} CPUs "
            f"({allowed}). Ask for at most {len(allowed)} threads, or widen the affinity."
        )
    return allowed[-threads:]
