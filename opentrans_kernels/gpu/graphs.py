"""One CUDA graph per input shape, bounded in number and memory, safe across streams and threads.

A bucket is an exact shape. Padding an image up to a rounder size would change the values along its
border, because a batch norm's shift is not zero there, so it is never done here; detectron2 pads
sizes to multiples of 32 itself, which bounds how many there are.

A shape runs without a graph until it was seen ``capture_after`` times: one odd image costs no
capture. The least recently used graph goes first when there are more than ``capacity``, and all of
them when their memory exceeds ``max_bytes``. All graphs share one memory pool, so together they
need what the largest needs; for that no two may run at once and outputs are copied out before the
next replay. A lock orders host threads, an event orders streams.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .. import settings
from ..errors import KernelUnavailable, PlanError

__all__ = ["Capturer", "CudaCapturer", "GraphCache", "Stats"]

_log = logging.getLogger(__name__)
Forward = Callable[[torch.Tensor], list[torch.Tensor]]


class Capturer(Protocol):
    """What :class:`GraphCache` needs from the device; replaced in tests."""

    def capture(
        self, run: Callable[[], list[torch.Tensor]]
    ) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """Record ``run``; returns (replay, the tensors every replay writes)."""

    def begin(self) -> None:
        """Order the current stream behind everything an earlier call left running."""

    def end(self) -> None:
        """Note how far the current stream has come."""

    def wait(self) -> None:
        """Let the host wait for the replay that :meth:`end` noted last."""

    def reset(self) -> None:
        """Give the memory of all graphs back."""

    def bytes(self) -> int:
        """Device memory that the graphs hold."""


class CudaCapturer:
    """Capture with ``torch.cuda.CUDAGraph`` on a side stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._event: torch.cuda.Event | None = None
        self._bytes = 0
        # One for all captures: cuBLAS keeps a workspace of 32 MB per stream that it has seen.
        self._stream = torch.cuda.Stream(device)

    def capture(self, run):
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # cuDNN chooses, triton compiles
                run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # torch.cuda.graph does; before it, the difference would be less
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile (a data loader's pin thread): only this one is held.
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                outputs = run()
        except BaseException:
            self._pool = None  # the allocator may take it for one still being recorded
            raise
        self._bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        return graph.replay, outputs

    def begin(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream(self.device).wait_event(self._event)

    def end(self) -> None:
        if self._event is None:
            self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def reset(self) -> None:
        self._pool, self._bytes = None, 0
        torch.cuda.empty_cache()

    def bytes(self) -> int:
        return self._bytes


@dataclass
class Stats:
    """Counts since the start: replays, captures, runs without a graph, graphs given up."""

    replays: int = 0
    captures: int = 0
    eager: int = 0
    evicted: int = 0
    failed: dict[tuple[int, ...], str] = field(default_factory=dict)


@dataclass
class _Entry:
    given: torch.Tensor
    replay: Callable[[], None]
    outputs: list[torch.Tensor]


class GraphCache:
    """Calls ``forward`` for any shape, through a CUDA graph where the shape is known.

    Args:
        forward: list of outputs of one channels_last input; uses nothing else that changes.
        like: an empty tensor with the dtype and device that ``forward`` takes.
        capacity: graphs kept. max_bytes: of all graphs together.
        capture_after: calls of a shape before it is captured.
        capturer: None: never capture (the CPU).
    """

    def __init__(
        self,
        forward: Forward,
        like: torch.Tensor,
        *,
        capacity: int = 16,
        max_bytes: int = 8 << 30,
        capture_after: int = 2,
        capturer: Capturer | None = None,
    ) -> None:
        if capacity < 1 or capture_after < 1 or max_bytes < 1:
            raise PlanError(
                f"capacity={capacity}, capture_after={capture_after} and max_bytes={max_bytes} "
                "must be at least 1. To use no graphs, plan with graphs=False."
            )
        self.forward, self.like, self.capturer = forward, like, capturer
        self.capacity, self.max_bytes, self.capture_after = capacity, max_bytes, capture_after
        self.stats = Stats()
        self._entries: OrderedDict[tuple[int, ...], _Entry] = OrderedDict()
        self._seen: OrderedDict[tuple[int, ...], int] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes with a graph, the least recently used first."""
        return list(self._entries)

    def __call__(
        self, x: torch.Tensor, dtype: torch.dtype | None = None, copied: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Outputs for ``x``, any dtype and layout.

        dtype: of the outputs; None: as computed. copied: outputs to copy out of the graph's
        memory; None: all. One that is not copied is overwritten by the next call.
        """
        shape = tuple(x.shape)
        with self._lock:
            entry = self._entry(shape, x)
            if entry is None or self.capturer is None:
                self.stats.eager += 1
                outputs = self.forward(self._cast(x))
                return [o if dtype is None else o.to(dtype) for o in outputs]
            self.capturer.begin()
            entry.given.copy_(x)
            entry.replay()
            self.stats.replays += 1
            found = [
                # An alias for each call: it carries that call's mark, not a later one's.
                _copy(o, dtype) if copied is None or i in copied else o.data
                for i, o in enumerate(entry.outputs)
            ]
            self.capturer.end()
            return found

    def clear(self) -> None:
        """Drop every graph and its memory."""
        with self._lock:
            self._drop_all()

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.like.device, self.like.dtype).contiguous(memory_format=torch.channels_last)

    def _entry(self, shape: tuple[int, ...], x: torch.Tensor) -> _Entry | None:
        found = self._entries.get(shape)
        if found is not None:
            self._entries.move_to_end(shape)
            return found
        if self.capturer is None or shape in self.stats.failed or 0 in shape:
            return None
        self._seen[shape] = self._seen.pop(shape, 0) + 1
        while len(self._seen) > 64 * self.capacity:  # counts of odd shapes do not pile up
            self._seen.popitem(last=False)
        if self._seen[shape] < self.capture_after:
            return None
        return self._capture(shape, x)

    def _capture(self, shape: tuple[int, ...], x: torch.Tensor) -> _Entry | None:
        assert self.capturer is not None
        if len(self._entries) >= self.capacity:
            # Another stream may still replay it, and its input returns to the stream it came from.
            self.capturer.wait()
        while len(self._entries) >= self.capacity:
            self._entries.popitem(last=False)
            self.stats.evicted += 1
            if not self._entries:
                self.capturer.reset()  # a pool without graphs is dead and cannot be used again
        try:
            self.capturer.begin()
            given = torch.empty(
                shape, dtype=self.like.dtype, device=self.like.device,
                memory_format=torch.channels_last,
            ).copy_(x)  # fmt: skip
            replay, outputs = self.capturer.capture(lambda: self.forward(given))
        except RuntimeError as error:  # out of memory, or an operator that cannot be captured
            if settings.get().strict:
                raise KernelUnavailable(
                    f"no CUDA graph for the input {list(shape)}: {error}. OPENTRANS_STRICT=1 "
                    "refuses to run without. Use a smaller batch or image, a smaller max_bytes, "
                    "or unset OPENTRANS_STRICT."
                ) from error
            why = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, torch.OutOfMemoryError):
                why = f"out of memory: {why}"
                self._drop_all()
            self.stats.failed[shape] = why
            _log.warning(
                "no CUDA graph for the input %s, it runs without: %s",
                list(shape), self.stats.failed[shape],
            )  # fmt: skip
            return None
        self.stats.captures += 1
        entry = self._entries[shape] = _Entry(given, replay, outputs)
        if self.capturer.bytes() > self.max_bytes and len(self._entries) > 1:
            # Graphs of one pool give memory back together only.
            _log.info("CUDA graphs hold %d bytes, dropping all but one", self.capturer.bytes())
            self._drop_all()
            return self._capture(shape, x)
        return entry

    def _drop_all(self) -> None:
        if self.capturer is not None and self._entries:
            self.capturer.wait()
        self.stats.evicted += len(self._entries)
        self._entries.clear()
        if self.capturer is not None:
            self.capturer.reset()


def _copy(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype or tensor.dtype, copy=True, memory_format=torch.preserve_format)
