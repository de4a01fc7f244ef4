"""Dense convolution and its input gradient, each by the routine that suits the shape.

Which of PyTorch's routines is faster was measured for the layers of RN50 on one thread (AVX-512):
PyTorch runs 1x1 convolutions of small batches as one matrix product per image, which is slow where
images are small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ["convolve", "input_gradient"]

#: Largest planar images (pixels) at which oneDNN beats a matrix product per image, and smallest
#: channels_last images at which its input gradient beats a product although the weight is copied.
_ONEDNN_PIXELS = 28 * 28
#: Smallest channels_last images at which it beats one matrix product over the batch.
_ONEDNN_PIXELS_LAST = 10 * 10
#: Largest planar images that are worth two copies for one matrix product over the batch.
_MERGED_PIXELS = 10 * 10


def _pointwise(weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int], groups: int):
    return (*weight.shape[2:], *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1)


def _fast_float32(x: torch.Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
    )


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> torch.Tensor:
    """``conv2d``; ``x`` and ``weight`` in the layout that ``channels_last`` names."""
    if not _pointwise(weight, stride, padding, groups) or not _fast_float32(x):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    pixels = x.shape[2] * x.shape[3]
    if channels_last and pixels < _ONEDNN_PIXELS_LAST:
        n, _, h, w = x.shape
        y = F.linear(_as_rows(x), weight.flatten(1), bias)
        return y.view(n, h, w, -1).permute(0, 3, 1, 2)
    if channels_last or pixels <= _ONEDNN_PIXELS:
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def input_gradient(
    grad: torch.Tensor,
    weight: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> torch.Tensor:
    """Gradient ``size`` = [N, Cin, H, W] of a convolution's input, which is not read."""
    kernel = weight.shape[2:]
    if _pointwise(weight, stride, padding, groups) and grad.numel():
        n, channels, h, w = size
        if channels_last and _fast_float32(grad) and h * w >= _ONEDNN_PIXELS:
            mirrored = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last)
            return torch.mkldnn_convolution(grad, mirrored, None, padding, stride, dilation, 1)
        if channels_last:
            return torch.mm(_as_rows(grad), weight.flatten(1)).view(n, h, w, -1).permute(0, 3, 1, 2)
        # The transposed matrix as it lies: no copy of the weight, which is large where planes are
        # small.
        matrix = weight.flatten(1).t()
        planes = grad.contiguous().flatten(2)
        if n > 1 and h * w <= _MERGED_PIXELS:
            columns = torch.mm(matrix, planes.transpose(0, 1).reshape(grad.shape[1], -1))
            return columns.view(channels, n, h, w).transpose(0, 1).contiguous()
        return torch.matmul(matrix, planes).view(tuple(size))
    # The rows and columns behind the last window.
    rest = [
        size[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i]
                       + dilation[i] * (kernel[i] - 1) + 1)
        for i in range(2)
    ]  # fmt: skip
    return F.conv_transpose2d(grad, weight, None, stride, padding, rest, groups, dilation)


def _as_rows(t: torch.Tensor) -> torch.Tensor:
    """``[N * H * W, C]`` of a channels_last tensor."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])
