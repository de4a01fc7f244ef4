"""Sparse convolution in plain PyTorch: oracle, gradcheck subject and fallback in one.

Works on any device and in any floating dtype, float64 included.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from ...pack import dense_weight, packed_indices
from .. import arguments
from ..library import in_float32, plane_padded

__all__ = ["sparse_conv2d", "sparse_conv2d_wgrad"]


@in_float32
def sparse_conv2d(
    x, structure, values, bias, residual, cout, kernel, stride, padding, relu,
    activation=0, slope=0.0, dilation=1,
):  # fmt: skip
    """See :func:`opentrans_kernels.ops.sparse_conv2d`; the op's arguments in schema order."""
    act = arguments.activation("sparse_conv2d", relu, activation, slope)
    arguments.convolution(
        x, structure, values, bias, residual, cout, kernel, stride, padding, dilation
    )
    weight = dense_weight(structure, values, x.shape[1], cout, kernel).to(x.dtype)
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding, dilation)
    if residual is not None:
        y = y + residual
    return plane_padded(y, *y.shape).copy_(act.apply_(y))


@in_float32
def sparse_conv2d_wgrad(x, grad_out, structure, values):
    """Gradient of the packed values, ``[nnz]``: the dense weight gradient, gathered."""
    header = arguments.packed_header("sparse_conv2d_wgrad", structure)
    arguments.gradient("sparse_conv2d_wgrad", header, grad_out, x.shape)
    cin, cout, kernel, stride, padding = header[:5]
    dense = conv2d_weight(
        x, (cout, cin, kernel, kernel), grad_out, stride, padding, header.dilation
    )
    return dense.flatten()[packed_indices(structure)].to(values.dtype)
