"""Depthwise convolution in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F

from .. import arguments
from ..library import in_float32, plane_padded

__all__ = ["depthwise_conv2d"]


@in_float32
def depthwise_conv2d(x, weight, bias, stride, padding, activation=0, slope=0.0):
    """See :func:`opentrans_kernels.ops.depthwise_conv2d`; the op's arguments in schema order."""
    act = arguments.activation("depthwise_conv2d", False, activation, slope)
    arguments.depthwise(x, weight, bias, stride, padding)
    y = F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])
    return plane_padded(y, *y.shape).copy_(act.apply_(y))
