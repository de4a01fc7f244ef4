"""``implicit_gemm_conv2d``: a 1x1 or 3x3 convolution, stride 1, with all that surrounds it.

    y = pool(relu(conv(x[channels], W) + conv1x1(pool2(x2), W2) + bias + residual))

Slices of the weight that are all zero can be left out (:func:`live_slices`).

One launch for what a bottleneck does between two activations: batch norm folded into weight and
bias, the shortcut's convolution as a second K segment, the average pools of CLIP's ResNets on the
way in or out. Every part is optional. Products are summed in float32 whatever the dtype.

The input gradient is the same operator: with stride 1 it is a convolution of the output's gradient
with the taps reversed and inputs and outputs exchanged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..library import once_differentiable
from ..nhwc import define_nhwc, empty_nhwc, nhwc
from .reference import unpacked
from .shapes import check

__all__ = ["implicit_gemm_conv2d", "live_pieces", "live_slices", "pack_weight", "reversed_weight"]


def pack_weight(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``[k * k, Cin, Cout]`` of a weight ``[Cout, Cin, k, k]``, in ``dtype``."""
    cout, cin, k, _ = weight.shape
    packed = weight.permute(2, 3, 1, 0).reshape(k * k, cin, cout)
    return packed.to(dtype or weight.dtype).contiguous()


def live_pieces(weight: torch.Tensor, columns: int, depth: int) -> torch.Tensor:
    """Where a packed weight has nonzeros, bool ``[taps, ceil(Cin / depth), ceil(Cout / columns)]``.

    Of its own result it takes coarser pieces.
    """
    _, cin, cout = weight.shape
    live = F.pad(weight != 0, (0, -cout % columns, 0, -cin % depth))
    return live.unflatten(2, (-1, columns)).any(3).unflatten(1, (-1, depth)).any(2)


def live_slices(weight: torch.Tensor, config: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(begin, steps), int32: where a packed weight has nonzeros, in pieces of a tile.

    A slice is ``config[1]`` output channels x ``config[2]`` input channels of one tap. Column tile
    t has ``steps[begin[t]:begin[t + 1]]``, each ``tap << 16 | number of the slice in its tap``; one
    more step follows the last, for a kernel that reads ahead.
    """
    live = live_pieces(weight, *config[1:3])
    tile, tap, piece = live.permute(2, 0, 1).nonzero().T  # sorted by tile, tap, channel
    counts = torch.bincount(tile, minlength=live.shape[2])
    begin = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return begin, F.pad(tap << 16 | piece, (0, 1)).to(torch.int32)


def reversed_weight(weight: torch.Tensor) -> torch.Tensor:
    """The packed weight of the input gradient: ``[taps, Cout, Cin]``, taps reversed."""
    return weight.flip(0).transpose(1, 2).contiguous()


def _fake(
    x, weight, bias, channels, residual, x2, weight2, kernel, pool, pool2, relu, tf32, config=(),
    begin=None, steps=None,
):  # fmt: skip
    size = check(
        x, weight, bias, channels, residual, x2, weight2, kernel, pool, pool2, config, begin, steps
    )
    return empty_nhwc(x, *size)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, channels, residual, x2, weight2, *rest = inputs
    ctx.rest = rest[:5]
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, weight, bias, channels, x2, weight2, output)


def _spread(grad: torch.Tensor, pool: int, h: int, w: int) -> torch.Tensor:
    """Gradient of an average pool: every window's share to each of its pixels, zero beyond."""
    if pool == 1:
        return grad
    wide = F.interpolate(grad, scale_factor=pool, mode="nearest") / pool**2
    return F.pad(wide, (0, w - wide.shape[3], 0, h - wide.shape[2]))


def _dgrad(grad: torch.Tensor, weight: torch.Tensor, kernel: int, tf32: bool) -> torch.Tensor:
    zeros = grad.new_zeros(
        weight.shape[1], dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32
    )
    return OP(
        grad, reversed_weight(weight), zeros, None, None, None, None, kernel, 1, 1, False, tf32
    )


def _wgrad(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, kernel: int) -> torch.Tensor:
    """Gradient of a packed weight; PyTorch's dense kernels win here, zeros or not."""
    dense = unpacked(weight, kernel).contiguous(memory_format=torch.channels_last)
    padding = [kernel // 2] * 2
    found = torch.ops.aten.convolution_backward(
        grad, x, dense, None, [1, 1], padding, [1, 1], False, [0, 0], 1, (False, True, False)
    )[1]
    return pack_weight(found, weight.dtype)


def _backward(ctx, grad):
    once_differentiable("implicit_gemm_conv2d")
    x, weight, bias, channels, x2, weight2, y = ctx.saved_tensors
    kernel, pool, pool2, relu, tf32 = ctx.rest
    needs = ctx.needs_input_grad
    h, w = x.shape[2:]
    if relu and pool > 1:  # the pool hides which pixels were cut, so they are computed again
        y = OP(x, weight, bias, channels, None, None, None, kernel, 1, 1, True, tf32)
    grad = nhwc(_spread(grad, pool, h, w))
    if relu:
        grad = torch.ops.aten.threshold_backward(grad, nhwc(y), 0)
    found = [None] * len(needs)
    if needs[0]:
        dx = _dgrad(grad, weight, kernel, tf32)
        if channels is not None:
            full = torch.zeros_like(x, memory_format=torch.channels_last)
            dx = full.index_add_(1, channels.long(), dx)
        found[0] = dx
    if needs[1]:
        seen = x if channels is None else nhwc(x.index_select(1, channels.long()))
        found[1] = _wgrad(grad, nhwc(seen), weight, kernel)
    if needs[2]:
        found[2] = grad.sum((0, 2, 3), dtype=bias.dtype)
    if ctx.has_residual and needs[4]:
        found[4] = grad
    if x2 is not None and needs[5]:
        found[5] = nhwc(_spread(_dgrad(grad, weight2, 1, tf32), pool2, *x2.shape[2:]))
    if x2 is not None and needs[6]:
        pooled = F.avg_pool2d(x2, pool2) if pool2 > 1 else x2
        found[6] = _wgrad(grad, nhwc(pooled), weight2, 1)
    return tuple(found)


OP = define_nhwc(
    "implicit_gemm_conv2d",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? channels, Tensor? residual, Tensor? x2, "
    "Tensor? weight2, int kernel, int pool, int pool2, bool relu, bool tf32, int[] config=[], "
    "Tensor? begin=None, Tensor? steps=None) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)


def implicit_gemm_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    channels: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    x2: torch.Tensor | None = None,
    weight2: torch.Tensor | None = None,
    *,
    pool: int = 1,
    pool2: int = 1,
    relu: bool = False,
    tf32: bool = False,
    config: tuple[int, ...] = (),
    slices: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The convolution of the module's formula; once differentiable in every floating tensor.

    Args:
        x: ``[N, C, H, W]`` float16, bfloat16 or float32 (float64 in the reference); channels_last,
            anything else is copied.
        weight: ``[k * k, Cin, Cout]`` from :func:`pack_weight`, in ``x.dtype``; k is 1 or 3 and
            the zero padding k // 2. bias: float32 ``[Cout]``.
        channels: int32 ``[Cin]``, the channels of ``x`` that are read; None: all, in order.
        residual: the output's shape, added before the ReLU.
        x2, weight2: second K segment, ``[N, C2, H2, W2]`` and ``[1, C2, Cout]``; averaged over
            ``pool2 x pool2`` pixels on the way in, which must give H x W.
        pool: 2 averages the output over 2x2 windows; odd rows and columns are dropped.
        relu: clamp at zero, NaN stays NaN.
        tf32: allow TF32 products for float32; False: IEEE products.
        config: (rows, columns, K, warps, stages) of the Triton tile; empty: chosen by shape.
        slices: :func:`live_slices` of this weight and config: the others are not multiplied.

    Returns:
        ``[N, Cout, H', W']``, channels_last, in ``x.dtype``.

    Raises:
        BadArgument: shapes or dtypes that do not fit. KernelUnavailable: no kernel here.
    """
    return OP(
        x, weight, bias, channels, residual, x2, weight2, round(weight.shape[0] ** 0.5), pool,
        pool2, relu, tf32, list(config), *(slices or (None, None)),
    )  # fmt: skip
