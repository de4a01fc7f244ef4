"""Samples in few numbers: a spread, and the one round that stands for a comparison.

A ratio is the median over rounds, since whatever slows both sides of a round down cancels in it.
Medians of the two sides belong to different rounds and may contradict that ratio, so the times
told with it are those of the round it was measured in.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import OpenTransError


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a list of numbers; the unit is that of the numbers."""

    median: float
    q1: float
    q3: float
    minimum: float
    maximum: float
    n: int

    @property
    def iqr(self) -> float:
        """Interquartile range, in the unit of the numbers."""
        return self.q3 - self.q1

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread:
        """Summarise at least one number; quartiles are interpolated between samples.

        Raises:
            OpenTransError: no number was given.
        """
        ordered = sorted(float(value) for value in numbers)
        if not ordered:
            raise OpenTransError(
                "cannot summarise an empty list of timings: no round was completed. "
                "Ask for at least 1 round."
            )
        if len(ordered) == 1:
            q1 = median = q3 = ordered[0]
        else:
            q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, q1, q3, ordered[0], ordered[-1], len(ordered))

    def to_dict(self) -> dict[str, float | int]:
        """Plain numbers for JSON."""
        return {
            "median": self.median,
            "q1": self.q1,
            "q3": self.q3,
            "iqr": self.iqr,
            "min": self.minimum,
            "max": self.maximum,
            "n": self.n,
        }


@dataclass(frozen=True)
class Pair:
    """Times of two sides in one round, in milliseconds; ``ratios``: slow / fast of all rounds.

    ``slow_ms / fast_ms`` is ``ratios.median``.
    """

    slow_ms: float
    fast_ms: float
    ratios: Spread


def median_pair(slow: Sequence[float], fast: Sequence[float]) -> Pair:
    """The round whose slow / fast is the median; of an even number the lower of the middle two.

    Args:
        slow, fast: milliseconds per round, index by index from the same round; where one list is
            longer, its last rounds do not count.

    Raises:
        OpenTransError: no round was completed.
    """
    rounds = sorted((a / b, a, b) for a, b in zip(slow, fast, strict=False))
    ratios = Spread.of(ratio for ratio, _, _ in rounds)
    ratio, a, b = rounds[(len(rounds) - 1) // 2]
    # Of two rounds both quartiles, which are interpolated, lie above the lower one.
    around = {"q1": min(ratios.q1, ratio), "q3": max(ratios.q3, ratio)}
    return Pair(a, b, replace(ratios, median=ratio, **around))
