"""``avg_pool2d``: k x k average pooling with stride k, in the kernels' plane-padded layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import native
from ..arguments import image, pooled_size
from ..library import LIBRARY, NAMESPACE, define, kernel_for, plane_padded
from . import reference

__all__ = ["avg_pool2d", "avg_pool2d_backward"]

LIBRARY.define("avg_pool2d_backward(Tensor grad, Tensor(a!) out, int k) -> ()")
torch.library.register_fake(
    f"{NAMESPACE}::avg_pool2d_backward", lambda grad, out, k: None, lib=LIBRARY
)
if not native.load():
    LIBRARY.impl("avg_pool2d_backward", reference.avg_pool2d_backward, "CPU")
BACKWARD = torch.ops.opentrans_kernels.avg_pool2d_backward.default


def _fake(x: torch.Tensor, k: int) -> torch.Tensor:
    n, c, *_ = image("avg_pool2d", x)
    return plane_padded(x, n, c, *pooled_size("avg_pool2d", x.shape, k))


def _setup(ctx, inputs, output) -> None:
    x, ctx.k = inputs
    ctx.size = x.shape


def _backward(ctx, grad: torch.Tensor):
    return reference.spread(grad, ctx.size, ctx.k), None


OP = define(
    "avg_pool2d",
    "(Tensor x, int k) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:avg_pool2d",
    backward=_backward,
    setup_context=_setup,
)


def avg_pool2d(x: torch.Tensor, k: int) -> torch.Tensor:
    """Mean over ``k x k`` windows, stride ``k``; like ``torch.nn.AvgPool2d(k)``.

    Args:
        x: ``[N, C, H, W]``, float32; float64 on the reference.
        k: window and stride, in pixels.

    Raises:
        KernelUnavailable: no kernel for this device and dtype.
        RuntimeError: not four dimensions, or an image smaller than the window.
    """
    run = kernel_for("avg_pool2d", x)
    pooled_size("avg_pool2d", image("avg_pool2d", x), k)
    return run(x, k)


def avg_pool2d_backward(grad: torch.Tensor, size: Sequence[int], k: int) -> torch.Tensor:
    """The gradient of the input, contiguous ``size`` = [N, C, H, W]. No autograd.

    Args:
        grad: ``[N, C, H // k, W // k]``, float32 or float64, dense planes.

    Raises:
        KernelUnavailable: no kernel for this device and dtype.
    """
    out = grad.new_empty(tuple(size))
    if out.numel():
        kernel_for("avg_pool2d_backward", grad)(grad, out, k)
    return out
