"""Average pooling of any windows in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments import image, window_pooled_size
from ..library import in_float32, plane_padded

__all__ = ["spread", "window_avg_pool2d"]


@in_float32
def window_avg_pool2d(
    x: torch.Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    ceil_mode: bool, count_include_pad: bool, divisor: int,
) -> torch.Tensor:  # fmt: skip
    """See :func:`opentrans_kernels.ops.window_avg_pool2d`; divisor 0: of each window its size."""
    n, c, *size = image("window_avg_pool2d", x)
    found = window_pooled_size("window_avg_pool2d", size, window, stride, padding, ceil_mode)
    out = plane_padded(x, n, c, *found)
    if not c:
        return out  # PyTorch takes empty batches only
    return out.copy_(
        torch.nn.functional.avg_pool2d(
            x, window, stride, padding, ceil_mode, count_include_pad, divisor or None
        )
    )


def spread(
    grad: torch.Tensor, size: Sequence[int], window: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], ceil_mode: bool, count_include_pad: bool, divisor: int,
) -> torch.Tensor:  # fmt: skip
    """The gradient of the input, by PyTorch's formula, which reads the shape of the input only."""
    like = grad.new_empty(tuple(size))
    if not like.numel():
        return like
    return torch.ops.aten.avg_pool2d_backward(
        grad, like, window, stride, padding, ceil_mode, count_include_pad, divisor or None
    )
