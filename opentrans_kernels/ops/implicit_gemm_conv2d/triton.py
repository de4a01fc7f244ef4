"""Triton kernel of ``implicit_gemm_conv2d``: one GEMM whose left operand is read through the image.

Rows are output pixels (with a pool, the four pixels of a window in a row), columns are output
channels, K runs over taps and input channels. NHWC, so a row of K is contiguous in memory and taps
outside the image are masked loads. Sums are float32; no atomics and no split of K, so results do
not depend on timing. Bound by memory for most 1x1, by tensor cores for 3x3.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from ...errors import PlanError
from ..launch import OPTIONS
from ..nhwc import LIMIT, check_capability, empty_nhwc, nhwc
from .shapes import check, default_config, k_major

__all__ = [
    "conv_kernel",
    "implicit_gemm_conv2d",
    "launch_arguments",
    "nearest_tf32",
    "taps_inside",
    "warm",
]


@triton.jit
def nearest_tf32(x):
    """``x`` rounded to TF32: what reads it next would cut the bits off, always towards zero."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def taps_inside(live, h, w, height, width):
    """Nine bits a pixel: whether each tap of a 3x3 around (h, w) lies inside the image."""
    inside = tl.zeros_like(h)
    for i in tl.static_range(9):
        dy = i // 3 - 1
        dx = i % 3 - 1
        seen = live & (h + dy >= 0) & (h + dy < height) & (w + dx >= 0) & (w + dx < width)
        inside |= seen.to(tl.int32) << i
    return inside


# Sizes of the image are not specialised on, or every feature map would compile anew.
@triton.jit(
    do_not_specialize=["rows", "height", "width", "out_height", "out_width", "height2", "width2"]
)
def conv_kernel(
    x, weight, bias, channels, residual, x2, weight2, begin, steps, y,
    rows, height, width, out_height, out_width, cin, cout, x_channels,
    height2, width2, cin2,
    TAPS: tl.constexpr, POOL: tl.constexpr, POOL2: tl.constexpr, GATHER: tl.constexpr,
    SLICED: tl.constexpr, TURNED: tl.constexpr, RESIDUAL: tl.constexpr, SECOND: tl.constexpr,
    RELU: tl.constexpr, EVEN_K: tl.constexpr, EVEN_K2: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share rows of x, which are larger than the weights.
    tiles = tl.cdiv(cout, BN)
    first_row = tl.program_id(0) // tiles * BM
    row = first_row + tl.arange(0, BM)
    col = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    live = row < rows
    if POOL == 2:
        window = row // 4
        column = window % out_width
        line = window // out_width % out_height
        image = window // (out_width * out_height)
        h = 2 * line + row % 4 // 2
        w = 2 * column + row % 2
    else:
        w = row % out_width
        h = row // out_width % out_height
        image = row // (out_width * out_height)
    # All that a step does not change lies in front of the loop: addresses of the central tap, and
    # one bit per tap for pixels inside the image. A step adds one offset and tests one bit.
    pixel = ((image * height + h) * width + w).to(tl.int64)
    k = tl.arange(0, BK)
    a_rows = x + (pixel * x_channels)[:, None]
    # TURNED: weights lie with K innermost, as tensor cores want it of 32-bit values; else they are
    # copied word by word into shared memory, four lanes to a bank.
    if TURNED:
        b_rows = weight + (col.to(tl.int64) * cin)[:, None] + k[None, :]
    else:
        b_rows = weight + (k.to(tl.int64) * cout)[:, None] + col[None, :]
    inside = live.to(tl.int32)
    if TAPS == 9:
        inside = taps_inside(live, h, w, height, width)
    accumulated = tl.zeros((BM, BN), tl.float32)
    first = 0
    last = TAPS * tl.cdiv(cin, BK)
    place = 0
    if SLICED:  # only slices of K in which these columns have a nonzero
        first = tl.load(begin + tl.program_id(0) % tiles)
        last = tl.load(begin + tl.program_id(0) % tiles + 1)
        place = tl.load(steps + first)
    tap = 0
    at = 0
    for step in range(first, last):
        if SLICED:
            tap = place >> 16
            at = (place & 0xFFFF) * BK
            place = tl.load(steps + step + 1)  # early: the next addresses wait for it
        at = tl.multiple_of(at, BK)
        a_mask = ((inside >> tap) & 1)[:, None] != 0
        if not EVEN_K:
            a_mask = a_mask & (at + k < cin)[None, :]
        shift = 0
        if TAPS == 9:
            shift = ((tap // 3 - 1) * width + tap % 3 - 1) * x_channels
        if GATHER:
            source = tl.load(channels + at + k, mask=at + k < cin, other=0)
            a = tl.load(a_rows + shift + source[None, :], mask=a_mask, other=0.0)
        else:
            a = tl.load(a_rows + k[None, :] + (shift + at), mask=a_mask, other=0.0)
        if TURNED:
            b_at = b_rows + ((tap * cin).to(tl.int64) * cout + at)
            b_mask = (col < cout)[:, None] & (at + k < cin)[None, :]
        else:
            b_at = b_rows + (tap * cin + at).to(tl.int64) * cout
            b_mask = (at + k < cin)[:, None] & (col < cout)[None, :]
        if EVEN_K and EVEN_N:
            b = tl.load(b_at)
        else:
            b = tl.load(b_at, mask=b_mask, other=0.0)
        if TURNED:
            b = tl.trans(b)
        accumulated = tl.dot(a, b, accumulated, input_precision=PRECISION)
        if not SLICED:
            at += BK
            tap += (at >= cin).to(tl.int32)
            at = tl.where(at >= cin, 0, at)
    if SECOND:
        start = (image * height2 + POOL2 * h).to(tl.int64) * width2 + POOL2 * w
        a2_rows = x2 + (start * cin2)[:, None] + k[None, :]
        if TURNED:
            b2_rows = weight2 + (col.to(tl.int64) * cin2)[:, None] + k[None, :]
        else:
            b2_rows = weight2 + (k.to(tl.int64) * cout)[:, None] + col[None, :]
        down = width2 * cin2
        for step in range(0, tl.cdiv(cin2, BK)):
            at2 = step * BK
            a_mask = live[:, None]
            if not EVEN_K2:
                a_mask = a_mask & (at2 + k < cin2)[None, :]
            a_at = a2_rows + at2
            if POOL2 == 2:
                a = tl.load(a_at, mask=a_mask, other=0.0).to(tl.float32)
                a += tl.load(a_at + cin2, mask=a_mask, other=0.0).to(tl.float32)
                a += tl.load(a_at + down, mask=a_mask, other=0.0).to(tl.float32)
                a += tl.load(a_at + (down + cin2), mask=a_mask, other=0.0).to(tl.float32)
                a = (a * 0.25).to(x2.dtype.element_ty)
            else:
                a = tl.load(a_at, mask=a_mask, other=0.0)
            if TURNED:
                b_at = b2_rows + at2
                b_mask = (col < cout)[:, None] & (at2 + k < cin2)[None, :]
            else:
                b_at = b2_rows + at2.to(tl.int64) * cout
                b_mask = (at2 + k < cin2)[:, None] & (col < cout)[None, :]
            if EVEN_K2 and EVEN_N:
                b = tl.load(b_at)
            else:
                b = tl.load(b_at, mask=b_mask, other=0.0)
            if TURNED:
                b = tl.trans(b)
            accumulated = tl.dot(a, b, accumulated, input_precision=PRECISION)
    accumulated += tl.load(bias + col, mask=col < cout, other=0.0)[None, :]
    kept = live[:, None] & (col < cout)[None, :]
    if RESIDUAL:
        at_residual = residual + (row.to(tl.int64) * cout)[:, None] + col[None, :]
        accumulated += tl.load(at_residual, mask=kept, other=0.0).to(tl.float32)
    if RELU:  # a comparison, because tl.maximum would turn NaN into zero
        accumulated = tl.where(accumulated < 0, 0.0, accumulated)
    if POOL == 2:
        accumulated = tl.sum(tl.reshape(accumulated, (BM // 4, 4, BN)), axis=1) * 0.25
        row = first_row // 4 + tl.arange(0, BM // 4)
        kept = (row < rows // 4)[:, None] & (col < cout)[None, :]
    if PRECISION == "tf32":
        accumulated = nearest_tf32(accumulated)
    tl.store(
        y + (row.to(tl.int64) * cout)[:, None] + col[None, :],
        accumulated.to(y.dtype.element_ty),
        mask=kept,
    )


def _k_innermost(weight: torch.Tensor) -> bool:
    return not weight.is_contiguous() and weight.transpose(1, 2).is_contiguous()


def _laid_out(weight: torch.Tensor, k_innermost: bool) -> torch.Tensor:
    """``weight`` in one of the two layouts; a copy only where it has another one."""
    return k_major(weight) if k_innermost else weight.contiguous()


def launch_arguments(
    x, weight, bias, channels, residual, x2, weight2, kernel, pool, pool2, relu, tf32, config,
    begin, steps, out,
):  # fmt: skip
    """Grid, positional and keyword arguments of one launch."""
    n, c, h, w = x.shape
    taps, cin, cout = weight.shape
    out_h, out_w = out.shape[2:]
    rows = n * out_h * out_w * pool * pool
    if max(rows, n * h * w, taps * cin) > LIMIT:
        raise PlanError(
            f"implicit_gemm_conv2d: {max(rows, n * h * w)} pixels are more than {LIMIT}. Pass a "
            "smaller batch."
        )
    if not config:
        config = default_config(rows, cout, x.dtype, pool2 > 1, residual is not None)
    bm, bn, bk, warps, stages = config
    cin2 = 0 if weight2 is None else weight2.shape[1]
    size2 = (0, 0) if x2 is None else x2.shape[2:]
    grid = (triton.cdiv(rows, bm) * triton.cdiv(cout, bn),)
    # Where an operand is absent its constant flag keeps the kernel from reading this.
    positional = (
        x, weight, bias, x if channels is None else channels, x if residual is None else residual,
        x if x2 is None else x2, weight if weight2 is None else weight2,
        x if begin is None else begin, x if steps is None else steps, out,
        rows, h, w, out_h, out_w, cin, cout, c, *size2, cin2,
    )  # fmt: skip
    keywords = dict(
        TAPS=taps, POOL=pool, POOL2=pool2, GATHER=channels is not None,
        SLICED=steps is not None, TURNED=_k_innermost(weight), RESIDUAL=residual is not None,
        SECOND=x2 is not None, RELU=relu,
        EVEN_K=cin % bk == 0, EVEN_K2=cin2 % bk == 0, EVEN_N=cout % bn == 0,
        PRECISION="tf32" if tf32 else "ieee", BM=bm, BN=bn, BK=bk,
        num_warps=warps, num_stages=stages, **OPTIONS,
    )  # fmt: skip
    return grid, positional, keywords


def implicit_gemm_conv2d(
    x, weight, bias, channels, residual, x2, weight2, kernel, pool, pool2, relu, tf32, config=(),
    begin=None, steps=None,
):  # fmt: skip
    size = check(
        x, weight, bias, channels, residual, x2, weight2, kernel, pool, pool2, config, begin, steps
    )
    check_capability("implicit_gemm_conv2d", x)
    out = empty_nhwc(x, *size)
    if out.numel() == 0:
        return out
    x, residual, x2 = (None if t is None else nhwc(t) for t in (x, residual, x2))
    turned = _k_innermost(weight)
    grid, positional, keywords = launch_arguments(
        x, _laid_out(weight, turned), bias, channels, residual, x2,
        None if weight2 is None else _laid_out(weight2, turned),
        kernel, pool, pool2, relu, tf32, config, begin, steps, out,
    )  # fmt: skip
    on_its_device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with on_its_device:  # triton launches on the current device
        conv_kernel[grid](*positional, **keywords)
    return out


def warm(*arguments) -> None:
    """Compile for these arguments without running; tensors may be on the meta device."""
    *tensors, kernel, pool, pool2, _, _, config, begin, steps = arguments
    size = check(*tensors, kernel, pool, pool2, config, begin, steps)
    grid, positional, keywords = launch_arguments(*arguments, empty_nhwc(tensors[0], *size))
    types = (a.dtype if isinstance(a, torch.Tensor) else a for a in positional)
    conv_kernel.warmup(*types, grid=grid, **keywords)
