"""Which solver takes which matrices, and in which order they are launched.

Large matrices go first, each with a stream, a handle and a host thread of its own, because
``Xsyevd`` works on the host between its kernels. Batches of small ones fill the rest of the device.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from ...errors import OpenTransError
from . import cusolver

__all__ = ["BATCHED_UP_TO", "SOLVERS", "Solved", "method", "solve"]

#: The largest order that ``XsyevBatched`` takes under solver="cusolver".
BATCHED_UP_TO = 512
_STREAMS = 8  # Xsyevd side by side

#: Name -> what it does.
SOLVERS = {
    "cusolver": f"XsyevBatched up to n = {BATCHED_UP_TO}, Xsyevd on streams above",
    "xsyev_batched": "XsyevBatched for every order",
    "xsyevd": "Xsyevd for every matrix, on streams",
    "sturm": "own Householder tridiagonalisation and Sturm bisection in Triton",
}


def method(n: int, solver: str) -> str:
    """The routine that solves matrices of order ``n``: xsyev_batched, xsyevd or sturm.

    Raises:
        OpenTransError: unknown solver.
    """
    if solver not in SOLVERS:
        raise OpenTransError(
            f"solver={solver!r} is not known on CUDA. Use one of {', '.join(SOLVERS)}."
        )
    if solver == "cusolver":
        return "xsyev_batched" if n <= BATCHED_UP_TO else "xsyevd"
    return solver


@dataclass
class Solved:
    """Eigenvalues by order, and what must live until the device has finished.

    Attributes:
        values: n -> float64 [B, n], ascending.
        info: n -> int32 [B], 0 where the solver converged.
        keep: workspaces, some of them in host memory that the device may still use. Drop them
            after a copy to the host has synchronised.
    """

    values: dict[int, torch.Tensor] = field(default_factory=dict)
    info: dict[int, torch.Tensor] = field(default_factory=dict)
    keep: list[torch.Tensor] = field(default_factory=list)


class _Lane:
    """A cuSOLVER handle with the stream it works on; on a CPU device without a stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self.active():
            self.handle = cusolver.Handle(cusolver.load())
            if self.stream is not None:
                self.handle.set_stream(self.stream.cuda_stream)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        # Both are per thread, so a worker has to enter them itself.
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield


_idle: dict[torch.device, queue.SimpleQueue[_Lane]] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def _lane(device: torch.device) -> Iterator[_Lane]:
    """A lane nobody else uses; creating a handle takes longer than a small problem."""
    with _guard:
        pool = _idle.setdefault(device, queue.SimpleQueue())
    try:
        lane = pool.get_nowait()
    except queue.Empty:
        lane = _Lane(device)
    yield lane
    pool.put(lane)  # not after an error: the state of its handle is then unknown


def solve(matrices: Mapping[int, torch.Tensor], solver: str = "cusolver") -> Solved:
    """Eigenvalues of symmetric matrices of several orders.

    Args:
        matrices: n -> float64 [B, n, n], contiguous, all on one device; **overwritten**.
        solver: a key of :data:`SOLVERS`.

    Returns:
        Results ordered behind the current stream; the host does not wait for them.

    Raises:
        OpenTransError, KernelUnavailable: unknown or unavailable solver, or one that failed.
    """
    methods = {n: method(n, solver) for n in matrices}
    found = Solved()
    if not matrices:
        return found
    device = next(iter(matrices.values())).device
    for n, batch in matrices.items():
        found.values[n] = batch.new_empty(batch.shape[:2])
        found.info[n] = batch.new_zeros(batch.shape[0], dtype=torch.int32)
    with ThreadPoolExecutor(_STREAMS, thread_name_prefix="cusolver") as pool:
        running = []
        for n in sorted((n for n in matrices if methods[n] == "xsyevd"), reverse=True):
            for index in range(len(matrices[n])):
                part = slice(index, index + 1)
                some = (matrices[n][part], found.values[n][part], found.info[n][part])
                running.append(pool.submit(_on_a_lane, "one_by_one", some, _ready(some[0])))
        batched = sorted((n for n in matrices if methods[n] == "xsyev_batched"), reverse=True)
        for n in batched:
            some = (matrices[n], found.values[n], found.info[n])
            found.keep += _joined(_on_a_lane("batched", some, _ready(some[0])), device)
        own = {n: matrices[n] for n in matrices if methods[n] == "sturm"}
        if own:
            _sturm(own, found)
        for future in running:
            found.keep += _joined(future.result(), device)
    return found


_Done = tuple[list[torch.Tensor], "torch.cuda.Event | None"]


def _ready(tensor: torch.Tensor) -> torch.cuda.Event | None:
    """An event behind everything launched so far on the current stream."""
    if tensor.device.type != "cuda":
        return None
    return torch.cuda.current_stream(tensor.device).record_event()


def _on_a_lane(
    routine: str, some: tuple[torch.Tensor, ...], ready: torch.cuda.Event | None
) -> _Done:
    with _lane(some[0].device) as lane, lane.active():
        if lane.stream is None or ready is None:
            return getattr(lane.handle, routine)(*some), None
        lane.stream.wait_event(ready)
        keep = getattr(lane.handle, routine)(*some)
        return keep, lane.stream.record_event()


def _joined(done: _Done, device: torch.device) -> list[torch.Tensor]:
    """Let the current stream wait for a lane; the workspaces of its work."""
    keep, event = done
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)
    return keep


def _sturm(matrices: Mapping[int, torch.Tensor], found: Solved) -> None:
    try:
        from . import sturm, tridiagonal
    except ImportError as error:
        raise OpenTransError(
            f"solver='sturm' needs triton, which cannot be imported: {error}. Install triton, or "
            "choose solver='cusolver'."
        ) from error
    for n, values in sturm.bisect(*tridiagonal.tridiagonalise(matrices)).items():
        found.values[n] = values
