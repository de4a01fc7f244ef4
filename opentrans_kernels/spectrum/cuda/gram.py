"""Gram matrices of the smaller side, float64, on the device the weights are on.

A weight is read in place as [O, I, K] (K kernel positions, possibly strided). The only copy is the
cast to float64, which also moves K to the front, in chunks of bounded size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["STAGE_BYTES", "gram_into"]

STAGE_BYTES = 64 << 20  # of the float64 staging buffer


def gram_into(
    out: torch.Tensor, weights: Sequence[torch.Tensor], scale: float, stage_bytes: int = STAGE_BYTES
) -> None:
    """``scale * W W^T`` (or ``W^T W``, whichever is smaller) of every slice of every weight.

    Args:
        out: float64 [len(weights) * K, n, n], contiguous; slices of one weight are neighbours.
        weights: of one shape [O, I, K], any strides and floating dtype, on the device of ``out``.
        scale: a factor on the Gram matrix, so a factor ``sqrt(scale)`` on the weight.
        stage_bytes: bound of the staging buffer, which never holds less than one column.

    Larger staging means fewer, larger GEMMs; only the rounding of sums depends on it.
    """
    if not weights:
        return
    rows, columns, positions = weights[0].shape
    wide = rows <= columns
    room = max(1, stage_bytes // 8)
    per_weight = rows * columns * positions
    if per_weight <= room:
        step = room // max(1, per_weight)
        for first in range(0, len(weights), step):
            some = weights[first : first + step]
            stage = out.new_empty(len(some) * positions, rows, columns)
            for index, weight in enumerate(some):
                part = stage[index * positions : (index + 1) * positions]
                part.copy_(weight.permute(2, 0, 1))
            target = out[first * positions : first * positions + len(stage)]
            _multiply(target, stage, wide, scale, add=False)
        return
    # One slice at a time, over parts of the longer side: their products add up.
    length, n = (columns, rows) if wide else (rows, columns)
    step = max(1, min(length, room // n))
    for index, weight in enumerate(weights):
        for position in range(positions):
            target = out[index * positions + position].unsqueeze(0)
            for first in range(0, length, step):
                size = min(step, length - first)
                part = weight[:, :, position].narrow(1 if wide else 0, first, size)
                stage = part.to(torch.float64, copy=False).unsqueeze(0)
                _multiply(target, stage, wide, scale, add=first > 0)


def _multiply(out: torch.Tensor, a: torch.Tensor, wide: bool, scale: float, add: bool) -> None:
    left, right = (a, a.mT) if wide else (a.mT, a)
    torch.baddbmm(out, left, right, beta=1.0 if add else 0.0, alpha=scale, out=out)
