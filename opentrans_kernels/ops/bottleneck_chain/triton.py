"""Triton kernel of ``bottleneck_chain``: 3x3, 1x1, residual and the next block's 1x1 in one launch.

A program owns BM pixels. Its part of conv2's output stays in registers as the left operand of
conv3, whose wide output is made in chunks of BJ channels; each chunk is finished (bias, residual,
ReLU), written, and at once multiplied into conv1 of the next block, so it is never read back. No
halo: what follows conv2 is pointwise. Sums are float32, nothing is split, no atomics.

The widths of the products must be powers of two for tiles in registers, so inner widths are padded
with zero weights; the input's width C is a multiple of BK.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from ...errors import PlanError
from ..implicit_gemm_conv2d.triton import taps_inside
from ..launch import OPTIONS
from ..nhwc import LIMIT, check_capability, empty_nhwc, nhwc
from .shapes import check, default_config, padded_weights, power

__all__ = ["bottleneck_chain", "chain_kernel", "warm"]


@triton.jit(do_not_specialize=["rows", "height", "width"])
def chain_kernel(
    x, weight2, bias2, weight3, bias3, residual, weight1, bias1, y, after,
    rows, height, width, cin, wide, after_channels,
    INNER: tl.constexpr, AFTER: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < rows
    w = row % width
    h = row // width % height
    k = tl.arange(0, BK)
    inner_col = tl.arange(0, INNER)
    # As in implicit_gemm_conv2d: addresses and one bit per tap in front of the loop.
    a_rows = x + (row.to(tl.int64) * cin)[:, None] + k[None, :]
    b_rows = weight2 + (k * INNER)[:, None] + inner_col[None, :]
    inside = taps_inside(live, h, w, height, width)
    inner = tl.zeros((BM, INNER), tl.float32)
    tap = 0
    at = 0
    for step in range(0, 9 * (cin // BK)):
        at = tl.multiple_of(at, BK)
        a_mask = ((inside >> tap) & 1)[:, None] != 0
        shift = ((tap // 3 - 1) * width + tap % 3 - 1) * cin
        a = tl.load(a_rows + (shift + at), mask=a_mask, other=0.0)
        b = tl.load(b_rows + step * (BK * INNER))
        inner = tl.dot(a, b, inner, input_precision=PRECISION)
        at += BK
        tap += (at >= cin).to(tl.int32)
        at = tl.where(at >= cin, 0, at)
    inner += tl.load(bias2 + inner_col)[None, :]
    inner = tl.where(inner < 0, 0.0, inner)
    left = inner.to(x.dtype.element_ty)
    after_col = tl.arange(0, AFTER)
    summed = tl.zeros((BM, AFTER), tl.float32)
    part = tl.arange(0, BJ)
    base = row.to(tl.int64) * wide
    residual_rows = residual + base[:, None] + part[None, :]
    y_rows = y + base[:, None] + part[None, :]
    b3_rows = weight3 + (inner_col * wide)[:, None] + part[None, :]
    b1_rows = weight1 + (part * AFTER)[:, None] + after_col[None, :]
    for chunk in range(0, wide // BJ):
        col = chunk * BJ
        b3 = tl.load(b3_rows + col)
        z = tl.load(residual_rows + col, mask=live[:, None], other=0.0).to(tl.float32)
        z += tl.load(bias3 + col + part)[None, :]
        z = tl.dot(left, b3, z, input_precision=PRECISION)
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)  # one instruction a value
        finished = z.to(y.dtype.element_ty)
        tl.store(y_rows + col, finished, mask=live[:, None])
        b1 = tl.load(b1_rows + col * AFTER)
        summed = tl.dot(finished, b1, summed, input_precision=PRECISION)
    summed += tl.load(bias1 + after_col)[None, :]
    summed = tl.where(summed < 0, 0.0, summed)
    tl.store(
        after + (row.to(tl.int64) * after_channels)[:, None] + after_col[None, :],
        summed.to(after.dtype.element_ty),
        mask=live[:, None] & (after_col < after_channels)[None, :],
    )


def bottleneck_chain(x, weight2, bias2, weight3, bias3, residual, weight1, bias1, tf32, config=()):
    given = (x, weight2, bias2, weight3, bias3, residual, weight1, bias1, config)
    out, after_size = check(*given)
    check_capability("bottleneck_chain", x)
    y, after = empty_nhwc(x, *out), empty_nhwc(x, *after_size)
    if y.numel() == 0:
        return y, after
    n, cin, h, w = x.shape
    rows = n * h * w
    if rows > LIMIT:
        raise PlanError(
            f"bottleneck_chain: {rows} pixels are more than {LIMIT}. Pass a smaller batch."
        )
    weights, inner, last = padded_weights(weight2, bias2, weight3, weight1, bias1)
    weight2, bias2, weight3, weight1, bias1 = weights
    x, residual = nhwc(x), nhwc(residual)
    config = config or default_config(cin, inner, last, x.dtype)
    on_its_device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with on_its_device:
        chain_kernel[(triton.cdiv(rows, config[0]),)](
            x, weight2, bias2, weight3, bias3, residual, weight1, bias1, y, after,
            rows, h, w, cin, out[1], after_size[1], **_constants(inner, last, tf32, config),
        )  # fmt: skip
    return y, after


def _constants(inner: int, after: int, tf32: bool, config: tuple[int, ...]) -> dict[str, object]:
    bm, bj, bk, warps, stages = config
    return dict(
        INNER=inner, AFTER=after, PRECISION="tf32" if tf32 else "ieee",
        BM=bm, BJ=bj, BK=bk, num_warps=warps, num_stages=stages, **OPTIONS,
    )  # fmt: skip


def warm(
    dtype: torch.dtype, cin: int, inner: int, wide: int, after: int, tf32: bool,
    config: tuple[int, ...],
) -> None:  # fmt: skip
    """Compile for these widths without running."""
    single = torch.float32
    chain_kernel.warmup(
        dtype, dtype, single, dtype, single, dtype, dtype, single, dtype, dtype,
        1024, 32, 32, cin, wide, after, grid=(8,),
        **_constants(power(inner), power(after), tf32, config),
    )  # fmt: skip
