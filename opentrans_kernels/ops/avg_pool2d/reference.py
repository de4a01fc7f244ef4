"""Average pooling in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments import image, pooled_size
from ..library import in_float32, plane_padded

__all__ = ["avg_pool2d", "avg_pool2d_backward", "spread"]


@in_float32
def avg_pool2d(x: torch.Tensor, k: int) -> torch.Tensor:
    """See :func:`opentrans_kernels.ops.avg_pool2d`."""
    n, c, *_ = image("avg_pool2d", x)
    out = plane_padded(x, n, c, *pooled_size("avg_pool2d", x.shape, k))
    return out.copy_(torch.nn.functional.avg_pool2d(x, k)) if x.numel() else out


def spread(grad: torch.Tensor, size: Sequence[int], k: int) -> torch.Tensor:
    """Every pixel of a window gets the same share, rows and columns outside all windows none."""
    share = grad.repeat_interleave(k, 2).repeat_interleave(k, 3) / k**2
    return torch.nn.functional.pad(
        share, (0, size[3] - share.shape[3], 0, size[2] - share.shape[2])
    )


def avg_pool2d_backward(grad: torch.Tensor, out: torch.Tensor, k: int) -> None:
    """``out`` = gradient of the input of :func:`avg_pool2d`."""
    out.copy_(spread(grad, out.shape, k))
