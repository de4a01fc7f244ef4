"""Sizes, batch, threads and device as callers give them: checked, or one clear error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import PlanError
from ..topology.shapes import checked_size as checked_size
from ..topology.shapes import is_count

__all__ = ["checked_batch", "checked_size", "device_of", "thread_count"]


def checked_batch(given: Any) -> int:
    """Images per call. Raises PlanError unless it is a whole number of at least 1."""
    if not is_count(given):
        raise PlanError(f"batch={given!r} must be a whole number of at least 1.")
    return given


def device_of(given: Any) -> str:
    """ "cpu", "cuda" or "cuda:N"; None is the CPU. Raises PlanError for anything else."""
    try:
        found = torch.device("cpu" if given is None else given)
    except (RuntimeError, TypeError) as error:
        raise PlanError(f"device={given!r} is no device ({error}). Use 'cpu' or 'cuda'.") from error
    if found.type not in ("cpu", "cuda"):
        raise PlanError(f"device={given!r}: there are no kernels for it. Use 'cpu' or 'cuda'.")
    return "cpu" if found.type == "cpu" else str(found)


@contextlib.contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """Run with this many torch threads (None: as they are); yields the number in force."""
    before = torch.get_num_threads()
    if threads is not None and not is_count(threads):
        raise PlanError(f"threads={threads!r} must be a whole number of at least 1.")
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
