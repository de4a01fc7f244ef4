"""What tensors held at one moment, as checksums of their bits, and whether they still hold it.

Version counters do not tell of every write: ``tensor.data``, numpy views and other processes write
without moving them. So copies that were folded or packed from weights are held against the bits.
The bits of floats are read as integers, so NaN and -0.0 are values like others.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .. import native
from .library import LIBRARY

__all__ = ["BLOCK_BYTES", "Contents", "Source", "mark_of"]

#: Bytes under one checksum (``otk::kBlockBytes``).
BLOCK_BYTES = 512

# Implemented by the extension; without it the functions below serve.
LIBRARY.define("block_sums(Tensor[] tensors) -> Tensor")
LIBRARY.define("first_changed(Tensor[] tensors, Tensor sums, int turn, int turns) -> int")
LIBRARY.define("hold_contents(Tensor[] tensors, Tensor sums) -> int")
LIBRARY.define("first_changed_held(int handle, int turn, int turns) -> int")
LIBRARY.define("release_contents(int handle) -> ()")


def _signed(number: int) -> int:
    return (number & (2**64 - 1)) - (number >> 63 & 1) * 2**64


def _keys() -> list[int]:
    """The odd keys of ``csrc/cpu/support/block_sums.cpp``: SplitMix64 of the position."""
    found = []
    for i in range(1, BLOCK_BYTES // 8 + 1):
        z = i * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        found.append(_signed(z ^ z >> 31 | 1))
    return found


def _sums_of(tensor: torch.Tensor) -> torch.Tensor:
    """int64 ``[blocks]`` of one contiguous tensor on any device, in plain PyTorch."""
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    if rest := -raw.numel() % BLOCK_BYTES:
        raw = torch.nn.functional.pad(raw, (0, rest))
    elif raw.storage_offset() % 8 or raw.data_ptr() % 8:
        raw = raw.clone()
    words = raw.view(torch.int64).view(-1, BLOCK_BYTES // 8)
    keys = torch.tensor(_keys(), device=raw.device)
    return ((words ^ (words >> 29 & 0x7FFFFFFFF)) * keys).sum(1)


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in the order they lie in memory, without a copy where there are no gaps."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.stride()


class Contents:
    """Checksums of tensors, of any dtype, layout and device.

    forms: (dtype, shape, strides) of each.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.forms = [_form(t) for t in tensors]
        stored = [_as_stored(t) for t in tensors]
        if not stored:
            self._sums = torch.empty(0, dtype=torch.int64)
        elif _natively(stored):
            self._sums = torch.ops.opentrans_kernels.block_sums(stored)
        else:
            self._sums = torch.cat([_sums_of(t).cpu() for t in stored])

    @classmethod
    def joined(cls, parts: Sequence[Contents]) -> Contents:
        """Of the tensors of all ``parts``, in their order, as they were when those were made."""
        found = cls(())
        found.forms = [form for part in parts for form in part.forms]
        found._sums = torch.cat([part._sums for part in parts])
        return found

    def first_change(self, tensors: Sequence[torch.Tensor]) -> int:
        """Index of the first tensor that holds something else or has another form, or -1."""
        for index, (tensor, form) in enumerate(zip(tensors, self.forms, strict=True)):
            if _form(tensor) != form:
                return index
        stored = [_as_stored(t) for t in tensors]
        if _natively(stored):
            return torch.ops.opentrans_kernels.first_changed(stored, self._sums, 0, 1)
        return _compare(stored, self._sums, 0, 1)

    def digest(self) -> str:
        """SHA-256 (hex) over forms and checksums."""
        found = hashlib.sha256(repr(self.forms).encode())
        found.update(self._sums.numpy().tobytes())
        return found.hexdigest()

    def hold(
        self, tensors: Sequence[torch.Tensor], chosen: Sequence[int]
    ) -> Callable[[int, int], int]:
        """``first_change`` of some of the tensors, which keep their form, as ``look(turn, turns)``.

        It reads the part ``turn`` of ``turns`` of each, one block at least.
        """
        counts = [-(-t.numel() * t.element_size() // BLOCK_BYTES) for t in tensors]
        parts = self._sums.split(counts)
        sums = torch.cat([parts[i] for i in chosen]) if chosen else self._sums[:0]
        stored = [_as_stored(tensors[i]) for i in chosen]
        if not stored or not _natively(stored):
            return functools.partial(_compare, stored, sums)
        handle = torch.ops.opentrans_kernels.hold_contents(stored, sums)
        look = functools.partial(torch.ops.opentrans_kernels.first_changed_held.default, handle)
        weakref.finalize(look, _release, handle).atexit = False
        return look


def _release(handle: int) -> None:
    """Let go of what ``hold`` holds. That may happen at any time, and a tracer that is at work then
    would write the call into its graph.
    """
    with _disable_current_modes():
        torch.ops.opentrans_kernels.release_contents(handle)


def _compare(stored: Sequence[torch.Tensor], sums: torch.Tensor, turn: int, turns: int) -> int:
    at = 0
    for index, tensor in enumerate(stored):
        found = _sums_of(tensor).cpu()
        blocks = len(found)
        part = slice(turn * blocks // turns, (turn + 1) * blocks // turns)
        if blocks and blocks < turns:
            part = slice(turn % blocks, turn % blocks + 1)
        if not torch.equal(found[part], sums[at : at + blocks][part]):
            return index
        at += blocks
    return -1


def _natively(tensors: Sequence[torch.Tensor]) -> bool:
    return native.load() and all(t.is_cpu for t in tensors)


def mark_of(tensor: torch.Tensor) -> tuple[int, int, torch.device]:
    """Changes with every write that PyTorch counts, and with the place in memory."""
    # Inference tensors have no counter.
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.device


class Source:
    """The tensors and numbers something was derived from; None stands for a tensor not there.

    kept: False: do not look at the bits, :meth:`still` is always False. Tensors on another device
    than the CPU are never looked at, because the question would wait for the device.
    """

    def __init__(self, *parts: torch.Tensor | float | None, kept: bool = True) -> None:
        self._marks = self._marks_of(parts)
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        kept = kept and all(t.device.type == "cpu" for t in tensors)
        self.contents = Contents(tensors) if kept else None

    @staticmethod
    def _marks_of(parts: Sequence[torch.Tensor | float | None]) -> tuple[Any, ...]:
        return tuple(mark_of(p) if isinstance(p, torch.Tensor) else p for p in parts)

    def still(self, *parts: torch.Tensor | float | None) -> bool:
        """Whether ``parts`` are these numbers and hold these bits, wherever they lie by now."""
        marks = self._marks_of(parts)
        if self.contents is None or _numbers(marks) != _numbers(self._marks):
            return False
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        if any(t.device.type != "cpu" for t in tensors) or self.contents.first_change(tensors) >= 0:
            return False
        self._marks = marks
        return True

    def unmoved(self, *parts: torch.Tensor | float | None) -> bool:
        """Whether nothing PyTorch counts has happened since; for backward, behind a forward."""
        return self._marks == self._marks_of(parts)


def _numbers(marks: Sequence[Any]) -> list[Any]:
    """The numbers among the parts, and where the tensors stand."""
    return ["tensor" if isinstance(mark, tuple) else mark for mark in marks]
