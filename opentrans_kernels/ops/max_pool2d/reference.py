"""Max pooling in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments import image, window_pooled_size
from ..library import in_float32, plane_padded

__all__ = ["max_pool2d", "spread"]


@in_float32
def max_pool2d(
    x: torch.Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    ceil_mode: bool,
) -> torch.Tensor:  # fmt: skip
    """See :func:`opentrans_kernels.ops.max_pool2d`."""
    n, c, *size = image("max_pool2d", x)
    found = window_pooled_size("max_pool2d", size, window, stride, padding, ceil_mode)
    out = plane_padded(x, n, c, *found)
    if not c:
        return out  # PyTorch takes empty batches only
    return out.copy_(torch.nn.functional.max_pool2d(x, window, stride, padding, 1, ceil_mode))


def spread(
    grad: torch.Tensor, x: torch.Tensor, window: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], ceil_mode: bool,
) -> torch.Tensor:  # fmt: skip
    """The gradient of the input. Which pixels were the largest is looked up again by torch."""
    if not grad.numel():
        return torch.zeros_like(x)
    geometry = (window, stride, padding, [1, 1], ceil_mode)
    _, indices = torch.ops.aten.max_pool2d_with_indices(x, *geometry)
    return torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *geometry, indices)
