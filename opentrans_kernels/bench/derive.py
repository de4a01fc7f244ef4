"""What follows from measured rows by arithmetic: crossovers, roofline points, rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .timing import median_pair

#: Bytes of one packed nonzero: a float32 value and a 16-bit code (docs/formats.md).
BYTES_PER_NONZERO = 6


@dataclass(frozen=True)
class Crossover:
    """Where sparse starts to win on one shape.

    ``density`` is None if the curve never crosses 1 between the measured densities; ``verdict``
    says so in words.
    """

    case: str
    kind: str
    backend: str
    batch: int
    density: float | None
    verdict: str


@dataclass(frozen=True)
class Beside:
    """Two times and their ratio that may be printed side by side: they agree.

    measured: both are of one round, or of medians that agree with the ratio; False: the result kept
    no rounds, and ``slow_ms`` is what the ratio makes of ``fast_ms``.
    """

    slow_ms: float
    fast_ms: float
    ratio: Mapping[str, float]
    measured: bool

    def slow(self, digits: int = 1) -> str:
        """``slow_ms`` as text; ``~104`` if it was not measured."""
        if self.measured:
            return f"{self.slow_ms:.{digits}f}"
        return f"~{self.slow_ms:.{0 if self.slow_ms > 100 else digits}f}"


@dataclass(frozen=True)
class RooflinePoint:
    """One layer: ``intensity`` in FLOPs of nonzeros per byte moved at least once, ``gflops`` as
    measured, ``limit_gflops`` what the two ceilings allow at that intensity."""

    name: str
    intensity: float
    gflops: float
    limit_gflops: float
    bound: str

    @property
    def share(self) -> float:
        """Measured rate over the limit."""
        return self.gflops / self.limit_gflops


def median_round(row: Mapping[str, Any], dense: Mapping[str, Any]) -> tuple[float, float]:
    """(baseline ms, ms) of the round whose ratio is the speed-up of a whole model's row.

    dense: the baseline's row. Files from before have CPU times, some without the baseline's.
    """
    if (found := row.get("median_round")) is not None:
        return found["baseline_ms"], found["ms"]
    return row.get("baseline_cpu_ms", dense["cpu_ms"]), row["cpu_ms"]


def crossovers(rows: Iterable[Mapping[str, Any]]) -> list[Crossover]:
    """Crossover density of every (shape, backend, batch), interpolated in log density and log
    speed-up between the measured points; the highest crossing counts. Inexact rows are left out.
    """
    curves: dict[tuple[str, str, str, int], list[tuple[float, float]]] = {}
    for row in rows:
        if row["op"] != "sparse_conv2d" or row["speedup"] is None or row["density"] <= 0:
            continue
        key = (row["case"], row["kind"], row["backend"], row["batch"])
        curves.setdefault(key, []).append((row["density"], row["speedup"]["median"]))
    return [_crossover(*key, sorted(points)) for key, points in curves.items()]


def _crossover(
    case: str, kind: str, backend: str, batch: int, points: list[tuple[float, float]]
) -> Crossover:
    lowest, highest = points[0], points[-1]
    for (d1, s1), (d2, s2) in zip(reversed(points[:-1]), reversed(points[1:]), strict=True):
        if s1 >= 1 > s2:
            share = math.log(s1) / (math.log(s1) - math.log(s2))
            at = math.exp(math.log(d1) + share * (math.log(d2) - math.log(d1)))
            return Crossover(case, kind, backend, batch, at, f"sparse wins below {at:.2f}")
    if highest[1] >= 1:
        verdict = f"sparse wins up to {highest[0]:.2g}, the densest measured"
    else:
        verdict = f"dense wins from {lowest[0]:.2g}, the sparsest measured"
    return Crossover(case, kind, backend, batch, None, verdict)


def beside(slow: Mapping[str, Any], fast: Mapping[str, Any], ratio: Mapping[str, float]) -> Beside:
    """Times of two sides of a result that belong to ``ratio``, the median over rounds.

    Args:
        slow, fast: entries with ``ms``, and ``wall_samples_ms`` where the rounds were kept.
    """
    samples = [side.get("wall_samples_ms", ()) for side in (slow, fast)]
    if samples[0] and len(samples[0]) == len(samples[1]):
        pair = median_pair(*samples)
        if _agree(pair.ratios.median, ratio["median"]):
            return Beside(pair.slow_ms, pair.fast_ms, ratio, True)
    return agreeing(slow["ms"], fast["ms"], ratio)


def agreeing(slow_ms: float, fast_ms: float, ratio: Mapping[str, float]) -> Beside:
    """:func:`beside` for a result that kept no rounds."""
    if _agree(slow_ms / fast_ms, ratio["median"]):
        return Beside(slow_ms, fast_ms, ratio, True)
    return Beside(fast_ms * ratio["median"], fast_ms, ratio, False)


def _agree(one: float, other: float) -> bool:
    """Equal when printed with two decimals."""
    return f"{one:.2f}" == f"{other:.2f}"


def layer_bytes(row: Mapping[str, Any], batch: int = 1) -> int:
    """Bytes a layer must move at least: input, output (float32) and packed nonzeros, once each."""
    inside = row["cin"] * row["h_out"] * row["w_out"] * row["stride"] ** 2
    outside = row["cout"] * row["h_out"] * row["w_out"]
    return 4 * batch * (inside + outside) + BYTES_PER_NONZERO * row["nnz"]


def roofline(
    rows: Iterable[Mapping[str, Any]], ceilings: Mapping[str, float], batch: int = 1
) -> list[RooflinePoint]:
    """One point per layer row of a trunk result (``nnz``, shape, ``sparse_ms``)."""
    points = []
    for row in rows:
        flops = 2 * row["nnz"] * row["h_out"] * row["w_out"] * batch
        if not flops:
            continue
        intensity = flops / layer_bytes(row, batch)
        memory = intensity * ceilings["copy_gbs"]
        compute = ceilings["dense_gflops"]
        points.append(
            RooflinePoint(
                row["name"],
                intensity,
                flops / row["sparse_ms"] / 1e6,
                min(memory, compute),
                "memory" if memory < compute else "multiply-adds",
            )
        )
    return points


def kind_of_layer(cin: int, cout: int, kernel: int) -> str:
    """ "3x3", "1x1 expand" (more outputs than inputs), "1x1 reduce" or "1x1 same"."""
    if kernel > 1:
        return f"{kernel}x{kernel}"
    return "1x1 expand" if cout > cin else "1x1 reduce" if cout < cin else "1x1 same"


def trunk_work(result: Mapping[str, Any]) -> dict[str, int] | None:
    """Multiply-adds of a trunk result per image: nominal, effective, executed; None if unknown."""
    totals = ((result.get("report") or {}).get("plan") or {}).get("totals")
    if not totals:
        return None
    return {name: int(totals[f"{name}_macs"]) for name in ("nominal", "effective", "executed")}


def timed_variants(result: Mapping[str, Any]) -> list[str]:
    """The dense variants a trunk result timed; the fastest of them is its baseline."""
    return [name for name, entry in result["variants"].items() if "ms" in entry]
