"""``avg_pool2d``: k x k average pooling with stride k, in the kernels' plane-padded layout."""

from __future__ import annotations

import torch

from ..arguments import image, pooled_size
from ..library import define, kernel_for, plane_padded

__all__ = ["avg_pool2d"]


def _fake(x: torch.Tensor, k: int) -> torch.Tensor:
    n, c, *_ = image("avg_pool2d", x)
    return plane_padded(x, n, c, *pooled_size("avg_pool2d", x.shape, k))


def _setup(ctx, inputs, output) -> None:
    x, ctx.k = inputs
    ctx.size = x.shape


def _backward(ctx, grad: torch.Tensor):
    # Every pixel of a window gets the same share; rows and columns outside all windows get none.
    spread = grad.repeat_interleave(ctx.k, 2).repeat_interleave(ctx.k, 3) / ctx.k**2
    pad = (0, ctx.size[3] - spread.shape[3], 0, ctx.size[2] - spread.shape[2])
    return torch.nn.functional.pad(spread, pad), None


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
