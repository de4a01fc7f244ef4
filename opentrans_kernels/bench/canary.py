"""The canary of a whole run, see :mod:`..timing.canary`, and ceilings measured beside it.

The rate of its fixed kernel doubles as a measured ceiling of multiply-adds, and a copy that fits no
cache is one of memory traffic.
"""

from __future__ import annotations

import time

import torch

from ..timing.canary import Reading, look, verdict

__all__ = ["Reading", "ceilings", "copy_gbs", "look", "verdict"]

_COPY_BYTES = 2**27


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
