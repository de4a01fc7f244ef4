"""``window_avg_pool2d``: means of any windows, in the kernels' plane-padded layout.

Windows that neither overlap nor reach over the border are those of ``avg_pool2d``, which is faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments import BadArgument, image, pair, window_pooled_size
from ..library import define, kernel_for, plane_padded
from . import reference

__all__ = ["window_avg_pool2d"]


def _fake(x, window, stride, padding, ceil_mode, count_include_pad, divisor):
    n, c, *size = image("window_avg_pool2d", x)
    return plane_padded(
        x, n, c, *window_pooled_size("window_avg_pool2d", size, window, stride, padding, ceil_mode)
    )


def _setup(ctx, inputs, output) -> None:
    x, *ctx.geometry = inputs
    ctx.size = x.shape


def _backward(ctx, grad: torch.Tensor):
    return reference.spread(grad, ctx.size, *ctx.geometry), None, None, None, None, None, None


OP = define(
    "window_avg_pool2d",
    "(Tensor x, int[] window, int[] stride, int[] padding, bool ceil_mode, "
    "bool count_include_pad, int divisor) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:window_avg_pool2d",
    backward=_backward,
    setup_context=_setup,
)


def window_avg_pool2d(
    x: torch.Tensor,
    window: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """Means of windows, as ``torch.nn.functional.avg_pool2d`` takes them.

    Args:
        x: ``[N, C, H, W]``, float32; float64 on the reference. Any strides.
        window, stride, padding, ceil_mode: see :func:`opentrans_kernels.ops.max_pool2d`.
        count_include_pad: whether a mean counts the zeros of the padding.
        divisor_override: divide sums by this number instead.

    Returns:
        ``[N, C, H', W']`` in the kernels' layout.

    Raises:
        KernelUnavailable: no kernel for this device and dtype.
        RuntimeError: not four dimensions, numbers that do not fit, or an image smaller than the
            window.
    """
    op = "window_avg_pool2d"
    run = kernel_for(op, x)
    window = pair(op, "window", window)
    stride = window if stride is None else pair(op, "stride", stride)
    padding = pair(op, "padding", padding)
    if divisor_override == 0:
        raise BadArgument(f"{op}: divisor_override is 0. Pass another number, or None.")
    window_pooled_size(op, image(op, x), window, stride, padding, ceil_mode)
    return run(x, window, stride, padding, ceil_mode, count_include_pad, divisor_override or 0)
