"""Sparse convolution in plain PyTorch: oracle, gradcheck subject and fallback in one.

Works on any device and in any floating dtype, float64 included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...pack import dense_weight
from ..library import plane_padded

__all__ = ["sparse_conv2d", "sparse_conv2d_wgrad"]


def sparse_conv2d(x, structure, values, bias, residual, cout, kernel, stride, padding, relu):
    """See :func:`opentrans_kernels.ops.sparse_conv2d`; the op's arguments in schema order."""
    weight = dense_weight(structure, values, x.shape[1], cout, kernel).to(x.dtype)
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)
    if residual is not None:
        y = y + residual
    if relu:
        y = y.relu()
    return plane_padded(y, *y.shape).copy_(y)


def sparse_conv2d_wgrad(x, grad_out, structure, values):
    """Gradient of the packed values, ``[nnz]``: the dense weight gradient, gathered."""
    _, _, cin, cout, kernel, stride, padding = structure[:7].tolist()
    with torch.enable_grad():
        leaf = values.detach().clone().requires_grad_()
        weight = dense_weight(structure, leaf, cin, cout, kernel).to(x.dtype)
        y = F.conv2d(x.detach(), weight, None, stride, padding)
        (grad,) = torch.autograd.grad(y, leaf, grad_out.detach())
    return grad
