"""The oracle of ``fused_stem``: two convolutions in plain PyTorch, rounded in between."""

from __future__ import annotations

import torch.nn.functional as F

from ..implicit_gemm_conv2d.reference import unpacked
from ..nhwc import accumulator, nhwc
from .shapes import check

__all__ = ["fused_stem"]


def fused_stem(x, weight1, bias1, weight2, bias2, tf32, config=()):
    """``tf32`` and ``config`` are the kernels' own."""
    check(x, weight1, bias1, weight2, bias2, config)
    wide, dtype = accumulator(x.dtype), x.dtype
    w1, w2 = unpacked(weight1, 3).to(wide), unpacked(weight2, 3).to(wide)
    y = F.conv2d(x.to(wide), w1, bias1.to(wide), stride=2, padding=1).relu().to(dtype)
    y = F.conv2d(y.to(wide), w2, bias2.to(wide), padding=1).relu()
    return nhwc(y.to(dtype))
