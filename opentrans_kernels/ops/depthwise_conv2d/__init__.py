"""``depthwise_conv2d``: each channel with a window of its own, in the kernels' plane-padded layout.

``out = act(conv2d(x, weight, stride, padding, groups=C) + bias)``. float32; results do not depend
on the number of threads or on the batch.
"""

from __future__ import annotations

import torch

from ...activations import NONE, Activation
from ..arguments import activation as checked_activation
from ..arguments import conv_size, image
from ..library import define, kernel_for, plane_padded

__all__ = ["depthwise_conv2d"]

_NAME = "depthwise_conv2d"


def _fake(x, weight, bias, stride, padding, activation=0, slope=0.0):
    size = image(_NAME, x)
    return plane_padded(x, *size[:2], *conv_size(size, weight.shape[2], stride, padding, _NAME))


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, ctx.stride, ctx.padding, *act = inputs
    ctx.act = checked_activation(_NAME, False, *act)
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad: torch.Tensor):
    x, weight, bias = ctx.saved_tensors
    if ctx.act:  # what it was applied to is computed again
        z = torch.ops.opentrans_kernels.depthwise_conv2d(x, weight, bias, ctx.stride, ctx.padding)
        grad = ctx.act.gradient(grad, z)
    channels, pair = x.shape[1], [ctx.stride, ctx.stride]
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, [channels], pair, [ctx.padding, ctx.padding], [1, 1], False, [0, 0],
        channels, needs,
    )  # fmt: skip
    return *grads, *(None,) * 4


OP = define(
    _NAME,
    "(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, int activation=0, "
    "float slope=0.0) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:depthwise_conv2d",
    backward=_backward,
    setup_context=_setup,
)


def depthwise_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    activation: Activation = NONE,
) -> torch.Tensor:
    """Convolve every channel with its own window; differentiable in x, weight and bias.

    Args:
        x: ``[N, C, H, W]``, any strides. float32 on the compiled backend; rows that are dense are
            read in place, other layouts are repacked inside the kernel.
        weight: ``[C, 1, k, k]``. bias: ``[C]``.
        stride, padding: in pixels, zeros outside.
        activation: applied last; NaN stays NaN.

    Returns:
        ``[N, C, H', W']`` with dense rows and padded planes (``flatten(2)`` is a view).

    Raises:
        KernelUnavailable: no kernel for this device and dtype.
        RuntimeError: shapes or dtypes that do not fit, or an image smaller than the window.
    """
    return kernel_for(_NAME, x)(x, weight, bias, stride, padding, activation.kind, activation.slope)
