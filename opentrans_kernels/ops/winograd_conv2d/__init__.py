"""``winograd_conv2d``: a dense 3x3 convolution of stride 1 with 16 products for 36.

``out = act(conv2d(x, W, padding=padding) + bias + residual)`` by Winograd's F(2x2, 3x3), in the
kernels' plane-padded layout. float32; the largest error of a map is that of a direct convolution or
less, relative to the largest output of a tile's neighbourhood; results do not depend on the number
of threads or on the batch. Sums of neighbouring pixels are formed, so a NaN or Inf reaches all four
outputs of a 2x2 tile whose 4x4 inputs hold it.
"""

from __future__ import annotations

import torch

from ...activations import NONE, Activation
from ...pack.winograd import plain_gradient, plain_weight
from ..arguments import activation as checked_activation
from ..arguments import conv_size, image
from ..library import define, kernel_for, plane_padded

__all__ = ["winograd_conv2d"]

_NAME = "winograd_conv2d"


def _fake(x, weight, bias, residual, cout, padding, activation=0, slope=0.0):
    size = image(_NAME, x)
    return plane_padded(x, size[0], cout, *conv_size(size, 3, 1, padding, _NAME))


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, residual, ctx.cout, ctx.padding, *act = inputs
    ctx.act = checked_activation(_NAME, False, *act)
    ctx.save_for_backward(x, weight, bias, residual)


def _backward(ctx, grad: torch.Tensor):
    x, weight, bias, residual = ctx.saved_tensors
    if ctx.act:  # what it was applied to is computed again
        z = torch.ops.opentrans_kernels.winograd_conv2d(
            x, weight, bias, residual, ctx.cout, ctx.padding
        )
        grad = ctx.act.gradient(grad, z)
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    pair = [ctx.padding, ctx.padding]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, plain_weight(weight, ctx.cout), [ctx.cout], [1, 1], pair, [1, 1], False, [0, 0],
        1, [need_x, need_weight, need_bias],
    )  # fmt: skip
    grad_weight = plain_gradient(grad_weight) if need_weight else None
    return grad_x, grad_weight, grad_bias, grad if need_residual else None, *(None,) * 4


OP = define(
    _NAME,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int cout, int padding, "
    "int activation=0, float slope=0.0) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:winograd_conv2d",
    backward=_backward,
    setup_context=_setup,
)


def winograd_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    cout: int,
    padding: int = 1,
    activation: Activation = NONE,
) -> torch.Tensor:
    """Convolve densely by 3x3 windows; differentiable in x, weight, bias and residual.

    Args:
        x: ``[N, cin, H, W]``, any strides. float32 on the compiled backend.
        weight: ``[16, ceil(cout / 8), cin, 8]`` of ``pack.winograd.transform_weight``.
        bias: ``[cout]``.
        residual: ``[N, cout, H', W']``, added before the activation.
        cout: output channels. padding: in pixels, zeros outside.
        activation: applied last.

    Returns:
        ``[N, cout, H', W']`` with dense rows and padded planes (``flatten(2)`` is a view).

    Raises:
        KernelUnavailable: no kernel for this device and dtype.
        RuntimeError: shapes or dtypes that do not fit, or an image smaller than the window.
    """
    return kernel_for(_NAME, x)(
        x, weight, bias, residual, cout, padding, activation.kind, activation.slope
    )
