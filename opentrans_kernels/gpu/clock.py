"""Milliseconds of one candidate on the device, launches excluded."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["CudaTimer", "Timer"]

#: (what is timed, a function that launches it once) -> milliseconds.
Timer = Callable[[str, Callable[[], Any]], float]


class CudaTimer:
    """Replays of a CUDA graph that holds the work several times, so that gaps do not count.

    Inputs are the same in every repeat, so what fits into L2 is read from there, as it is in a
    network whose layers read what the layer before has just written.
    """

    def __init__(self, device: torch.device, repeats: int = 10, samples: int = 7) -> None:
        self.device, self.repeats, self.samples = device, repeats, samples
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, name: str, run: Callable[[], Any]) -> float:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
            stream.synchronize()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            # Not torch.cuda.graph: it collects garbage and empties the cache, every time.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                try:
                    for _ in range(self.repeats):
                        run()
                finally:
                    graph.capture_end()
            except BaseException:
                # The allocator may take the pool for one still being recorded, or for a dead one.
                self._pool = self._graph = None
                raise
            # The graph before this one kept the pool: memory that a capture cannot give back (the
            # allocator frees nothing meanwhile) is used again instead of piling up.
            self._graph = graph
            found = []
            for sample in range(self.samples + 2):
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                graph.replay()
                last.record()
                last.synchronize()
                if sample >= 2:
                    found.append(first.elapsed_time(last) / self.repeats)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return statistics.median(found)
