"""A sparse linear layer in plain PyTorch: oracle, gradcheck subject and fallback in one.

Works on any device and in any floating dtype, float64 included.
"""

from __future__ import annotations

import torch.nn.functional as F

from ...pack import dense_weight
from .. import arguments
from ..library import in_float32

__all__ = ["linear", "sparse_linear"]


def linear(op, x, structure, values, bias):
    """``x W^T + bias`` with checked arguments."""
    header = arguments.linear(op, x, structure, values, bias)
    weight = dense_weight(structure, values, header.cin, header.cout, 1)[:, :, 0, 0].to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@in_float32
def sparse_linear(x, structure, values, bias, residual, cout, activation=0, slope=0.0):
    """See :func:`opentrans_kernels.ops.sparse_linear`; the op's arguments in schema order."""
    op = "sparse_linear"
    act = arguments.activation(op, False, activation, slope)
    y = linear(op, x, structure, values, bias)
    arguments.result(op, y.shape, cout, residual)
    if residual is not None:
        y = y + residual
    return act.apply_(y)
