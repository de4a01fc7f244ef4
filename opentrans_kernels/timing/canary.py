"""The canary: one fixed dense kernel, timed before and after a run, tells a disturbed machine.

A product of two float32 matrices that stay in a second-level cache needs the same time whenever the
core is free and its clock stands still. If it took longer after the run than before, or more wall
than CPU time, somebody else used the machine, and the run is marked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .spread import Spread

#: Medians before and after may differ by this share of the smaller one.
DRIFT_LIMIT = 0.07
#: Share of samples that may have been interrupted.
CONTENDED_LIMIT = 0.2
#: A single-threaded sample whose wall time exceeds its CPU time by this factor was interrupted.
CONTENTION_FACTOR = 1.05
_SIZE = 192  # three float32 matrices of 144 KB


def waited(wall: float, cpu: float) -> bool:
    """Whether a sample of one thread waited for a core; both times in the same unit."""
    return wall > CONTENTION_FACTOR * cpu


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
        disturbed = sum(map(waited, walls, cpus))
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
