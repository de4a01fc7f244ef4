"""Triton kernel of ``fused_stem``: conv1 is computed anew for every tap of conv2, on chip.

conv1 has 27 inputs per output, a single K step, so computing it nine times costs as much as conv2
itself and saves writing and reading its output, the largest activation of the network. Whatever
lies outside conv1's output is zero, as conv2's padding demands; a bias must not leak into it.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import PlanError
from ..bottleneck_chain.shapes import power
from ..implicit_gemm_conv2d.triton import nearest_tf32, taps_inside
from ..launch import OPTIONS
from ..nhwc import LIMIT, check_capability, empty_nhwc, nhwc
from .shapes import CONFIGS, PATCH, check

__all__ = ["fused_stem", "stem_kernel"]


@triton.jit(do_not_specialize=["rows", "height", "width", "out_height", "out_width"])
def stem_kernel(
    x, weight1, bias1, weight2, bias2, y,
    rows, height, width, out_height, out_width, cout,
    MIDDLE: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, PATCH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < rows
    w = row % out_width
    h = row // out_width % out_height
    image = row // (out_width * out_height)
    k = tl.arange(0, PATCH)  # (line of the window, column, colour)
    ky = k // 9 - 1
    kx = k // 3 % 3 - 1
    colour = k % 3
    middle_col = tl.arange(0, MIDDLE)
    col = tl.arange(0, OUT)
    b1 = tl.load(bias1 + middle_col)
    w1 = tl.load(
        weight1 + k[:, None] * MIDDLE + middle_col[None, :], mask=(k < 27)[:, None], other=0.0
    )
    # In front of the loop: the address of each value for the central tap, one bit per tap for
    # values inside the image, and one per tap for pixels of the first convolution that exist.
    ih = 2 * h[:, None] + ky[None, :]
    iw = 2 * w[:, None] + kx[None, :]
    values = x + (((image[:, None] * height + ih).to(tl.int64) * width + iw) * 3 + colour[None, :])
    read = tl.zeros_like(ih)
    for i in tl.static_range(9):
        above = ih + (2 * (i // 3) - 2)
        left = iw + (2 * (i % 3) - 2)
        seen = (above >= 0) & (above < height) & (left >= 0) & (left < width)
        read |= seen.to(tl.int32) << i
    read = tl.where(live[:, None] & (k < 27)[None, :], read, 0)
    exists = taps_inside(live, h, w, out_height, out_width)
    summed = tl.zeros((BM, OUT), tl.float32)
    for tap in range(0, 9):
        inside = ((exists >> tap) & 1) != 0
        shift = ((2 * (tap // 3) - 2) * width + 2 * (tap % 3) - 2) * 3
        patch = tl.load(values + shift, mask=((read >> tap) & 1) != 0, other=0.0)
        middle = tl.dot(patch, w1, input_precision=PRECISION) + b1[None, :]
        middle = tl.where(middle < 0, 0.0, middle)
        if PRECISION == "tf32":
            middle = nearest_tf32(middle)
        middle = tl.where(inside[:, None], middle, 0.0).to(x.dtype.element_ty)
        w2 = tl.load(weight2 + ((tap * MIDDLE + middle_col) * OUT)[:, None] + col[None, :])
        summed = tl.dot(middle, w2, summed, input_precision=PRECISION)
    summed += tl.load(bias2 + col)[None, :]
    summed = tl.where(summed < 0, 0.0, summed)
    if PRECISION == "tf32":
        summed = nearest_tf32(summed)
    tl.store(
        y + (row.to(tl.int64) * cout)[:, None] + col[None, :],
        summed.to(y.dtype.element_ty),
        mask=live[:, None] & (col < cout)[None, :],
    )


def fused_stem(x, weight1, bias1, weight2, bias2, tf32, config=()):
    size = check(x, weight1, bias1, weight2, bias2, config)
    check_capability("fused_stem", x)
    y = empty_nhwc(x, *size)
    n, cout, out_h, out_w = size
    rows = n * out_h * out_w
    if rows == 0:
        return y
    if 4 * rows > LIMIT:
        raise PlanError(f"fused_stem: {4 * rows} pixels are more than {LIMIT}. Pass fewer images.")
    bm, warps, stages = config or CONFIGS[0]
    middle, out = power(weight1.shape[2]), power(cout)
    more, last = middle - weight1.shape[2], out - cout
    if more or last:  # not for CLIP's widths: each of these would be a launch of its own
        weight1, bias1 = F.pad(weight1, (0, more)), F.pad(bias1, (0, more))
        weight2, bias2 = F.pad(weight2, (0, last, 0, more)), F.pad(bias2, (0, last))
    weight1, weight2 = weight1.contiguous(), weight2.contiguous()
    x = nhwc(x)
    on_its_device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with on_its_device:
        stem_kernel[(triton.cdiv(rows, bm),)](
            x, weight1, bias1, weight2, bias2, y,
            rows, *x.shape[2:], out_h, out_w, cout,
            MIDDLE=middle, OUT=out, PRECISION="tf32" if tf32 else "ieee", BM=bm, PATCH=PATCH,
            num_warps=warps, num_stages=stages, **OPTIONS,
        )  # fmt: skip
    return y
