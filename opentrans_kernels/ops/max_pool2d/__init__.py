"""``max_pool2d``: maxima of any windows, in the kernels' plane-padded layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments import image, pair, window_pooled_size
from ..library import define, kernel_for, plane_padded
from . import reference

__all__ = ["max_pool2d"]


def _fake(x, window, stride, padding, ceil_mode):
    n, c, *size = image("max_pool2d", x)
    return plane_padded(
        x, n, c, *window_pooled_size("max_pool2d", size, window, stride, padding, ceil_mode)
    )


def _setup(ctx, inputs, output) -> None:
    x, *ctx.geometry = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad: torch.Tensor):
    (x,) = ctx.saved_tensors
    return reference.spread(grad, x, *ctx.geometry), None, None, None, None


OP = define(
    "max_pool2d",
    "(Tensor x, int[] window, int[] stride, int[] padding, bool ceil_mode) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:max_pool2d",
    backward=_backward,
    setup_context=_setup,
)


def max_pool2d(
    x: torch.Tensor,
    window: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """Maxima of windows; the bits of ``torch.nn.functional.max_pool2d``, NaN included.

    Args:
        x: ``[N, C, H, W]``, float32; float64 on the reference. Any strides.
        window, stride, padding: in pixels; one number, or one for rows and one for columns.
            stride: None: the window. padding: at most half the window; it never is a maximum.
        ceil_mode: also windows that reach behind the padded image.

    Returns:
        ``[N, C, H', W']`` in the kernels' layout. Backward gives the gradient to the pixel that
        torch gives it to.

    Raises:
        KernelUnavailable: no kernel for this device and dtype.
        RuntimeError: not four dimensions, numbers that do not fit, or an image smaller than the
            window.
    """
    run = kernel_for("max_pool2d", x)
    window = pair("max_pool2d", "window", window)
    stride = window if stride is None else pair("max_pool2d", "stride", stride)
    padding = pair("max_pool2d", "padding", padding)
    window_pooled_size("max_pool2d", image("max_pool2d", x), window, stride, padding, ceil_mode)
    return run(x, window, stride, padding, ceil_mode)
