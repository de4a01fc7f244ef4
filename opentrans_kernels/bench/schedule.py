"""``opentrans bench schedule``: what N cores would make of the trunk, from units timed on one.

The kernels cut their work into units as for N threads; every unit then runs on this thread alone
and is timed (``csrc/torch/record.cpp``). From these times follow the static split, one range of
units per core as torch cuts it, and dealing, where a core that is done takes the next unit. Regions
follow each other with a barrier between them; what lies outside of regions runs on one core.

Left out: caches and memory bandwidth that cores share, clocks that fall when many cores work. What
PyTorch's own operators do outside of regions counts as serial, though it has threads of its own.
"""

from __future__ import annotations

import copy
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import native
from ..accelerate import accelerate
from ..errors import OpenTransError
from .stages import WHOLE, stage_inputs
from .subject import Subject
from .timing import available_cpus

__all__ = ["KERNELS", "SCHEDULES", "Region", "makespan", "measure_schedule", "read_regions"]

#: How regions are run: as the kernels do, all by ranges, all dealt.
SCHEDULES = KERNELS, STATIC, DEALT = "as built", "static", "dealt"
#: Seconds that taking a unit from the shared counter costs, an atomic addition on a contended line.
TAKE_S = 1e-7
#: Of a barrier where none can be measured, and more than one takes on CPUs that are free: then
#: threads waited for a CPU, not for each other.
ASSUMED_BARRIER_S, LARGEST_BARRIER_S = 5e-6, 1e-4
_REPEATS = 1000


@dataclass(frozen=True)
class Region:
    """One parallel region: seconds of every unit, or of every core's range of them."""

    dealt: bool
    units: int
    seconds: tuple[float, ...]


def read_regions(words: Sequence[float]) -> list[Region]:
    """Regions from the record of the extension: dealt, units, number of times, times; repeated."""
    found, at = [], 0
    while at < len(words):
        count = int(words[at + 2])
        times = tuple(words[at + 3 : at + 3 + count])
        found.append(Region(bool(words[at]), int(words[at + 1]), times))
        at += 3 + count
    return found


def makespan(seconds: Sequence[float], cores: int, take_s: float = 0.0) -> float:
    """Seconds until the last core is done, if a core that is free takes the next unit."""
    free = [0.0] * min(cores, len(seconds))
    for one in seconds:
        heapq.heapreplace(free, free[0] + one + take_s)
    return max(free, default=0.0)


@dataclass(frozen=True)
class _Call:
    """One recorded call: seconds outside of regions, and the regions."""

    serial: float
    regions: list[Region]

    @property
    def total(self) -> float:
        return self.serial + sum(sum(region.seconds) for region in self.regions)


@dataclass
class _Part:
    """The fastest call of every kind over all rounds: what disturbs a call only adds to it."""

    name: str
    one_thread: float = float("inf")
    ranges: dict[int, _Call] = field(default_factory=dict)  # by number of cores
    units: dict[int, _Call] = field(default_factory=dict)

    def add(self, cores: int, by_unit: bool, call: _Call) -> None:
        """One more call, recorded by ranges or by units."""
        kept = self.units if by_unit else self.ranges
        kept[cores] = min(call, kept.get(cores, call), key=lambda one: one.total)

    def seconds(self, schedule: str, cores: int, barrier_s: float) -> float:
        """Simulated seconds on ``cores`` cores."""
        pairs = zip(self.ranges[cores].regions, self.units[cores].regions, strict=True)
        total = self.ranges[cores].serial
        for ranges, units in pairs:
            total += barrier_s
            dealt = schedule == DEALT or (schedule == KERNELS and units.dealt)
            total += makespan(units.seconds, cores, TAKE_S) if dealt else max(ranges.seconds)
        return total

    def row(self, cores: int, barrier_s: float) -> dict[str, Any]:
        """Plain values, in milliseconds."""
        units = self.units[cores].regions
        short = [region for region in units if region.units < cores]
        made = {name: self.seconds(name, cores, barrier_s) for name in SCHEDULES}
        return {
            "cores": cores,
            "regions": len(units),
            "regions_with_too_few_units": len(short),
            "serial_ms": self.ranges[cores].serial * 1e3,
            "ms": {name: value * 1e3 for name, value in made.items()},
            "efficiency": {n: self.one_thread / (cores * value) for n, value in made.items()},
        }


def measure_schedule(
    subject: Subject,
    size: tuple[int, int],
    cores: Sequence[int],
    *,
    cost: tuple[float, str] | None = None,
    batch: int = 1,
    rounds: int = 5,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time the units of the accelerated trunk on one thread and simulate each number of cores.

    Args:
        size: (height, width) in pixels. cores: numbers of cores, each at least 1.
        cost: of a barrier, see :func:`barrier`; None: measure it now.
        rounds: calls of every kind, of which the fastest counts.

    Returns:
        ``barrier_us``, ``barrier``: how it was found, and ``parts``: stem, stages and "the whole",
        each with ``one_thread_ms`` and a row per number of cores.

    Raises:
        OpenTransError: bad numbers, no compiled kernels, or a model that cannot be accelerated.
    """
    if rounds < 1 or not cores or min(cores) < 1:
        raise OpenTransError(
            f"cores={list(cores)} and rounds={rounds} must all be at least 1. Correct the option."
        )
    native.require("recording units of work")
    tell("accelerating")
    tower = copy.deepcopy(subject.model)
    accelerate(tower, subject.masks, input_size=size, threads=1, batch=batch)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, *size, generator=generator)
    barrier_s, how = cost or barrier()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parts = list(stage_inputs(tower, x))
        measured = [_Part(name) for name, _, _ in parts]
        for index in range(rounds):
            tell(f"round {index + 1} of {rounds}")
            for part, (_, modules, given) in zip(measured, parts, strict=True):
                part.one_thread = min(part.one_thread, _timed(modules, given))
                for count in dict.fromkeys(cores):
                    for by_unit in (False, True):
                        part.add(count, by_unit, _recorded(modules, given, count, by_unit))
    finally:
        torch.set_num_threads(before)
    rows = [
        {
            "part": part.name,
            "one_thread_ms": part.one_thread * 1e3,
            "rows": [part.row(count, barrier_s) for count in dict.fromkeys(cores)],
        }
        for part in measured
    ]
    return {
        "barrier_us": barrier_s * 1e6,
        "barrier": how,
        "rounds": rounds,
        "parts": [*rows, _whole(rows)],
    }


def barrier() -> tuple[float, str]:
    """Seconds of an empty parallel region on the CPUs of this process, and how that was found.

    Raises:
        KernelUnavailable, BuildMismatch: no compiled kernels.
    """
    native.require("timing a parallel region")
    cpus = available_cpus()
    count = len(cpus) if cpus is not None else torch.get_num_threads()
    if count < 2:
        return ASSUMED_BARRIER_S, "assumed: this process may use one CPU"
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        found = float(torch.ops.opentrans_kernels.empty_region_seconds(_REPEATS))
    finally:
        torch.set_num_threads(before)
    if found > LARGEST_BARRIER_S:
        why = f"assumed: {found * 1e6:.0f} us were measured, so {count} CPUs were not free at once"
        return ASSUMED_BARRIER_S, why
    return found, f"smallest of {_REPEATS} empty regions on {count} threads"


def _timed(modules: Sequence[nn.Module], x: torch.Tensor) -> float:
    """Seconds of processor time of this thread, to which interruptions do not add."""
    with torch.no_grad():
        start = time.thread_time()
        for module in modules:
            x = module(x)
        return time.thread_time() - start


def _recorded(modules: Sequence[nn.Module], x: torch.Tensor, cores: int, by_unit: bool) -> _Call:
    record = torch.ops.opentrans_kernels
    record.record_units(cores, by_unit)
    try:
        spent = _timed(modules, x)
        regions = read_regions(record.recorded_units(torch.empty(0)).tolist())
    finally:
        record.record_units(0, False)
    inside = sum(sum(region.seconds) for region in regions)
    return _Call(max(0.0, spent - inside), regions)


def _whole(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts one after the other."""
    one = sum(part["one_thread_ms"] for part in rows)
    found = []
    for same in zip(*(part["rows"] for part in rows), strict=True):
        cores = same[0]["cores"]
        ms = {name: sum(row["ms"][name] for row in same) for name in SCHEDULES}
        sums = ("regions", "regions_with_too_few_units", "serial_ms")
        found.append(
            {
                "cores": cores,
                **{key: sum(row[key] for row in same) for key in sums},
                "ms": ms,
                "efficiency": {name: one / (cores * value) for name, value in ms.items()},
            }
        )
    return {"part": WHOLE, "one_thread_ms": one, "rows": found}
