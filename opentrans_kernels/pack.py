"""Packing: a masked convolution weight becomes the stream of nonzeros that the kernels read.

The packed form does not depend on the image size, so one pack serves every input. Nonzeros are
ordered row block > input-channel chunk > output row (fewest nonzeros first, so that neighbouring
rows have equal loop counts) > code. ``csrc/otk.h`` documents the structure tensor's parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .errors import PlanError

__all__ = ["SparseWeight", "dense_weight", "transposed_structure"]

_MAGIC, _VERSION = 0x4B544F50, 1
_HEADER = 13  # int32 words; the order of csrc/torch/bind_cpu.cpp
_FIRST, _LAST, _COUNT_SHIFT = 1 << 30, 1 << 31, 16
_MAX_COUNT = 0x3FFF  # nonzeros of one (row, chunk)
# Channels whose tile fits L1 (docs/design.md, "Chunks"). A 3x3 reads two more rows per channel.
_CHUNK = {1: 64, 3: 32}
_MIN_BLOCK, _MAX_BLOCK = 64, 512
_BLOCK_NNZ = 2048  # nonzeros of a (row block, chunk) worth one load of the chunk's tile


@dataclass(frozen=True)
class SparseWeight:
    """A convolution weight packed for the sparse kernels.

    Attributes:
        structure: int32 ``[words]``; where the nonzeros are (about 2 bytes per nonzero).
        values: float32 ``[nnz]`` in packed order; differentiable.
        bias: float32 ``[cout]``.
        cin, cout: channels. kernel: side of the square window. stride, padding: in pixels.
    """

    structure: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    cin: int
    cout: int
    kernel: int
    stride: int
    padding: int

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def density(self) -> float:
        numel = self.cout * self.cin * self.kernel**2
        return self.nnz / numel if numel else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of structure, values and bias."""
        return sum(t.numel() * t.element_size() for t in (self.structure, self.values, self.bias))

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int = 1,
        padding: int = 0,
        *,
        chunk: int | None = None,
        row_block: int | None = None,
    ) -> SparseWeight:
        """Pack ``weight`` ``[cout, cin, k, k]``; its exact zeros are dropped.

        Args:
            weight: float32 or float64 on any device; rounded to float32 once.
            bias: ``[cout]``, zero if omitted.
            chunk: input channels whose nonzeros are visited together (default by window size).
            row_block: output rows that share one pass over a chunk.

        Raises:
            PlanError: a weight that is not a square convolution, holds NaN or Inf, or is too
                large for the packed form.
        """
        if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
            raise PlanError(
                f"a packed convolution needs a weight [cout, cin, k, k] with a square window, got "
                f"{tuple(weight.shape)}. Grouped and non-square convolutions stay dense."
            )
        if stride < 1 or padding < 0:
            raise PlanError(f"stride {stride} must be >= 1 and padding {padding} >= 0.")
        dense = weight.detach().to("cpu", torch.float32).contiguous().numpy()
        if not np.isfinite(dense).all():
            raise PlanError(
                "the weight holds NaN or Inf (in float32), so dropping zeros would hide it. "
                "Repair the checkpoint first."
            )
        cout, cin, kernel, _ = dense.shape
        words, values = _assemble(dense, kernel, stride, padding, chunk, row_block)
        if bias is None:
            packed_bias = torch.zeros(cout)
        else:
            packed_bias = bias.detach().to("cpu", torch.float32).contiguous().clone()
            if packed_bias.shape != (cout,):
                raise PlanError(f"bias has shape {tuple(packed_bias.shape)}, expected ({cout},).")
        return cls(
            torch.from_numpy(words), torch.from_numpy(values.astype(np.float32)), packed_bias,
            cin, cout, kernel, stride, padding,
        )  # fmt: skip

    def indices(self) -> torch.Tensor:
        """int64 ``[nnz]``: flat index into ``[cout, cin, k, k]`` of each value."""
        return torch.from_numpy(_indices(self.structure.cpu().numpy()))

    def to_dense(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """The masked dense weight ``[cout, cin, k, k]``, differentiable in ``values``."""
        values = self.values if values is None else values
        return dense_weight(self.structure, values, self.cin, self.cout, self.kernel)


def transposed_structure(structure: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The structure that maps output gradients to input gradients (stride 1), and the order of
    the values in it: channels swapped, taps mirrored, padding ``k - 1 - padding``.

    Returns:
        (structure, order): ``values[order]`` are the transposed pack's values.
    """
    words = structure.detach().cpu().numpy()
    index = _indices(words)
    cin, cout, kernel, _, padding = map(int, words[2:7])
    taps = kernel * kernel
    # Number the nonzeros, scatter the numbers, transpose them, and read where each one went.
    number = np.zeros(cout * cin * taps, np.float64)
    number[index] = np.arange(1, len(index) + 1)
    flipped = number.reshape(cout, cin, kernel, kernel)[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
    parts, order = _assemble(flipped, kernel, 1, max(kernel - 1 - padding, 0), None, None)
    return torch.from_numpy(parts), torch.from_numpy(order.astype(np.int64) - 1)


def dense_weight(
    structure: torch.Tensor, values: torch.Tensor, cin: int, cout: int, kernel: int
) -> torch.Tensor:
    """Scatter packed ``values`` into ``[cout, cin, k, k]``, in the dtype of ``values``."""
    index = torch.from_numpy(_indices(structure.detach().cpu().numpy())).to(values.device)
    flat = values.new_zeros(cout * cin * kernel * kernel)
    return flat.index_put((index,), values).view(cout, cin, kernel, kernel)


def _assemble(
    dense: np.ndarray, kernel: int, stride: int, padding: int,
    chunk: int | None, row_block: int | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Choose chunks and row blocks, pack, and join the structure tensor. Returns (words, values)."""
    cout, cin = dense.shape[:2]
    taps = kernel * kernel
    chunk = max(1, min(chunk or _CHUNK.get(kernel, 16), cin))
    if chunk * taps > _MAX_COUNT:
        raise PlanError(
            f"chunk {chunk} with a {kernel}x{kernel} window exceeds {_MAX_COUNT} codes per row; "
            "use a smaller chunk."
        )
    n_chunks = -(-cin // chunk)
    if row_block is None:
        per_row = max(np.count_nonzero(dense) / max(cout * n_chunks, 1), 1e-9)
        row_block = int(np.clip(_BLOCK_NNZ / per_row, _MIN_BLOCK, _MAX_BLOCK))
    row_block = max(1, min(row_block, cout, 0xFFFF))
    flat = np.ascontiguousarray(dense).reshape(cout, cin * taps)
    (blocks, entries, codes), values = _pack(flat, taps, chunk, row_block)
    header = [
        _MAGIC, _VERSION, cin, cout, kernel, stride, padding, chunk, row_block,
        n_chunks, -(-cout // row_block), len(values), entries.size,
    ]  # fmt: skip
    words = np.concatenate([np.asarray(header, np.int32), blocks, entries.view(np.int32), codes])
    return words, values


def _pack(
    flat: np.ndarray, taps: int, chunk: int, row_block: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """``flat`` is ``[cout, cin * taps]``. Returns (blocks, entries, codes as int32), values."""
    cout, columns = flat.shape
    width = chunk * taps
    n_chunks, n_blocks = -(-columns // width), -(-cout // row_block)
    row, column = np.nonzero(flat)  # row-major, so column ascends within a row
    block = (row // row_block) * max(n_chunks, 1) + column // width
    # Nonzeros per (block, row in block); rows are visited shortest first.
    local = row % row_block
    total = n_blocks * n_chunks
    counts = np.bincount(block * row_block + local, minlength=total * row_block)
    counts = counts.reshape(n_blocks, n_chunks, row_block)
    rows = np.arange(n_blocks * row_block).reshape(n_blocks, 1, row_block)
    # An empty row still has its epilogue: it gets one entry, in the first chunk.
    empty = (counts.sum(1, keepdims=True) == 0) & (rows < cout)
    present = counts > 0
    first = present & (np.cumsum(present, axis=1) == 1)
    last = present & (np.cumsum(present[:, ::-1], axis=1)[:, ::-1] == 1)
    if n_chunks:
        present[:, :1] |= empty
        first[:, :1] |= empty
        last[:, :1] |= empty
    order = np.argsort(counts, axis=2, kind="stable")
    take = np.take_along_axis
    keep = take(present, order, 2)
    count = take(counts, order, 2)
    entry = (
        order.astype(np.uint32)
        | (count.astype(np.uint32) << np.uint32(_COUNT_SHIFT))
        | np.where(take(first, order, 2), np.uint32(_FIRST), np.uint32(0))
        | np.where(take(last, order, 2), np.uint32(_LAST), np.uint32(0))
    )
    entries = entry[keep]
    blocks = np.zeros((total + 1, 2), np.int32)
    blocks[1:, 0] = np.cumsum(keep.sum(2).reshape(-1))
    blocks[1:, 1] = np.cumsum(counts.sum(2).reshape(-1))
    # Position of each (block, row) in its block's order, to sort the nonzeros themselves.
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(row_block), order.shape), 2)
    key = block * row_block + rank.reshape(total, row_block)[block, local] if len(row) else block
    by = np.argsort(key, kind="stable")
    codes = (column[by] % width).astype(np.uint16)
    if len(codes) % 2:
        codes = np.append(codes, np.uint16(0))
    values = flat[row[by], column[by]]
    return (blocks.reshape(-1), entries, codes.view(np.int32)), values


def _indices(words: np.ndarray) -> np.ndarray:
    """Flat indices into ``[cout, cin, k, k]`` in packed order (the inverse of ``_pack``)."""
    if words.size < _HEADER or words[0] != _MAGIC or words[1] != _VERSION:
        raise PlanError(
            "structure was not made by this version of SparseWeight; pack the weight again."
        )
    cin, _, kernel, _, _, chunk, row_block, n_chunks, n_blocks, nnz, n_entries = map(
        int, words[2:_HEADER]
    )
    taps = kernel * kernel
    total = n_chunks * n_blocks
    start = _HEADER + 2 * (total + 1)
    blocks = words[_HEADER:start].reshape(total + 1, 2)
    entries = words[start : start + n_entries].view(np.uint32)
    codes = words[start + n_entries :].view(np.uint16)[:nnz].astype(np.int64)
    block_of_entry = np.repeat(np.arange(total), np.diff(blocks[:, 0]))
    counts = (entries >> np.uint32(_COUNT_SHIFT)) & np.uint32(_MAX_COUNT)
    rows = (entries & np.uint32(0xFFFF)).astype(np.int64)
    rows += block_of_entry // max(n_chunks, 1) * row_block
    first_column = block_of_entry % max(n_chunks, 1) * chunk * taps
    counts = counts.astype(np.int64)
    return np.repeat(rows * cin * taps + first_column, counts) + codes
