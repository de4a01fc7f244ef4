"""Eigenvalues of all layers on the CPU: grouped by shape, in parallel over matrices.

float64 Gram of the smaller side and its eigenvalues: the compiled ``gram_eigenvalues``, or LAPACK's
``syevd`` where that is not loaded. Where squaring would cost digits that matter, the small ones
again from their own subspace, or singular values of the weight itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .. import dispatch, native
from ..errors import UnsupportedModelError
from ..finite import count_non_finite
from ..ops import gram_eigenvalues
from ..ops.gram_eigenvalues.reference import NOISE
from .blas import library_name, one_thread
from .gram import gram, stacked
from .layers import LayerSlices

__all__ = ["Spectrum", "eigenvalues", "not_finite"]

#: Digits that must survive: an eigenvalue at or above the threshold with a larger relative error
#: is computed from the weight itself.
RELATIVE = 1e-7
_STACK_BYTES = 8 << 20  # small matrices are solved in stacks of about this size
_LARGE_BYTES = 64 << 20  # Gram matrices from here on are worked on one at a time

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Spectrum:
    """All eigenvalues of one layer.

    Attributes:
        values: float64 [num_eigenvalues], ascending, scaled; exactly 0 where the matrix has no
            rank, never negative.
        solver: what computed them.
        precision: ``"float64"`` or ``"float32"``.
    """

    values: torch.Tensor
    solver: str
    precision: str = "float64"

    def tail(self, count: int) -> torch.Tensor:
        """The ``count`` largest values, ascending, on the device where they are to be fitted."""
        return self.values[self.values.numel() - count :]

    def known_fit(self, options: object, count: int) -> Sequence[float] | None:
        """The fit of the ``count`` largest values under ``options``, if it has been computed."""
        return None


@dataclass(frozen=True)
class _Task:
    """Matrices of one shape that are solved in one call: (layer, first, last matrix) ranges."""

    pieces: tuple[tuple[int, int, int], ...]
    small: int
    large: int
    cost: float

    @property
    def is_large(self) -> bool:
        return self.small * self.small * 8 >= _LARGE_BYTES


def eigenvalues(
    layers: Sequence[LayerSlices],
    *,
    threshold: float = 1e-5,
    precision: str = "float64",
    threads: int = 1,
    progress: Progress | None = None,
) -> list[Spectrum]:
    """The spectra of ``layers``, in their order; identical for any number of threads.

    Args:
        threshold: eigenvalues below it need not be accurate to all digits.
        precision: ``"float32"`` squares and solves in float32: absolute errors of about
            ``1e-6 * largest``.
        threads: matrices worked on at the same time.
        progress: called from this thread with (layers done, layers, name of a finished one).

    Raises:
        UnsupportedModelError: a weight holds NaN or infinity, overflows, or does not converge.
    """
    dtype = np.float32 if precision == "float32" else np.float64
    tasks = sorted(_tasks(layers), key=lambda task: -task.cost)
    found = [np.empty((layer.positions, layer.small)) for layer in layers]
    projected = [0] * len(layers)  # matrices whose small eigenvalues were computed again
    redone = [0] * len(layers)  # ... and those that took singular values
    compiled = dtype == np.float64 and _compiled()
    counting = threading.Lock()

    def run_compiled(task: _Task) -> None:
        for i, a, b in task.pieces:
            layer = layers[i]
            view = layer.matrices()[a:b].detach().cpu()
            if view.dtype != torch.float64:
                view = view.float()  # exact, and no copy of float32
            values, counts = gram_eigenvalues(view, layer.scale, threshold, RELATIVE)
            part, lost = values.numpy(), np.flatnonzero(counts.numpy() < 0)
            for row in lost:
                part[row] = _squared_singular(view[row : row + 1], layer)[0]
            if not np.isfinite(part).all():
                raise not_finite(layer.name, view)
            found[i][a:b] = part
            with counting:
                projected[i] += int((counts > 0).sum())
                redone[i] += len(lost)

    def run(task: _Task) -> None:
        views = [layers[i].matrices()[a:b] for i, a, b in task.pieces]
        scales = {layers[i].scale for i, _, _ in task.pieces}
        values = _solve(views, scales.pop(), dtype, [layers[i].name for i, _, _ in task.pieces])
        at = 0
        for (i, a, b), view in zip(task.pieces, views, strict=True):
            part = values[at : at + b - a]
            at += b - a
            if dtype == np.float64:
                again = _refine(part, view, layers[i], threshold)
                with counting:
                    redone[i] += again
            found[i][a:b] = part

    with one_thread():
        _run_all(tasks, layers, run_compiled if compiled else run, threads, progress)
    label = "syrk, eigvalsh" if dtype == np.float64 else "float32 syrk, eigvalsh"
    label = "gram_eigenvalues" if compiled else f"{library_name()}: {label}"
    spectra = []
    for layer, values, again, count in zip(layers, found, projected, redone, strict=True):
        solver = label
        if again:
            solver += f"; small ones projected for {again} of {layer.positions} matrices"
        if count:
            solver += f"; svd for {count} of {layer.positions} matrices"
        flat = np.sort(values, axis=None)
        if not count and flat.size and not (flat[-1] > threshold):
            # Everything will be kept, down to the smallest: no digits to lose.
            flat = np.sort(_singular(layer), axis=None)
            solver = f"{library_name()}: svd"
        spectra.append(Spectrum(torch.from_numpy(flat), solver, np.dtype(dtype).name))
    return spectra


def _compiled() -> bool:
    """Whether the compiled solver serves; LAPACK does where it is missing or not faster."""
    if dispatch.resolve("gram_eigenvalues", "cpu", "float64").row.backend != "cpu":
        return False
    return native.cpu_capability() != "generic"


def _tasks(layers: Sequence[LayerSlices]) -> list[_Task]:
    groups: dict[tuple[int, int, float], list[tuple[int, int, int]]] = {}
    for i, layer in enumerate(layers):
        key = (layer.small, layer.large, layer.scale)
        groups.setdefault(key, []).extend((i, k, k + 1) for k in range(layer.positions))
    tasks = []
    for (small, large, _), matrices in groups.items():
        cost = small * small * (large + 2.0 * small) + 1e4
        per_task = max(1, _STACK_BYTES // (8 * small * large))
        for at in range(0, len(matrices), per_task):
            pieces: list[tuple[int, int, int]] = []
            for i, a, b in matrices[at : at + per_task]:
                if pieces and pieces[-1][0] == i:  # neighbours of one layer are one view
                    pieces[-1] = (i, pieces[-1][1], b)
                else:
                    pieces.append((i, a, b))
            count = len(matrices[at : at + per_task])
            tasks.append(_Task(tuple(pieces), small, large, cost * count))
    return tasks


def _solve(
    views: Sequence[torch.Tensor], scale: float, dtype: type, names: Sequence[str]
) -> np.ndarray:
    """Eigenvalues [matrices, small], float64 and not negative, of views [k, small, large]."""
    matrices = gram(views, scale, dtype)
    traces = np.trace(matrices, axis1=1, axis2=2)
    if not np.isfinite(traces).all():
        at = 0
        for view, name in zip(views, names, strict=True):
            if not np.isfinite(traces[at : at + view.shape[0]]).all():
                raise not_finite(name, view)
            at += view.shape[0]
    try:
        values = np.linalg.eigvalsh(matrices)
    except np.linalg.LinAlgError:
        values = _second_try(matrices, names)
    return np.maximum(values.astype(np.float64, copy=False), 0.0)


def _second_try(matrices: np.ndarray, names: Sequence[str]) -> np.ndarray:
    try:
        return torch.linalg.eigvalsh(torch.from_numpy(matrices).double()).numpy()
    except torch.linalg.LinAlgError as error:
        raise UnsupportedModelError(
            f"the eigenvalues of {', '.join(dict.fromkeys(names))} did not converge in two "
            f"libraries ({str(error).splitlines()[0]}). Leave the layer out, or check its weights."
        ) from error


def not_finite(name: str, view: torch.Tensor) -> UnsupportedModelError:
    """What to raise for a weight with NaN or infinity, or whose squares are infinite."""
    bad = count_non_finite(view)
    if bad:
        return UnsupportedModelError(
            f"layer {name!r}: its weight holds {bad} NaN or infinite values, so it has no "
            "spectrum. Load finite weights, or leave the layer out."
        )
    return UnsupportedModelError(
        f"layer {name!r}: the squares of its weights overflow, so it has no spectrum. Scale the "
        "weight; alpha does not change with the scale."
    )


def _refine(values: np.ndarray, view: torch.Tensor, layer: LayerSlices, threshold: float) -> int:
    """Replace rows of ``values`` whose digits near or above the threshold were lost; how many."""
    largest = values[:, -1]
    noise = NOISE * np.finfo(np.float64).eps * largest
    # The smallest eigenvalue that will be kept, or may be.
    above = np.where(values > (threshold - noise)[:, None], values, np.inf).min(axis=1)
    rows = np.flatnonzero((largest > 0) & (noise > RELATIVE * above))
    for row in rows:
        values[row] = _squared_singular(view[row : row + 1], layer)[0]
    return len(rows)


def _singular(layer: LayerSlices) -> np.ndarray:
    return _squared_singular(layer.matrices(), layer)


def _squared_singular(view: torch.Tensor, layer: LayerSlices) -> np.ndarray:
    """Eigenvalues [k, small] from the singular values of the matrices themselves, ascending.

    Values that float64 cannot tell from zero, at most ``large * eps`` of the largest singular
    value, become exactly 0.
    """
    stack = stacked([view])
    try:
        singular = np.linalg.svd(stack, compute_uv=False)
    except np.linalg.LinAlgError:
        singular = torch.linalg.svdvals(torch.from_numpy(stack)).numpy()
    limit = stack.shape[2] * np.finfo(np.float64).eps * singular[:, :1]
    singular = np.where(singular > limit, singular, 0.0)[:, ::-1]
    return singular * singular * layer.scale


class _Queue:
    """Tasks, dearest first; at most one large one is handed out at a time."""

    def __init__(self, tasks: Sequence[_Task]) -> None:
        self.large = deque(task for task in tasks if task.is_large)
        self.small = deque(task for task in tasks if not task.is_large)
        self.busy = False
        self.stopped = False
        self.changed = threading.Condition()

    def take(self) -> _Task | None:
        with self.changed:
            while not self.stopped:
                if self.large and not self.busy:
                    self.busy = True
                    return self.large.popleft()
                if self.small:
                    return self.small.popleft()
                if not self.large:
                    return None
                self.changed.wait()
            return None

    def done(self, task: _Task) -> None:
        if task.is_large:
            with self.changed:
                self.busy = False
                self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


def _run_all(
    tasks: Sequence[_Task],
    layers: Sequence[LayerSlices],
    run: Callable[[_Task], None],
    threads: int,
    progress: Progress | None,
) -> None:
    """Run every task on ``threads`` threads; the first error stops the rest and is raised here."""
    todo = [layer.positions for layer in layers]
    queue = _Queue(tasks)
    finished: deque[_Task] = deque()
    errors: list[BaseException] = []
    ready = threading.Semaphore(0)

    def worker() -> None:
        while (task := queue.take()) is not None:
            try:
                run(task)
                finished.append(task)
            except BaseException as error:  # raised again by the thread that waits
                errors.append(error)
                queue.stop()
            queue.done(task)
            ready.release()

    done = 0

    def report() -> None:
        nonlocal done
        task = finished.popleft()
        for i, a, b in task.pieces:
            todo[i] -= b - a
            if todo[i] == 0:
                done += 1
                if progress is not None:
                    progress(done, len(layers), layers[i].name)

    if threads == 1:
        while (task := queue.take()) is not None:
            run(task)
            queue.done(task)
            finished.append(task)
            report()
        return
    workers = [threading.Thread(target=worker, daemon=True) for _ in range(threads)]
    for one in workers:
        one.start()
    try:
        for _ in tasks:
            ready.acquire()
            if errors:
                break
            report()
    finally:
        queue.stop()
        for one in workers:
            one.join()
    if errors:
        raise errors[0]
