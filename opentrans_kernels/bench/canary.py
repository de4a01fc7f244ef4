"""The canary: one fixed dense kernel, timed before and after a run, tells a disturbed machine.

A product of two float32 matrices that stay in a second-level cache needs the same time whenever the
core is free and its clock stands still. If it took longer after the run than before, or more wall
than CPU time, somebody else used the machine, and the run is marked. Its rate doubles as a measured
ceiling of multiply-adds, and a copy that fits no cache as one of memory traffic.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .timing import CONTENTION_FACTOR, Spread

#: Medians before and after may differ by this share of the smaller one.
DRIFT_LIMIT = 0.07
#: Share of samples that may have been interrupted.
CONTENDED_LIMIT = 0.2
_SIZE = 192  # three float32 matrices of 144 KB
_COPY_BYTES = 2**27


@dataclass(frozen=True)
class Reading:
    """One look at the machine. Times are milliseconds per product, over ``n`` samples."""

    wall: Spread
    cpu: Spread
    contended_share: float
    gflops: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "wall_ms": self.wall.to_dict(),
            "cpu_ms": self.cpu.to_dict(),
            "contended_share": self.contended_share,
            "gflops": self.gflops,
        }


@cache
def _matrices() -> list[torch.Tensor]:
    """Three matrices, the same ones before and after a run, at a fixed distance.

    Allocated anew, they lie differently to each other and in the second-level cache, and the same
    product takes up to 15 % longer on a machine that nobody has disturbed.
    """
    count, page, apart = _SIZE * _SIZE, 4096 // 4, 272
    room = torch.rand(3 * (count + apart) + page)
    first = -(room.data_ptr() // 4) % page
    parts = room[first : first + 3 * (count + apart)].reshape(3, -1)
    return [part[:count].view(_SIZE, _SIZE) for part in parts]


def look(*, threads: int = 1, seconds: float = 0.4) -> Reading:
    """Time the fixed kernel on as many threads as the run has.

    ``contended_share`` is only meaningful for one thread, and 0 otherwise.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b, out = _matrices()
        for _ in range(20):
            torch.mm(a, b, out=out)
        walls, cpus = [], []
        deadline = time.perf_counter() + seconds
        while len(walls) < 3 or time.perf_counter() < deadline:
            wall, cpu = time.perf_counter_ns(), time.process_time_ns()
            for _ in range(10):
                torch.mm(a, b, out=out)
            cpu, wall = time.process_time_ns() - cpu, time.perf_counter_ns() - wall
            walls.append(wall / 1e7)
            cpus.append(cpu / 1e7)
    finally:
        torch.set_num_threads(before)
    disturbed = 0
    if threads == 1:
        disturbed = sum(w > CONTENTION_FACTOR * c for w, c in zip(walls, cpus, strict=True))
    return Reading(
        Spread.of(walls), Spread.of(cpus), disturbed / len(walls), 2 * _SIZE**3 / min(walls) / 1e6
    )


def verdict(before: Reading, after: Reading, *, shares: dict[str, float] | None = None) -> dict:
    """The canary block of a result.

    Args:
        before, after: readings around the run.
        shares: side -> share of its own samples that were interrupted (one thread only).

    Returns:
        ``disturbed``, ``reasons`` (sentences), ``drift`` (slower reading over faster, minus 1) and
        both readings, as plain values.
    """
    one, two = before.wall.median, after.wall.median
    drift = max(one, two) / min(one, two) - 1
    reasons = []
    if drift > DRIFT_LIMIT:
        when = "after" if two > one else "before"
        reasons.append(
            f"the fixed dense kernel was {drift:.0%} slower {when} the run: {one:.3f} ms before, "
            f"{two:.3f} ms after"
        )
    for name, reading in (("before", before), ("after", after)):
        if reading.contended_share > CONTENDED_LIMIT:
            reasons.append(
                f"{reading.contended_share:.0%} of the fixed kernel's samples {name} the run "
                "waited for a core"
            )
    for name, share in (shares or {}).items():
        if share > CONTENDED_LIMIT:
            reasons.append(f"{share:.0%} of the samples of {name} waited for a core")
    return {
        "disturbed": bool(reasons),
        "reasons": reasons,
        "drift": drift,
        "before": before.to_dict(),
        "after": after.to_dict(),
    }


def copy_gbs(*, threads: int = 1, repeats: int = 5) -> float:
    """Best rate of a copy between two buffers of 128 MB, in GB/s read plus written."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.ones(_COPY_BYTES // 4)
        target = torch.empty_like(source)
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            target.copy_(source)
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2 * _COPY_BYTES / best / 1e9


def ceilings(before: Reading, after: Reading, threads: int) -> dict[str, float]:
    """Measured limits for a roofline: dense GFLOP/s in cache, and GB/s of a large copy."""
    return {
        "dense_gflops": max(before.gflops, after.gflops),
        "copy_gbs": copy_gbs(threads=threads),
    }
