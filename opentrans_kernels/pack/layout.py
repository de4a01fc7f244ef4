"""The structure tensor: how it is assembled from a dense weight, read, and checked.

``csrc/otk.h`` documents its parts; ``csrc/cpu/conv/pack.cpp`` reads it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import PlanError

__all__ = [
    "LARGEST_STEP",
    "Header",
    "assemble",
    "check_content",
    "damaged",
    "indices",
    "read_header",
]

#: Of stride, padding and dilation: coordinates are 32 bits wide in the kernels.
LARGEST_STEP = 1 << 15

_MAGIC, _VERSION = 0x4B544F50, 1
_HEADER = 13  # int32 words; the order of csrc/cpu/conv/pack.cpp
_FIRST, _LAST, _COUNT_SHIFT = 1 << 30, 1 << 31, 16
_MOST = 2**31 - 1  # of nonzeros and entries
_MAX_COUNT = 0x3FFF  # nonzeros of one (row, chunk)
# By taps: channels per chunk from each density on. A chunk's tile should stay in L1 (that of a 3x3
# holds three shifted copies), but rows of a few nonzeros cost more in loop starts and partial sums
# than a wider chunk does in cache misses.
_CHUNK = {1: ((0.12, 64), (0.0, 128)), 9: ((0.06, 16), (0.03, 24), (0.0, 48))}
_CHUNK_OTHER = ((0.0, 64),)
# Codes of a chunk, 64 channels of a 3x3. Wider windows get fewer channels: their tiles are larger,
# and shorter sums between two roundings of a partial sum are more accurate.
_CHUNK_CODES = 576
_MIN_BLOCK, _MAX_BLOCK = 64, 512
_BLOCK_NNZ = 2048  # nonzeros of a (row block, chunk) worth one load of the chunk's tile


class Header(NamedTuple):
    """The first words of a structure tensor, without magic number and version."""

    cin: int
    cout: int
    kernel: int
    stride: int
    padding: int
    chunk: int
    row_block: int
    n_chunks: int
    n_row_blocks: int
    nnz: int
    n_entries: int
    dilation: int = 1

    @property
    def span(self) -> int:
        """Pixels from the first tap of the window to its last, both included."""
        return (self.kernel - 1) * self.dilation + 1


def damaged(what: str) -> PlanError:
    return PlanError(f"the packed structure is damaged: {what}; pack the weight again.")


def read_header(words: np.ndarray) -> Header:
    """The header of a structure tensor (int32 ``[words]``).

    Raises:
        PlanError: not a structure of this version, or not as long as its header says.
    """
    if (
        words.ndim != 1 or words.dtype != np.int32 or words.size < _HEADER
        or words[0] != _MAGIC or words[1] != _VERSION
    ):  # fmt: skip
        raise PlanError(
            "structure was not made by this version of SparseWeight; pack the weight again."
        )
    header = Header(*map(int, words[2:_HEADER]))
    # The dilation less one is the upper half of the stride's word.
    header = header._replace(stride=header.stride & 0xFFFF, dilation=(header.stride >> 16) + 1)
    blocks = 2 * (header.n_chunks * header.n_row_blocks + 1)
    size = _HEADER + blocks + header.n_entries + (header.nnz + 1) // 2
    if min(header) < 0 or words.size != size:
        raise damaged(f"it has {words.size} elements, its header describes {size}")
    return header


def assemble(
    dense: np.ndarray, kernel: int, stride: int, padding: int,
    chunk: int | None, row_block: int | None, dilation: int = 1,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Choose chunks and row blocks, and pack ``[cout, cin, k, k]``. Returns (words, values)."""
    cout, cin = dense.shape[:2]
    taps = kernel * kernel
    chunk = max(1, min(chunk or _default_chunk(dense, taps), cin))
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
    if np.count_nonzero(flat) + cout * n_chunks > _MOST:
        raise PlanError(
            f"a weight {list(dense.shape)} with {np.count_nonzero(flat)} nonzeros is too large for "
            "the packed form, which counts them in 32 bits. Leave the layer dense."
        )
    (blocks, entries, codes), values = _pack(flat, taps, chunk, row_block)
    header = [
        _MAGIC, _VERSION, cin, cout, kernel, (dilation - 1) << 16 | stride, padding, chunk,
        row_block,
        n_chunks, -(-cout // row_block), len(values), entries.size,
    ]  # fmt: skip
    words = np.concatenate([np.asarray(header, np.int32), blocks, entries.view(np.int32), codes])
    return words, values


def _default_chunk(dense: np.ndarray, taps: int) -> int:
    density = np.count_nonzero(dense) / dense.size
    chunk = next(c for limit, c in _CHUNK.get(taps, _CHUNK_OTHER) if density >= limit)
    return min(chunk, _CHUNK_CODES // taps)


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


class _Content(NamedTuple):
    """A structure's arrays, and per entry its (row block, chunk), output row and nonzeros."""

    blocks: np.ndarray
    entries: np.ndarray
    codes: np.ndarray
    block: np.ndarray
    rows: np.ndarray
    counts: np.ndarray


def _content(words: np.ndarray, header: Header) -> _Content:
    total = header.n_chunks * header.n_row_blocks
    start = _HEADER + 2 * (total + 1)
    blocks = words[_HEADER:start].reshape(total + 1, 2).astype(np.int64)
    steps = np.diff(blocks[:, 0])
    if blocks[0].any() or tuple(blocks[-1]) != (header.n_entries, header.nnz) or (steps < 0).any():
        raise damaged("its blocks do not cover its entries")
    entries = words[start : start + header.n_entries].view(np.uint32)
    codes = words[start + header.n_entries :].view(np.uint16)[: header.nnz].astype(np.int64)
    block = np.repeat(np.arange(total), steps)
    counts = ((entries >> np.uint32(_COUNT_SHIFT)) & np.uint32(_MAX_COUNT)).astype(np.int64)
    if counts.sum() != header.nnz:
        raise damaged(f"its entries count {counts.sum()} nonzeros, its header {header.nnz}")
    rows = (entries & np.uint32(0xFFFF)).astype(np.int64)
    rows += block // max(header.n_chunks, 1) * header.row_block
    return _Content(blocks, entries, codes, block, rows, counts)


def indices(words: np.ndarray) -> np.ndarray:
    """Flat indices into ``[cout, cin, k, k]`` in packed order (the inverse of ``_pack``)."""
    header = read_header(words)
    found = _content(words, header)
    taps = header.kernel**2
    first_column = found.block % max(header.n_chunks, 1) * header.chunk * taps
    return np.repeat(found.rows * header.cin * taps + first_column, found.counts) + found.codes


def check_content(words: np.ndarray, header: Header) -> None:
    """Raise PlanError unless every row, code and pointer is one that ``_pack`` could have made."""
    cin, cout, kernel, stride, padding, chunk, row_block, n_chunks, n_row_blocks, *_ = header
    taps = kernel * kernel
    if not (
        min(cin, cout, kernel, stride) >= 1 and max(stride, padding) <= LARGEST_STEP
        and 1 <= header.dilation <= (LARGEST_STEP if kernel > 1 else 1)
        and 1 <= chunk <= cin and chunk * taps <= _MAX_COUNT and n_chunks == -(-cin // chunk)
        and 1 <= row_block <= min(cout, 0xFFFF) and n_row_blocks == -(-cout // row_block)
    ):  # fmt: skip
        raise damaged(f"its header is impossible: {header}")
    found = _content(words, header)
    sums = np.concatenate([[0], np.cumsum(found.counts)])
    if not np.array_equal(sums[found.blocks[:, 0]], found.blocks[:, 1]):
        raise damaged("its blocks and entries disagree on where nonzeros begin")
    local = found.entries & np.uint32(0xFFFF)
    if (local >= row_block).any() or (found.rows >= cout).any():
        raise damaged(f"an entry names a row beyond the {cout} output channels")
    if len(np.unique(found.block * row_block + local)) != len(local):
        raise damaged("a row occurs twice in a block")
    # Each row is begun by its first entry and finished by its last, else pixels stay unwritten.
    for flag, step in ((_FIRST, 1), (_LAST, -1)):
        rows, position = np.unique(found.rows[::step], return_index=True)
        expected = np.zeros(len(local), bool)
        expected[position] = True
        flagged = (found.entries[::step] & np.uint32(flag)) != 0
        if len(rows) != cout or not np.array_equal(flagged, expected):
            raise damaged("its rows are not begun and finished exactly once")
    # Codes ascend within an entry and stay inside the channels of its chunk.
    channels = np.minimum(chunk, cin - found.block % n_chunks * chunk)
    if (found.codes >= np.repeat(channels * taps, found.counts)).any():
        raise damaged(f"a code lies outside the {cin} input channels")
    begins = np.zeros(header.nnz, bool)
    begins[sums[:-1][found.counts > 0]] = True
    if (~begins[1:] & (np.diff(found.codes) <= 0)).any():
        raise damaged("the codes of a row do not ascend")
