"""The nonzeros of a convolution in the order in which the CUDA-core kernel reads them.

Output channels come in groups of 32, input channels in chunks. Inside a group the channels are
sorted by their number of nonzeros and dealt back and forth to 4 warps of 8 rows, so that warps end
together. A warp's nonzeros of a chunk are sorted by column: input channel and horizontal tap. A
nonzero is (key, value), 8 bytes; see ``Entry`` in ``csrc/cuda/sparse_conv.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...errors import PlanError

__all__ = ["GROUP", "LANES", "LINES", "ROWS", "WARPS", "SparsePack", "pack", "plane"]

WARPS, ROWS = 4, 8  # of a block, of a warp
GROUP = WARPS * ROWS
LANES, LINES = 32, 16  # pixels of a tile
CHUNK = 16  # input channels in shared memory at a time: 33 to 39 KB, so two blocks fit everywhere
_FRESH = 1 << 7


def plane(kernel: int) -> int:
    """Floats of a channel of the shared tile: ``plane`` in ``csrc/cuda/sparse_conv.h``."""
    halo = kernel // 2
    return ((LANES + 2 * halo) * (LINES + 2 * halo)) | 1


@dataclass(frozen=True)
class SparsePack:
    """``entries`` int32 [nnz + 1, 2] (key, bits of a float32; the last is read ahead only),
    ``begin`` int32 [groups, chunks, 5], ``slots`` int32 [groups, 32] (output channel, -1: none);
    sizes of the convolution."""

    entries: torch.Tensor
    begin: torch.Tensor
    slots: torch.Tensor
    cin: int
    cout: int
    kernel: int
    chunk: int

    @property
    def nnz(self) -> int:
        return self.entries.shape[0] - 1

    def to(self, device: torch.device | str) -> SparsePack:
        """The same pack on another device."""
        moved = (t.to(device) for t in (self.entries, self.begin, self.slots))
        return SparsePack(*moved, self.cin, self.cout, self.kernel, self.chunk)


def pack(weight: torch.Tensor, chunk: int | None = None) -> SparsePack:
    """Pack a weight ``[Cout, Cin, k, k]``, k = 1 or 3; exact zeros are dropped, values are float32.

    Raises PlanError for another kernel size or a chunk that is not positive.
    """
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] not in (1, 3):
        raise PlanError(
            f"sparse_conv2d_nhwc packs weights [Cout, Cin, k, k] with k 1 or 3, got "
            f"{list(weight.shape)}. Leave other convolutions with PyTorch."
        )
    cout, cin, kernel, _ = weight.shape
    chunk = CHUNK if chunk is None else chunk
    if chunk < 1:
        raise PlanError(f"chunk={chunk} must be at least 1 input channel; leave it out.")
    values = weight.detach().cpu().to(torch.float32).numpy()
    groups, chunks = -(-cout // GROUP), max(1, -(-cin // chunk))
    slot_of, slots = _deal(np.count_nonzero(values.reshape(cout, -1), axis=1), groups)
    co, ci, ky, kx = np.nonzero(values)
    column = (ci % chunk) * plane(kernel) + kx
    warp, row = slot_of[co] // ROWS, slot_of[co] % ROWS
    where = ((co // GROUP) * chunks + ci // chunk) * WARPS + warp
    order = np.lexsort((ky, row, column, where))
    column, where = column[order], where[order]
    fresh = np.ones(co.size, bool)
    fresh[1:] = (column[1:] != column[:-1]) | (where[1:] != where[:-1])
    code = row * kernel + ky
    entries = np.zeros((co.size + 1, 2), np.int32)
    entries[:-1, 0] = column << 8 | fresh * _FRESH | code[order]
    entries[:-1, 1] = values[co, ci, ky, kx][order].view(np.int32)
    ends = np.cumsum(np.bincount(where, minlength=groups * chunks * WARPS))
    begin = np.zeros((groups * chunks, WARPS + 1), np.int32)
    begin[:, 1:] = ends.reshape(groups * chunks, WARPS)
    begin[1:, 0] = begin[:-1, -1]
    return SparsePack(
        torch.from_numpy(entries), torch.from_numpy(begin.reshape(groups, chunks, WARPS + 1)),
        torch.from_numpy(slots), cin, cout, kernel, chunk,
    )  # fmt: skip


def _deal(counts: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(slot of every channel, channel of every slot): longest rows first, back and forth."""
    slots = np.full((groups, GROUP), -1, np.int32)
    slot_of = np.empty(counts.size, np.int64)
    for group in range(groups):
        channels = np.arange(group * GROUP, min(counts.size, (group + 1) * GROUP))
        ranked = channels[np.argsort(-counts[channels], kind="stable")]
        place = np.arange(ranked.size)
        turn, warp = place // WARPS, place % WARPS
        slot = np.where(turn % 2 == 0, warp, WARPS - 1 - warp) * ROWS + turn
        slots[group, slot] = ranked
        slot_of[ranked] = slot
    return slot_of, slots
