"""``sparse_conv2d``: a convolution that visits the nonzeros of its weight only.

``out = act(conv2d(x, W, stride, padding) + bias + residual)`` where ``W`` is zero outside the
packed nonzeros. float32, accumulated in float32 in a fixed order: results do not depend on the
number of threads or on the batch. A product with a dropped zero is not computed, so a NaN or Inf
activation does not spread through it (dense arithmetic would give ``0 * Inf = NaN``).
"""

from __future__ import annotations

import torch

from ...pack import SparseWeight
from ..arguments import conv_size, image
from ..library import define, kernel_for, plane_padded

__all__ = ["sparse_conv2d"]


def _fake(x, structure, values, bias, residual, cout, kernel, stride, padding, relu):
    size = image("sparse_conv2d", x)
    return plane_padded(x, size[0], cout, *conv_size(size, kernel, stride, padding))


def _setup(ctx, inputs, output) -> None:
    x, structure, values, _, _, _, _, ctx.stride, ctx.padding, relu = inputs
    ctx.save_for_backward(x, structure, values, output if relu else None)


def _backward(ctx, grad: torch.Tensor):
    x, structure, values, out = ctx.saved_tensors
    if out is not None:
        grad = torch.where(out <= 0, 0.0, grad)
    need_x, _, need_values, need_bias, need_residual = ctx.needs_input_grad[:5]
    ops = torch.ops.opentrans_kernels
    grad_x = grad_values = None
    if need_x:
        grad_x = ops.sparse_conv2d_dgrad(
            grad, structure, values, x.shape[1], x.shape[2], x.shape[3], ctx.stride, ctx.padding
        )
    if need_values:
        grad_values = ops.sparse_conv2d_wgrad(x, grad, structure, values)
    grad_bias = grad.sum((0, 2, 3)) if need_bias else None
    grad_residual = grad if need_residual else None
    return grad_x, None, grad_values, grad_bias, grad_residual, None, None, None, None, None


OP = define(
    "sparse_conv2d",
    "(Tensor x, Tensor structure, Tensor values, Tensor? bias, Tensor? residual, int cout, "
    "int kernel, int stride, int padding, bool relu) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:sparse_conv2d",
    backward=_backward,
    setup_context=_setup,
)
WGRAD = define(
    "sparse_conv2d_wgrad",
    "(Tensor x, Tensor grad_out, Tensor structure, Tensor values) -> Tensor",
    fake=lambda x, grad_out, structure, values: torch.empty_like(values),
    fallback=f"{__name__}.reference:sparse_conv2d_wgrad",
)
from . import dgrad as _dgrad  # noqa: E402, F401  (defines the op that _backward calls)


def sparse_conv2d(
    x: torch.Tensor,
    weight: SparseWeight,
    residual: torch.Tensor | None = None,
    relu: bool = False,
) -> torch.Tensor:
    """Convolve with a packed weight; differentiable in x, weight.values, weight.bias, residual.

    Args:
        x: ``[N, cin, H, W]``, any strides. float32 on the compiled backend; planes whose rows are
            dense are read in place, other layouts are repacked inside the kernel.
        weight: packed convolution; stride and padding are its own.
        residual: ``[N, cout, H', W']``, added before the activation.
        relu: clamp at zero; NaN stays NaN.

    Returns:
        ``[N, cout, H', W']`` with dense rows and padded planes (``flatten(2)`` is a view).

    Raises:
        KernelUnavailable: no kernel for this device and dtype.
        RuntimeError: shapes or dtypes that do not fit the packed convolution.
    """
    return kernel_for("sparse_conv2d", x)(
        x, weight.structure, weight.values, weight.bias, residual,
        weight.cout, weight.kernel, weight.stride, weight.padding, relu,
    )  # fmt: skip
