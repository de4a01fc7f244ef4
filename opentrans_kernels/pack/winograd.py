"""Weights of dense 3x3 convolutions in the domain of Winograd's F(2x2, 3x3).

A window ``g`` becomes ``G g G^T``, 16 numbers for 9; float64 inside, rounded once. Method: Lavin
and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
"""

from __future__ import annotations

import torch

__all__ = ["ROWS", "plain_gradient", "plain_weight", "transform_weight"]

ROWS = 8  # output channels of a block, kWinogradRows of csrc/otk.h
_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_BACK = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, -1.0, 0.0), (0.0, 0.0, 0.0, 1.0))  # times G: identity


def transform_weight(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[cout, cin, 3, 3]`` to ``[16, ceil(cout / 8), cin, 8]`` of ``dtype``; rows past cout are 0.

    Raises ValueError for another shape.
    """
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"the weight must be [cout, cin, 3, 3], got {list(weight.shape)}")
    cout, cin = weight.shape[:2]
    g = torch.tensor(_G, dtype=torch.float64)
    blocks = -(-cout // ROWS)
    wide = weight.new_zeros((blocks * ROWS, cin, 3, 3), dtype=torch.float64)
    wide[:cout] = weight
    found = g @ wide @ g.T  # [rows, cin, 4, 4]
    return found.view(blocks, ROWS, cin, 16).permute(3, 0, 2, 1).to(dtype).contiguous()


def plain_weight(packed: torch.Tensor, cout: int) -> torch.Tensor:
    """The ``[cout, cin, 3, 3]`` weight of a transformed one, to rounding."""
    back = packed.new_tensor(_BACK)
    _, blocks, cin, rows = packed.shape
    inner = packed.permute(1, 3, 2, 0).reshape(blocks * rows, cin, 4, 4)[:cout]
    return back @ inner @ back.T


def plain_gradient(grad: torch.Tensor) -> torch.Tensor:
    """Gradient of a transformed weight from that of its :func:`plain_weight`."""
    back = grad.new_tensor(_BACK)
    cout, cin = grad.shape[:2]
    blocks = -(-cout // ROWS)
    wide = grad.new_zeros((blocks * ROWS, cin, 4, 4))
    wide[:cout] = back.T @ grad @ back
    return wide.view(blocks, ROWS, cin, 16).permute(3, 0, 2, 1).contiguous()
