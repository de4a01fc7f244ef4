"""The nonzeros of a convolution in the order in which the CUDA-core kernel reads them.

Output channels come in groups of 64, input channels in chunks. Inside a group the channels are
sorted by their number of nonzeros and dealt back and forth to 8 warps of 8 rows, so that warps end
together. A nonzero is (offset of its activation in the shared tile, value), 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...errors import PlanError

__all__ = ["GROUP", "Geometry", "SparsePack", "chunk_of", "geometry", "pack"]

GROUP = 64
_WARPS, _ROWS = 8, 8
_LANES, _LINES = 32, 8


@dataclass(frozen=True)
class Geometry:
    """The shared tile of a ``k x k`` convolution: floats per row and per channel."""

    across: int
    plane: int


def geometry(kernel: int) -> Geometry:
    """As ``tile_width`` and ``plane`` in ``csrc/cuda/sparse_conv.h``."""
    halo = kernel // 2
    across = _LANES + 2 * halo
    return Geometry(across, (across * (_LINES + 2 * halo)) | 1)


def chunk_of(kernel: int) -> int:
    """Input channels in shared memory at a time: 44 to 49 KB, so two blocks fit everywhere."""
    return 32 if kernel == 3 else 48


@dataclass(frozen=True)
class SparsePack:
    """``entries`` int32 [nnz, 2] (offset, bits of a float32), ``begin`` int32 [groups, chunks, 65],
    ``slots`` int32 [groups, 64] (output channel, -1: none); sizes of the convolution."""

    entries: torch.Tensor
    begin: torch.Tensor
    slots: torch.Tensor
    cin: int
    cout: int
    kernel: int
    chunk: int

    @property
    def nnz(self) -> int:
        return self.entries.shape[0]

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
    chunk = chunk_of(kernel) if chunk is None else chunk
    if chunk < 1:
        raise PlanError(f"chunk={chunk} must be at least 1 input channel; leave it out.")
    values = weight.detach().cpu().to(torch.float32).numpy()
    groups, chunks = -(-cout // GROUP), max(1, -(-cin // chunk))
    slot_of, slots = _deal(np.count_nonzero(values.reshape(cout, -1), axis=1), groups)
    co, ci, ky, kx = np.nonzero(values)
    shape = geometry(kernel)
    offset = (ci % chunk) * shape.plane + ky * shape.across + kx
    where = ((co // GROUP) * chunks + ci // chunk) * GROUP + slot_of[co]
    order = np.lexsort((offset, where))
    entries = np.empty((co.size, 2), np.int32)
    entries[:, 0] = offset[order]
    entries[:, 1] = values[co, ci, ky, kx][order].view(np.int32)
    ends = np.cumsum(np.bincount(where, minlength=groups * chunks * GROUP))
    begin = np.zeros((groups * chunks, GROUP + 1), np.int32)
    begin[:, 1:] = ends.reshape(groups * chunks, GROUP)
    begin[1:, 0] = begin[:-1, -1]
    return SparsePack(
        torch.from_numpy(entries), torch.from_numpy(begin.reshape(groups, chunks, GROUP + 1)),
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
        turn, warp = place // _WARPS, place % _WARPS
        slot = np.where(turn % 2 == 0, warp, _WARPS - 1 - warp) * _ROWS + turn
        slots[group, slot] = ranked
        slot_of[ranked] = slot
    return slot_of, slots
