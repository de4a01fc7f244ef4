"""A dense 3x3 convolution in plain PyTorch, by the weight that the transformed one came from."""

from __future__ import annotations

import torch.nn.functional as F

from ...pack.winograd import plain_weight
from .. import arguments
from ..library import in_float32, plane_padded

__all__ = ["winograd_conv2d"]


@in_float32
def winograd_conv2d(x, weight, bias, residual, cout, padding, activation=0, slope=0.0):
    """See :func:`opentrans_kernels.ops.winograd_conv2d`; the op's arguments in schema order."""
    act = arguments.activation("winograd_conv2d", False, activation, slope)
    arguments.winograd(x, weight, bias, residual, cout, padding)
    y = F.conv2d(x, plain_weight(weight, cout), bias, padding=padding)
    if residual is not None:
        y = y + residual
    return plane_padded(y, *y.shape).copy_(act.apply_(y))
