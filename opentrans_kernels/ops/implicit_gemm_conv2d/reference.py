"""The oracle of ``implicit_gemm_conv2d``: plain PyTorch, any device, any floating dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..nhwc import accumulator, nhwc
from .shapes import check

__all__ = ["implicit_gemm_conv2d", "unpacked"]


def unpacked(weight: torch.Tensor, kernel: int) -> torch.Tensor:
    """``[Cout, Cin, k, k]`` of a packed ``[k * k, Cin, Cout]``."""
    _, cin, cout = weight.shape
    return weight.reshape(kernel, kernel, cin, cout).permute(3, 2, 0, 1)


def _seen(weight, config, begin, steps) -> torch.Tensor:
    """1 where a slice lies, else 0: ``[taps, Cin, Cout]``."""
    seen = torch.zeros_like(weight)
    _, columns, depth, *_ = config
    bounds = begin.tolist()
    for tile, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        for step in steps[first:last].tolist():
            tap, piece = step >> 16, step & 0xFFFF
            seen[
                tap, piece * depth : (piece + 1) * depth, tile * columns : (tile + 1) * columns
            ] = 1
    return seen


def implicit_gemm_conv2d(
    x, weight, bias, channels, residual, x2, weight2, kernel, pool, pool2, relu, tf32, config=(),
    begin=None, steps=None,
):  # fmt: skip
    """``tf32`` is the kernels' own, and ``config`` but for slices: this computes exactly, in one
    rounding."""
    check(
        x, weight, bias, channels, residual, x2, weight2, kernel, pool, pool2, config, begin, steps
    )
    if steps is not None:
        weight = weight * _seen(weight, config, begin, steps)
    wide = accumulator(x.dtype)
    if channels is not None:
        x = x.index_select(1, channels.long())
    y = F.conv2d(x.to(wide), unpacked(weight, kernel).to(wide), bias.to(wide), padding=kernel // 2)
    if x2 is not None:
        # Kernels round the pooled input to the activations' dtype, as a dense network does.
        pooled = F.avg_pool2d(x2.to(wide), pool2).to(x2.dtype) if pool2 > 1 else x2
        y = y + F.conv2d(pooled.to(wide), unpacked(weight2, 1).to(wide))
    if residual is not None:
        y = y + residual.to(wide)
    if relu:
        y = y.relu()
    if pool > 1:
        y = F.avg_pool2d(y, pool)
    return nhwc(y.to(x.dtype))
