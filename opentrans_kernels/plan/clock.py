"""Short interleaved timings, for choosing between forms of one layer or network."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

BUDGET_S = 0.15
ROUNDS = (3, 9)
HOPELESS = 1.6  # a form this many times slower than the best, three times, is timed no more


def interleaved_ms(
    calls: Mapping[str, Callable[[], object]],
    budget_s: float = BUDGET_S,
    rounds: tuple[int, int] = ROUNDS,
) -> dict[str, list[float]]:
    """Milliseconds per call of each callable, one entry per round, round robin.

    With one thread CPU time is read, which does not count interruptions by other processes; with
    more threads wall time. Very short calls are repeated within a round.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    first: dict[str, float] = {}
    with torch.no_grad():
        for name, call in calls.items():
            call()  # first touches: memory, oneDNN's primitive cache
            first[name] = _time(call, clock, 1)
        best = min(first.values())
        # One disturbed call must not rule a form out.
        for name in (n for n in calls if first[n] > HOPELESS * best):
            first[name] = min(first[name], *(_time(calls[name], clock, 1) for _ in range(2)))
        running = {n: c for n, c in calls.items() if first[n] <= HOPELESS * best or best < 2e-4}
        samples = {n: [first[n] * 1e3] for n in calls if n not in running}
        repeats = {n: max(1, min(50, int(2e-3 / max(first[n], 1e-6)))) for n in running}
        lap = sum(first[n] * repeats[n] for n in running)
        count = max(rounds[0], min(rounds[1], int(budget_s / max(lap, 1e-6))))
        samples |= {n: [] for n in running}
        _rounds(running, samples, clock, repeats, count)
        # Its calls lay side by side, so one disturbance may have met them all: it is asked again
        # now, and measured in turns after all if it is not that slow.
        best_ms = min(min(samples[n]) for n in running)
        again = {}
        for name in (n for n in calls if n not in running):
            samples[name].append(_time(calls[name], clock, 1) * 1e3)
            if samples[name][-1] <= HOPELESS * best_ms:
                again[name] = calls[name]
        if again:
            _rounds(again, samples, clock, dict.fromkeys(again, 1), count)
    return samples


def _rounds(
    calls: Mapping[str, Callable[[], object]],
    samples: Mapping[str, list[float]],
    clock: Callable[[], float],
    repeats: Mapping[str, int],
    count: int,
) -> None:
    """Add ``count`` samples of each, in an order that rotates from round to round."""
    for index in range(count):
        order = list(calls)
        shift = index % len(order)
        for name in order[shift:] + order[:shift]:
            samples[name].append(_time(calls[name], clock, repeats[name]) * 1e3)


def _time(call: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def undisturbed(samples: Mapping[str, list[float]]) -> dict[str, float]:
    """Name -> smallest sample.

    Whatever disturbs a call only adds to it. Two threads that wake up on one core make half of all
    calls four times slower for a while: a median then chooses by luck, a minimum does not.
    """
    return {name: min(values) for name, values in samples.items()}
