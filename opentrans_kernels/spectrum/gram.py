"""Gram matrices of the smaller side, in NumPy, whose product with its own transpose is a syrk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["gram", "stacked"]

#: Wide matrices from this many elements of their Gram are summed over panels of columns, so that
#: their copy in the working precision never exceeds a quarter of a Gram.
PANEL_FROM = 1 << 20


def stacked(views: Sequence[torch.Tensor], dtype: type = np.float64) -> np.ndarray:
    """A contiguous copy [sum of k, m, n] of views [k, m, n] of any strides, dtype and device."""
    count = sum(view.shape[0] for view in views)
    out = np.empty((count, *views[0].shape[1:]), dtype)
    target, at = torch.from_numpy(out), 0
    for view in views:
        target[at : at + view.shape[0]].copy_(view)
        at += view.shape[0]
    return out


def gram(views: Sequence[torch.Tensor], scale: float, dtype: type = np.float64) -> np.ndarray:
    """``scale * A A^T`` of every matrix: [sum of k, m, m] from views [k, m, n] with m <= n.

    Products and sums are of ``dtype``; the scale is applied to the Gram. Views of one call have
    the same m and n. One large matrix takes 2.25 times the memory of its Gram, and the BLAS's
    buffers.
    """
    _, small, large = views[0].shape
    if len(views) == views[0].shape[0] == 1 and large > small and small * small >= PANEL_FROM:
        found = _by_panels(views[0][0], dtype)[None]
    else:
        stack = stacked(views, dtype)
        found = np.matmul(stack, stack.transpose(0, 2, 1))
    if scale != 1:
        found *= scale
    return found


def _by_panels(matrix: torch.Tensor, dtype: type) -> np.ndarray:
    small, large = matrix.shape
    width = max(1, small // 4)
    total = product = None
    for begin in range(0, large, width):
        panel = stacked([matrix[None, :, begin : begin + width]], dtype)[0]
        if total is None:
            total = panel @ panel.T
            continue
        product = np.matmul(panel, panel.T, out=product)
        total += product
    assert total is not None
    return total
