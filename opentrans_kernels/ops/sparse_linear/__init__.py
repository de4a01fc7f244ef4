"""``sparse_linear``: a linear layer that visits the nonzeros of its weight only.

``out = act(x W^T + bias + residual)`` for tokens ``[..., in]``. The weight is packed as a 1x1
convolution; a group of tokens is turned into planes inside the kernel, so nothing has to be
transposed around it. float32, accumulated in a fixed order: results depend neither on the number of
threads nor on how many tokens there are.
"""

from __future__ import annotations

import torch

from ...activations import NONE, Activation
from ...pack import SparseWeight
from ..arguments import activation as checked_activation
from ..arguments import tokens
from ..library import define, kernel_for

__all__ = ["as_planes", "sparse_linear"]

_NAME = "sparse_linear"


def _fake(x, structure, values, bias, residual, cout, activation=0, slope=0.0):
    return x.new_empty((*tokens(_NAME, x)[:-1], cout))


def _setup(ctx, inputs, output) -> None:
    x, structure, values, bias, residual, ctx.cout, *act = inputs
    ctx.act = checked_activation(_NAME, False, *act)
    more = (bias, residual) if ctx.act else ()  # what it was applied to is computed again
    ctx.save_for_backward(x, structure, values, *more)


def as_planes(x: torch.Tensor) -> torch.Tensor:
    """Tokens ``[..., C]`` as one image ``[1, C, tokens, 1]``."""
    return x.reshape(-1, x.shape[-1]).t()[None, :, :, None]


def input_gradient(grad, structure, values, cin):
    """``[..., cin]`` from ``[..., cout]``."""
    planes = torch.ops.opentrans_kernels.sparse_conv2d_dgrad(
        as_planes(grad), structure, values, cin, grad.shape[:-1].numel(), 1, 1, 0
    )
    return planes[0, :, :, 0].t().reshape(*grad.shape[:-1], cin)


def weight_gradient(x, grad, structure, values):
    """Of the packed values."""
    return torch.ops.opentrans_kernels.sparse_conv2d_wgrad(
        as_planes(x), as_planes(grad), structure, values
    )


def _backward(ctx, grad: torch.Tensor):
    x, structure, values, *more = ctx.saved_tensors
    if ctx.act:
        z = torch.ops.opentrans_kernels.sparse_linear(x, structure, values, *more, ctx.cout)
        grad = ctx.act.gradient(grad, z)
    need_x, _, need_values, need_bias, need_residual = ctx.needs_input_grad[:5]
    grad_x = input_gradient(grad, structure, values, x.shape[-1]) if need_x else None
    grad_values = weight_gradient(x, grad, structure, values) if need_values else None
    grad_bias = grad.reshape(-1, ctx.cout).sum(0) if need_bias else None
    return grad_x, None, grad_values, grad_bias, grad if need_residual else None, *(None,) * 3


OP = define(
    _NAME,
    "(Tensor x, Tensor structure, Tensor values, Tensor? bias, Tensor? residual, int cout, "
    "int activation=0, float slope=0.0) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:sparse_linear",
    backward=_backward,
    setup_context=_setup,
)


def sparse_linear(
    x: torch.Tensor,
    weight: SparseWeight,
    residual: torch.Tensor | None = None,
    activation: Activation = NONE,
) -> torch.Tensor:
    """Apply a packed linear layer; differentiable in x, weight.values, weight.bias, residual.

    Args:
        x: ``[..., in]``. float32 on the compiled backend; tokens that lie evenly, their channels
            densely, are read in place, others are copied.
        weight: ``SparseWeight.from_dense(linear.weight[:, :, None, None], linear.bias)``.
        residual: ``[..., out]``, added before the activation.
        activation: applied last; NaN stays NaN.

    Returns:
        ``[..., out]``, contiguous.

    Raises:
        KernelUnavailable: no kernel for this device and dtype.
        RuntimeError: shapes or dtypes that do not fit, or a packed convolution with a window.
    """
    return kernel_for(_NAME, x)(
        x, weight.structure, weight.values, weight.bias, residual, weight.cout,
        activation.kind, activation.slope,
    )  # fmt: skip
