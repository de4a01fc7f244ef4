"""Average pooling in plain PyTorch."""

from __future__ import annotations

import torch

from ..arguments import image, pooled_size
from ..library import in_float32, plane_padded

__all__ = ["avg_pool2d"]


@in_float32
def avg_pool2d(x: torch.Tensor, k: int) -> torch.Tensor:
    """See :func:`opentrans_kernels.ops.avg_pool2d`."""
    n, c, *_ = image("avg_pool2d", x)
    out = plane_padded(x, n, c, *pooled_size("avg_pool2d", x.shape, k))
    return out.copy_(torch.nn.functional.avg_pool2d(x, k)) if x.numel() else out
