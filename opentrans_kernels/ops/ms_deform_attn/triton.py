"""Triton kernels of ``ms_deform_attn``: a row is one head of one query, its channels lie across.

Rows follow each other as outputs do in memory, so neighbouring rows read neighbouring points and
write one piece. Sizes of levels are read on the device, and no index leaves ``value`` whatever they
say. Bound by memory: four corners of D channels a point.

The gradient of ``value`` is summed by float32 atomics in memory, so its last bits depend on timing;
the others do not.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import KernelUnavailable, PlanError
from ..launch import OPTIONS

__all__ = [
    "LARGEST_D",
    "launch_arguments",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "sample_kernel",
    "scatter_kernel",
]

#: Rows and pixels are counted in 32 bits inside the kernels, addresses in 64.
LIMIT = 2**31 - 1
LARGEST_D = 8192  # channels of a head, which a program holds at once
#: Rows x channels of a program, and warps. What a row computes once lies otherwise in registers
#: than what its loop needs: within one warp it is moved by shuffles, among more through barriers.
_PLAIN, _FUSED, _BACKWARD = (1024, 4), (128, 1), (128, 1)
_WRITTEN_OUT = 8  # points of a level up to which their loop is unrolled


@triton.jit
def point_of(xy, given, i, scale_x, scale_y, shift_x, shift_y, h, w, live):
    """Upper left pixel, place in the cell, inside, weight: of point ``i`` of every row."""
    x = tl.load(xy + 2 * i, mask=live, other=0.0).to(tl.float32) * scale_x + shift_x
    y = tl.load(xy + 2 * i + 1, mask=live, other=0.0).to(tl.float32) * scale_y + shift_y
    weight = tl.load(given + i, mask=live, other=0.0).to(tl.float32)
    # An empty level ends before it begins. (Not `live & (h > 0)`: triton 3.9's interpreter makes
    # int32 of a block of booleans and a single one.)
    end = tl.where((h > 0) & (w > 0), w, -1).to(tl.float32)
    inside = live & (x > -1) & (x < end) & (y > -1) & (y < h.to(tl.float32))
    # Selected before anything is computed: what is outside may be NaN.
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, inside, weight


@triton.jit
def corner_of(left, top, DX: tl.constexpr, DY: tl.constexpr, first, h, w, pixels, inside):
    """Index of one of the four pixels around a point, and whether there is such a pixel."""
    column = left + DX
    row = top + DY
    index = first + row * w + column
    real = inside & (column >= 0) & (column < w) & (row >= 0) & (row < h)
    return index.to(tl.int64), real & (index >= 0) & (index < pixels)


@triton.jit
def part_of(f, FAR: tl.constexpr):
    """Share of one of two neighbours, ``f`` after the near one."""
    return f if FAR else 1.0 - f


@triton.jit
def sampled(
    sums, at, value_s, xy, given, i, scale_x, scale_y, shift_x, shift_y, top_logit, share,
    first, h, w, pixels, live, columns, REFERENCE: tl.constexpr,
):  # fmt: skip
    """``sums`` and point ``i``."""
    left, top, fx, fy, inside, weight = point_of(
        xy, given, i, scale_x, scale_y, shift_x, shift_y, h, w, live
    )
    if REFERENCE:
        weight = tl.exp(weight - top_logit) * share
    weight = tl.where(inside, weight, 0.0)
    for j in tl.static_range(4):
        index, real = corner_of(left, top, j % 2, j // 2, first, h, w, pixels, inside)
        pixel = tl.load(
            at + (index * value_s)[:, None], mask=real[:, None] & columns, other=0.0
        ).to(tl.float32)
        sums += (part_of(fx, j % 2) * part_of(fy, j // 2) * weight)[:, None] * pixel
    return sums


# Counts are not specialised on, or every image and batch would compile anew.
@triton.jit(do_not_specialize=["rows", "queries", "pixels"])
def sample_kernel(
    value, shapes, locations, weights, reference, out,
    rows, queries, heads, pixels, levels, channels,
    value_n, value_s, value_m, value_d,
    locations_n, locations_q, locations_m, weights_n, weights_q, weights_m,
    POINTS: tl.constexpr, REFERENCE: tl.constexpr, WRITTEN_OUT: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BQ + tl.arange(0, BQ)
    d = tl.arange(0, BD)
    live = row < rows
    columns = (d < channels)[None, :]
    head = (row % heads).to(tl.int64)
    query = (row // heads % queries).to(tl.int64)
    image = (row // heads // queries).to(tl.int64)
    at = (value + image * value_n + head * value_m)[:, None] + (d.to(tl.int64) * value_d)[None, :]
    xy = locations + image * locations_n + query * locations_q + head * locations_m
    given = weights + image * weights_n + query * weights_q + head * weights_m
    about = reference
    top_logit = tl.zeros((BQ,), tl.float32)
    share = tl.zeros((BQ,), tl.float32)
    if REFERENCE:  # weights are logits
        top_logit = tl.full((BQ,), -float("inf"), tl.float32)
        total = tl.zeros((BQ,), tl.float32)
        for k in range(0, levels * POINTS):
            logit = tl.load(given + k, mask=live, other=0.0).to(tl.float32)
            top_logit = tl.maximum(top_logit, logit)
        for k in range(0, levels * POINTS):
            logit = tl.load(given + k, mask=live, other=0.0).to(tl.float32)
            total += tl.exp(logit - top_logit)
        # NaN, also of infinities, makes the sum NaN, and with it every weight.
        share = 1.0 / total
        about = reference + (image * queries + query) * levels * REFERENCE
    sums = tl.zeros((BQ, BD), tl.float32)
    first = 0
    for level in range(0, levels):
        h = tl.load(shapes + 2 * level).to(tl.int32)
        w = tl.load(shapes + 2 * level + 1).to(tl.int32)
        scale_x = w.to(tl.float32)
        scale_y = h.to(tl.float32)
        shift_x = -0.5
        shift_y = -0.5
        if REFERENCE:
            centre = about + level * REFERENCE
            shift_x = tl.load(centre, mask=live, other=0.0).to(tl.float32) * scale_x - 0.5
            shift_y = tl.load(centre + 1, mask=live, other=0.0).to(tl.float32) * scale_y - 0.5
            if REFERENCE == 4:
                part = 0.5 / POINTS
                scale_x *= tl.load(centre + 2, mask=live, other=0.0).to(tl.float32) * part
                scale_y *= tl.load(centre + 3, mask=live, other=0.0).to(tl.float32) * part
            else:
                scale_x = 1.0
                scale_y = 1.0
        if WRITTEN_OUT:
            for p in tl.static_range(POINTS):
                sums = sampled(
                    sums, at, value_s, xy, given, level * POINTS + p, scale_x, scale_y,
                    shift_x, shift_y, top_logit, share, first, h, w, pixels, live, columns,
                    REFERENCE,
                )  # fmt: skip
        else:
            for p in range(0, POINTS):
                sums = sampled(
                    sums, at, value_s, xy, given, level * POINTS + p, scale_x, scale_y,
                    shift_x, shift_y, top_logit, share, first, h, w, pixels, live, columns,
                    REFERENCE,
                )  # fmt: skip
        first += h * w
    to = out + (row.to(tl.int64) * channels)[:, None] + d[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=live[:, None] & columns)


@triton.jit(do_not_specialize=["rows", "queries", "pixels"])
def scatter_kernel(
    grad, value, shapes, locations, weights, grad_value, grad_locations, grad_weights,
    rows, queries, heads, pixels, levels, channels, pitch,
    value_n, value_s, value_m, value_d,
    locations_n, locations_q, locations_m, weights_n, weights_q, weights_m,
    POINTS: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BQ + tl.arange(0, BQ)
    d = tl.arange(0, BD)
    live = row < rows
    columns = (d < channels)[None, :]
    head = (row % heads).to(tl.int64)
    query = (row // heads % queries).to(tl.int64)
    image = (row // heads // queries).to(tl.int64)
    at = (value + image * value_n + head * value_m)[:, None] + (d.to(tl.int64) * value_d)[None, :]
    xy = locations + image * locations_n + query * locations_q + head * locations_m
    given = weights + image * weights_n + query * weights_q + head * weights_m
    wide = row.to(tl.int64)
    kept = live[:, None] & columns
    of_row = tl.load(grad + (wide * channels)[:, None] + d[None, :], mask=kept, other=0.0)
    of_row = of_row.to(tl.float32)
    to = (grad_value + image * pixels * pitch + head * channels)[:, None] + d[None, :]
    first = 0
    for level in range(0, levels):
        h = tl.load(shapes + 2 * level).to(tl.int32)
        w = tl.load(shapes + 2 * level + 1).to(tl.int32)
        width = w.to(tl.float32)
        height = h.to(tl.float32)
        for p in range(0, POINTS):
            i = level * POINTS + p
            left, top, fx, fy, inside, weight = point_of(
                xy, given, i, width, height, -0.5, -0.5, h, w, live
            )
            weight = tl.where(inside, weight, 0.0)
            of_weight = tl.zeros((BQ,), tl.float32)
            of_x = tl.zeros((BQ,), tl.float32)
            of_y = tl.zeros((BQ,), tl.float32)
            for j in tl.static_range(4):
                index, real = corner_of(left, top, j % 2, j // 2, first, h, w, pixels, inside)
                mask = real[:, None] & columns
                pixel = tl.load(at + (index * value_s)[:, None], mask=mask, other=0.0)
                dot = tl.sum(pixel.to(tl.float32) * of_row, axis=1)
                part_x = part_of(fx, j % 2)
                part_y = part_of(fy, j // 2)
                share = part_x * part_y
                of_weight += share * dot
                of_x += part_y * dot if j % 2 else -part_y * dot
                of_y += part_x * dot if j // 2 else -part_x * dot
                tl.atomic_add(
                    to + (index * pitch)[:, None], (share * weight)[:, None] * of_row, mask=mask,
                    sem="relaxed",
                )  # fmt: skip
            k = wide * levels * POINTS + i
            of_x = tl.where(inside, of_x * weight * width, 0.0)
            of_y = tl.where(inside, of_y * weight * height, 0.0)
            of_weight = tl.where(inside, of_weight, 0.0)
            tl.store(grad_weights + k, of_weight.to(grad_weights.dtype.element_ty), mask=live)
            tl.store(grad_locations + 2 * k, of_x.to(grad_locations.dtype.element_ty), mask=live)
            tl.store(
                grad_locations + 2 * k + 1, of_y.to(grad_locations.dtype.element_ty), mask=live
            )
        first += h * w


def _dense_rows(t: torch.Tensor, dims: int) -> torch.Tensor:
    """``t``, or a copy, with its last ``dims`` dimensions dense."""
    expected = 1
    for size, stride in zip(reversed(t.shape[-dims:]), reversed(t.stride()[-dims:]), strict=True):
        if size > 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t


def launch_arguments(
    value, shapes, locations, weights, config: tuple[int, int]
) -> tuple[tuple[int], tuple[torch.Tensor, ...], tuple[tuple[int, ...], ...], dict[str, Any]]:
    """Grid, tensors, (counts, strides) and constants that both kernels take.

    config: (rows x channels of a program, warps).
    """
    n, s, m, d = value.shape
    q, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    rows = n * q * m
    if max(rows, s, levels * points) > LIMIT or d > LARGEST_D:
        raise PlanError(
            f"ms_deform_attn: {rows} rows (N x Q x M) of {d} channels and {s} pixels are more than "
            f"the kernel takes: {LIMIT} rows and pixels, {LARGEST_D} channels. Pass fewer images "
            "or queries at a time."
        )
    locations, weights = _dense_rows(locations, 3), _dense_rows(weights, 2)
    shapes = shapes.to(device=value.device, dtype=torch.int64).contiguous()
    lanes = triton.next_power_of_2(d)
    tile, warps = config
    of_rows = max(1, tile // lanes)
    numbers = (rows, q, m, s, levels, d)
    strides = (*value.stride(), *locations.stride()[:3], *weights.stride()[:3])
    constants = dict(POINTS=points, BQ=of_rows, BD=lanes, num_warps=warps, **OPTIONS)
    grid = (triton.cdiv(rows, of_rows),)
    return grid, (value, shapes, locations, weights), (numbers, strides), constants


def _on(t: torch.Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def ms_deform_attn(
    value: torch.Tensor,
    shapes: torch.Tensor,
    locations: torch.Tensor,
    weights: torch.Tensor,
    reference: torch.Tensor | None = None,
    config: tuple[int, int] | None = None,
) -> torch.Tensor:
    """See :func:`opentrans_kernels.ops.ms_deform_attn`; dtypes may differ from tensor to tensor."""
    n, _, m, d = value.shape
    out = value.new_empty(n, locations.shape[1], m * d)
    if out.numel() == 0 or weights.numel() == 0:
        return out.zero_()
    config = config or (_PLAIN if reference is None else _FUSED)
    grid, tensors, (numbers, strides), constants = launch_arguments(
        value, shapes, locations, weights, config
    )
    with _on(value):
        sample_kernel[grid](
            # Where there are no references the constant 0 keeps the kernel from reading this.
            *tensors, value if reference is None else reference.contiguous(), out,
            *numbers, *strides,
            REFERENCE=0 if reference is None else reference.shape[-1],
            WRITTEN_OUT=constants["POINTS"] <= _WRITTEN_OUT, **constants,
        )  # fmt: skip
    return out


def _refuse_if_deterministic() -> None:
    """As PyTorch's own operators with atomics do."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    what = (
        "ms_deform_attn: the gradient of value is summed by atomics on CUDA, so its last bits "
        "differ from run to run, and torch.use_deterministic_algorithms(True) is on. Set "
        "OPENTRANS_BACKEND=reference, or allow it with warn_only=True."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise KernelUnavailable(what)
    warnings.warn(what, stacklevel=2)


def ms_deform_attn_backward(
    grad: torch.Tensor,
    value: torch.Tensor,
    shapes: torch.Tensor,
    locations: torch.Tensor,
    weights: torch.Tensor,
    config: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of value, locations and weights, each in the dtype of its tensor; dense.

    Raises:
        KernelUnavailable: deterministic algorithms are asked for.
    """
    _refuse_if_deterministic()
    # Summed in float32 whatever the dtype.
    of_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    runs = bool(grad.numel() and weights.numel())
    of_locations, of_weights = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if runs else t.new_zeros(t.shape)
        for t in (locations, weights)
    )
    if runs:
        grid, tensors, (numbers, strides), constants = launch_arguments(
            value, shapes, locations, weights, config or _BACKWARD
        )
        with _on(value):
            scatter_kernel[grid](
                grad.contiguous(), *tensors, of_value, of_locations, of_weights,
                *numbers, value.shape[2] * value.shape[3], *strides, **constants,
            )  # fmt: skip
    return of_value.to(value.dtype), of_locations, of_weights
