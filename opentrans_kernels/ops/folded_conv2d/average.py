"""``mean_pool2d``: average pooling that keeps the shape of its input, not the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..arguments import image, pooled_size
from ..avg_pool2d import avg_pool2d_backward
from ..library import LIBRARY, NAMESPACE, kernel_for, plane_padded, plane_stride
from ..relu_bits import has_channels_last

__all__ = ["mean_pool2d"]

LIBRARY.define("mean_pool2d(Tensor x, int k) -> Tensor")
LIBRARY.define("mean_pool2d_backward(Tensor grad, int[] size, int k, bool channels_last) -> Tensor")


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _padded(x: torch.Tensor) -> bool:
    """Whether ``x`` has the planes of the sparse kernels, which the result then has too."""
    h, w = x.shape[2:]
    strides = (x.shape[1] * plane_stride(h * w), plane_stride(h * w), w, 1)
    return x.dtype == torch.float32 and not x.is_contiguous() and x.stride() == strides


def _planar(t: torch.Tensor) -> bool:
    """Whether the kernels on planes serve ``t``; PyTorch is slow there, fast in channels_last."""
    return t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous()


def _forward(x, k):
    if _padded(x) or _planar(x):
        y = kernel_for("avg_pool2d", x)(x, k)
        # Always a copy: storage of the kernels ends with a cache line that belongs to nobody.
        return y if _padded(x) else y.clone(memory_format=torch.contiguous_format)
    layout = _layout(has_channels_last(x))
    return F.avg_pool2d(x, k).contiguous(memory_format=layout)


def _fake(x, k):
    n, c, *_ = image("mean_pool2d", x)
    size = (n, c, *pooled_size("mean_pool2d", x.shape, k))
    if _padded(x):
        return plane_padded(x, *size)
    layout = _layout(has_channels_last(x))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


def _backward(grad, size, k, channels_last):
    layout = _layout(channels_last)
    grad = grad.contiguous(memory_format=layout)
    if not channels_last and _planar(grad):
        return avg_pool2d_backward(grad, size, k)
    # PyTorch's formula asks for the input and reads its shape only: memory nobody writes to.
    like = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)
    return torch.ops.aten.avg_pool2d_backward(
        grad, like, [k, k], [k, k], [0, 0], False, True, None
    ).contiguous(memory_format=layout)


def _backward_fake(grad, size, k, channels_last):
    return torch.empty(
        tuple(size), dtype=grad.dtype, device=grad.device, memory_format=_layout(channels_last)
    )


def _setup(ctx, inputs, output) -> None:
    x, ctx.k = inputs
    ctx.size, ctx.channels_last = list(x.shape), has_channels_last(x)


def _autograd(ctx, grad):
    op = torch.ops.opentrans_kernels.mean_pool2d_backward
    return op(grad, ctx.size, ctx.k, ctx.channels_last), None


for _name, _kernel, _shape in (
    ("mean_pool2d", _forward, _fake),
    ("mean_pool2d_backward", _backward, _backward_fake),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shape, lib=LIBRARY)
torch.library.register_autograd(
    f"{NAMESPACE}::mean_pool2d", _autograd, setup_context=_setup, lib=LIBRARY
)


def mean_pool2d(x: torch.Tensor, k: int) -> torch.Tensor:
    """``AvgPool2d(k)`` of ``[N, C, H, W]``, contiguous or channels_last, which the result follows.

    Rows and columns that fill no window are dropped. Keeps nothing for backward.
    """
    return torch.ops.opentrans_kernels.mean_pool2d(x, k)
