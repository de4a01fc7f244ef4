"""What tensors held at one moment, as checksums of their bits, and whether they still hold it.

Version counters do not tell of every write: ``tensor.data``, numpy views and other processes write
without moving them. So copies that were folded or packed from weights are held against the bits.
The bits of floats are read as integers, so NaN and -0.0 are values like others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import native
from .library import LIBRARY

__all__ = ["BLOCK_BYTES", "Contents", "Source", "mark_of"]

#: Bytes under one checksum (``otk::kBlockBytes``).
BLOCK_BYTES = 2048

# Implemented by the extension; without it the functions below serve.
LIBRARY.define("block_sums(Tensor[] tensors) -> Tensor")
LIBRARY.define("first_changed(Tensor[] tensors, Tensor sums, int turn, int turns) -> int")


def _signed(number: int) -> int:
    return (number & (2**64 - 1)) - (number >> 63 & 1) * 2**64


def _keys() -> list[int]:
    """The odd keys of ``csrc/cpu/block_sums.cpp``: SplitMix64 of the position."""
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
    return ((words ^ (words >> 32 & 0xFFFFFFFF)) * keys).sum(1)


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

    def first_change(self, tensors: Sequence[torch.Tensor], turn: int = 0, turns: int = 1) -> int:
        """Index of the first tensor that holds something else, or -1.

        turns: of every so many blocks that follow each other only the one at ``turn`` is read, and
        at least one of each tensor; 1 reads everything.
        """
        for index, (tensor, form) in enumerate(zip(tensors, self.forms, strict=True)):
            if _form(tensor) != form:
                return index
        return self.first_rewritten([_as_stored(t) for t in tensors], turn, turns)

    def first_rewritten(self, stored: Sequence[torch.Tensor], turn: int, turns: int) -> int:
        """``first_change`` for tensors known to have the recorded forms, as :meth:`views` are."""
        if not stored:
            return -1
        if _natively(stored):
            return torch.ops.opentrans_kernels.first_changed(stored, self._sums, turn, turns)
        at = 0
        for index, tensor in enumerate(stored):
            blocks = -(-tensor.numel() * tensor.element_size() // BLOCK_BYTES)
            step = max(1, min(turns, blocks))
            found = _sums_of(tensor).cpu()[turn % step :: step]
            if not torch.equal(found, self._sums[at : at + blocks][turn % step :: step]):
                return index
            at += blocks
        return -1

    @staticmethod
    def views(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Views of the memory of tensors, made once for many calls of :meth:`first_rewritten`."""
        return [_as_stored(t) for t in tensors]


def _natively(tensors: Sequence[torch.Tensor]) -> bool:
    return native.load() and all(t.device.type == "cpu" for t in tensors)


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
