"""``sparse_conv2d``: a convolution that visits the nonzeros of its weight only.

``out = act(conv2d(x, W, ...) + bias + residual)`` where ``W`` is zero outside the packed nonzeros
and ``act`` is one of :mod:`opentrans_kernels.activations`. float32, accumulated in
float32 in a fixed order: results do not depend on the number of threads or on the batch. A product
with a dropped zero is not computed, so a NaN or Inf activation does not spread through it (dense
arithmetic would give ``0 * Inf = NaN``).
"""

from __future__ import annotations

import torch

from ...activations import NONE, Activation, Kind
from ...pack import SparseWeight
from ..arguments import activation as checked_activation
from ..arguments import conv_size, image
from ..library import define, kernel_for, plane_padded

__all__ = ["sparse_conv2d"]


def _fake(
    x, structure, values, bias, residual, cout, kernel, stride, padding, relu,
    activation=0, slope=0.0, dilation=1,
):  # fmt: skip
    size = image("sparse_conv2d", x)
    size_out = conv_size(size, kernel, stride, padding, dilation=dilation)
    return plane_padded(x, size[0], cout, *size_out)


def _setup(ctx, inputs, output) -> None:
    x, structure, values, bias, residual, cout, kernel, ctx.stride, ctx.padding, *act = inputs
    *act, dilation = act
    ctx.act = checked_activation("sparse_conv2d", *act)
    # A ReLU's result says where it clamped. What others were applied to is computed again.
    again = (cout, kernel, ctx.stride, ctx.padding, False, 0, 0.0, dilation)
    ctx.again = again if ctx.act.kind > Kind.RELU else None
    more = (bias, residual) if ctx.again else (output if ctx.act else None,)
    ctx.save_for_backward(x, structure, values, *more)


def _backward(ctx, grad: torch.Tensor):
    ops = torch.ops.opentrans_kernels
    x, structure, values, *more = ctx.saved_tensors
    if ctx.act:
        z = ops.sparse_conv2d(x, structure, values, *more, *ctx.again) if ctx.again else more[0]
        grad = ctx.act.gradient(grad, z)
    need_x, _, need_values, need_bias, need_residual = ctx.needs_input_grad[:5]
    grad_x = grad_values = None
    if need_x:
        grad_x = ops.sparse_conv2d_dgrad(
            grad, structure, values, x.shape[1], x.shape[2], x.shape[3], ctx.stride, ctx.padding
        )
    if need_values:
        grad_values = ops.sparse_conv2d_wgrad(x, grad, structure, values)
    grad_bias = grad.sum((0, 2, 3)) if need_bias else None
    grad_residual = grad if need_residual else None
    return grad_x, None, grad_values, grad_bias, grad_residual, *(None,) * 8


OP = define(
    "sparse_conv2d",
    "(Tensor x, Tensor structure, Tensor values, Tensor? bias, Tensor? residual, int cout, "
    "int kernel, int stride, int padding, bool relu, int activation=0, float slope=0.0, "
    "int dilation=1) -> Tensor",
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
    activation: Activation = NONE,
) -> torch.Tensor:
    """Convolve with a packed weight; differentiable in x, weight.values, weight.bias, residual.

    Args:
        x: ``[N, cin, H, W]``, any strides. float32 on the compiled backend; planes whose rows are
            dense are read in place, other layouts are repacked inside the kernel.
        weight: packed convolution; stride and padding are its own.
        residual: ``[N, cout, H', W']``, added before the activation.
        relu: clamp at zero; NaN stays NaN. Short for ``activation=RELU``.
        activation: applied last; NaN stays NaN.

    Returns:
        ``[N, cout, H', W']`` with dense rows and padded planes (``flatten(2)`` is a view).

    Raises:
        KernelUnavailable: no kernel for this device and dtype.
        RuntimeError: shapes or dtypes that do not fit the packed convolution.
    """
    return kernel_for("sparse_conv2d", x)(
        x, weight.structure, weight.values, weight.bias, residual,
        weight.cout, weight.kernel, weight.stride, weight.padding, relu,
        activation.kind, activation.slope, weight.dilation,
    )  # fmt: skip
