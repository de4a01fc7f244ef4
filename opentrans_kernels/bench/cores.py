"""Do two CPUs of this machine share one physical core at this moment?

A virtual machine may place two of its CPUs on the two hyperthreads of one core. No flag tells the
guest, so the test is behaviour: two pinned loops of small matrix products (fused multiply-adds on
cached data) are timed alone and together. Separate cores keep their rates; a shared core halves
them. Only then can a two-thread speed-up be judged.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import OpenTransError

#: Rates together / alone at or above this are two physical cores, at or below the other one core.
SEPARATE_ABOVE = 0.85
SHARED_BELOW = 0.70
_SIZE = 96  # three float32 matrices of this size stay in a 256 KB second-level cache


@dataclass(frozen=True)
class CoreCheck:
    """Rates in GFLOP/s of two pinned loops, alone and together (medians over the repeats)."""

    cpus: tuple[int, int]
    alone_gflops: tuple[float, float]
    together_gflops: tuple[float, float]
    rate_ratio: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        alone = ", ".join(f"{rate:.1f}" for rate in self.alone_gflops)
        together = ", ".join(f"{rate:.1f}" for rate in self.together_gflops)
        return (
            f"CPUs {self.cpus[0]} and {self.cpus[1]}: alone {alone} GFLOP/s, together {together} "
            f"GFLOP/s, ratio {self.rate_ratio:.2f}: {self.verdict}"
        )


def judge(ratio: float) -> str:
    """Words for a rate ratio (sum together / sum alone)."""
    if ratio >= SEPARATE_ABOVE:
        return "two physical cores"
    if ratio <= SHARED_BELOW:
        return "one shared core (or another tenant holds half of it)"
    return "unclear"


def physical_core_check(
    cpus: Sequence[int], *, seconds: float = 0.3, repeats: int = 3
) -> CoreCheck:
    """Time two pinned multiply-add loops alone and together.

    Args:
        cpus: exactly two CPU numbers this process may use.
        seconds: length of one timed stretch.
        repeats: stretches of each kind; medians are compared.

    Raises:
        OpenTransError: not two CPUs, a CPU that is not available, or a worker that died.
    """
    pair = tuple(cpus)
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    if len(set(pair)) != 2:
        raise OpenTransError(
            f"physical_core_check compares exactly two different CPUs, got {list(pair)}."
            " Pass two CPU numbers, for instance [0, 1]."
        )
    if allowed is None or not set(pair) <= set(allowed):
        raise OpenTransError(
            f"physical_core_check needs CPUs {list(pair)}, but this process may use {allowed}. "
            "Choose two of those (systems without CPU affinity cannot run this check)."
        )
    workers = [_Worker(cpu) for cpu in pair]
    try:
        for worker in workers:
            worker.measure(0.1)
        alone: list[list[float]] = [[], []]
        together: list[list[float]] = [[], []]
        for _ in range(repeats):
            for index, worker in enumerate(workers):
                alone[index].append(worker.measure(seconds))
            start_at = time.monotonic() + 0.02
            for worker in workers:
                worker.start(seconds, start_at)
            for index, worker in enumerate(workers):
                together[index].append(worker.result())
    finally:
        for worker in workers:
            worker.close()
    rates_alone = tuple(statistics.median(rates) for rates in alone)
    rates_together = tuple(statistics.median(rates) for rates in together)
    ratio = sum(rates_together) / sum(rates_alone)
    return CoreCheck(pair, rates_alone, rates_together, ratio, judge(ratio))


class _Worker:
    """A pinned child process that measures on request."""

    def __init__(self, cpu: int) -> None:
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        code = f"from {__name__} import worker_main; worker_main({cpu})"
        self.cpu = cpu
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
        )

    def start(self, seconds: float, start_at: float = 0.0) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{seconds} {start_at}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.result()

    def result(self) -> float:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            raise OpenTransError(
                f"the core check's worker on CPU {self.cpu} ended early: "
                f"{self.process.stderr.read().strip() or 'no message'}. "
                "Run 'opentrans info' in the same environment to see whether torch imports."
            )
        return float(line)

    def measure(self, seconds: float) -> float:
        self.start(seconds)
        return self.result()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        assert self.process.stderr is not None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            try:
                stream.close()
            except BrokenPipeError:
                continue  # the worker died with a request still buffered; its pipe is gone


def worker_main(cpu: int) -> None:
    """Body of a worker: per line "seconds start_at" on stdin, one rate in GFLOP/s on stdout."""
    os.sched_setaffinity(0, [cpu])
    import torch

    torch.set_num_threads(1)
    a = torch.rand(_SIZE, _SIZE)
    b = torch.rand(_SIZE, _SIZE)
    out = torch.empty(_SIZE, _SIZE)
    for line in sys.stdin:
        seconds, start_at = (float(part) for part in line.split())
        while time.monotonic() < start_at:
            continue  # spin: a sleeping core would start at a lower clock
        calls = 0
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            for _ in range(20):
                torch.mm(a, b, out=out)
            calls += 20
        sys.stdout.write(f"{2 * _SIZE**3 * calls / elapsed / 1e9}\n")
        sys.stdout.flush()
