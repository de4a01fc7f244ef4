"""The oracle of ``bottleneck_chain``: the same steps in plain PyTorch, rounded where kernels do."""

from __future__ import annotations

import torch.nn.functional as F

from ..implicit_gemm_conv2d.reference import unpacked
from ..nhwc import accumulator, nhwc
from .shapes import check

__all__ = ["bottleneck_chain"]


def bottleneck_chain(x, weight2, bias2, weight3, bias3, residual, weight1, bias1, tf32, config=()):
    """``tf32`` and ``config`` are the kernels' own."""
    check(x, weight2, bias2, weight3, bias3, residual, weight1, bias1, config)
    wide, dtype = accumulator(x.dtype), x.dtype

    def conv(value, weight, bias, kernel):
        return F.conv2d(
            value.to(wide), unpacked(weight, kernel).to(wide), bias.to(wide), padding=kernel // 2
        )

    inner = conv(x, weight2, bias2, 3).relu().to(dtype)
    y = (conv(inner, weight3, bias3, 1) + residual.to(wide)).relu().to(dtype)
    after = conv(y, weight1, bias1, 1).relu().to(dtype)
    return nhwc(y), nhwc(after)
