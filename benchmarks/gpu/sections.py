"""What ``run.py`` runs: named sections, and what they get to work with.

A module adds a section with ``@section("name", seconds)`` and is listed in ``run.MODULES``. A
section is a function of a :class:`Context` that returns plain values for JSON. It raises if a
result is wrong; what it must not do is skip in silence.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["SECTIONS", "Context", "Section", "check", "section"]

_FLUSH_BYTES = 256 << 20  # larger than any L2 cache
_TARGET_SECONDS = 0.4  # of samples per number


@dataclass
class Context:
    """Where and how large.

    Attributes:
        device: the CUDA device; the CPU in a rehearsal.
        rehearsal: tiny shapes on the CPU, kernels in Triton's interpreter: no times.
        notes: lines for the reader of the results.
        deadline: ``time.monotonic()`` by which the section should have returned.
        saver: keeps intermediate results, should the section be stopped or crash.
    """

    device: torch.device
    rehearsal: bool = False
    notes: list[str] = field(default_factory=list)
    deadline: float = math.inf
    saver: Callable[[Any], None] | None = None

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def save(self, result: Any) -> None:
        """Keep what was found so far."""
        if self.saver is not None:
            self.saver(result)

    def time(self, run: Callable[[], Any], *, cold: bool = False) -> dict[str, float] | None:
        """Device milliseconds of ``run``: median, quartiles and count, after a warm-up.

        cold: write over the L2 cache before every sample. None in a rehearsal, where it runs once.
        """
        run()
        if self.rehearsal:
            return None
        torch.cuda.synchronize()
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device) if cold else None
        samples: list[float] = []
        begin = time.perf_counter()
        while len(samples) < 5 or (
            len(samples) < 200 and time.perf_counter() - begin < _TARGET_SECONDS
        ):
            if flush is not None:
                flush.zero_()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            samples.append(first.elapsed_time(last))
        return _summary(samples)

    def wall(self, run: Callable[[], Any], repeats: int = 7) -> dict[str, float] | None:
        """Host milliseconds until ``run`` and all it launched have finished."""
        run()
        if self.rehearsal:
            return None
        samples = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            samples.append(1e3 * (time.perf_counter() - begin))
        return _summary(samples)


def _summary(samples: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(samples, n=4)
    return {
        "ms": statistics.median(samples),
        "ms_q1": quarters[0],
        "ms_q3": quarters[2],
        "samples": len(samples),
    }


@dataclass(frozen=True)
class Section:
    """A named part of the run; ``seconds`` is the most it may take."""

    name: str
    seconds: float
    run: Callable[[Context], Any]


SECTIONS: dict[str, Section] = {}


def section(
    name: str, seconds: float
) -> Callable[[Callable[[Context], Any]], Callable[[Context], Any]]:
    """Register a function as a section; sections run in the order of registration."""

    def register(run: Callable[[Context], Any]) -> Callable[[Context], Any]:
        if name in SECTIONS:
            raise ValueError(f"two sections are called {name!r}; rename one of them")
        SECTIONS[name] = Section(name, seconds, run)
        return run

    return register


def check(condition: bool, message: str) -> None:
    """Fail the section with what was found; kept under ``python -O``."""
    if not condition:
        raise RuntimeError(message)
