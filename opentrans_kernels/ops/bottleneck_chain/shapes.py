"""Argument checks, padding and tile sizes of ``bottleneck_chain``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..arguments import BadArgument, image
from ..nhwc import expect

__all__ = ["CONFIGS", "check", "default_config", "padded_weights", "power", "why_not"]

_OP = "bottleneck_chain"
#: (pixels, chunk, K, warps, stages) of a program in half precision.
CONFIGS = (
    (128, 64, 64, 8, 3),
    (64, 64, 64, 8, 2),
    (64, 64, 32, 4, 2),
    (128, 64, 32, 8, 2),
)
#: Widest inner product whose sums fit into the registers of one program.
WIDEST = 256
_HALF = (torch.float16, torch.bfloat16)


def power(width: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def why_not(cin: int, inner: int, wide: int, after: int, dtype: torch.dtype) -> str | None:
    """Why these widths do not fit the kernel; None if they do."""
    if cin % 16 or wide % 64:
        return f"the input has {cin} and the output {wide} channels; multiples of 16 and 64 fit"
    if max(power(inner), power(after)) > WIDEST:
        return f"inner widths {inner} and {after} exceed the {WIDEST} that fit into registers"
    if dtype not in _HALF:
        return f"sums and operands in {str(dtype).removeprefix('torch.')} do not fit together"
    return None


def configs(cin: int, inner: int, after: int, dtype: torch.dtype) -> list[tuple[int, ...]]:
    """Tiles for these widths that compile without spills; their K divides ``cin``."""
    largest = max(power(inner), power(after))
    found = []
    for bm, bj, bk, warps, stages in CONFIGS:
        while cin % bk:
            bk //= 2
        small = bm == 64 and warps == 8
        if largest > 128 and not small:
            continue
        if largest > 64 and warps == 4:
            continue
        if (bm, bj, bk, warps, stages) not in found:
            found.append((bm, bj, bk, warps, stages))
    return found


def default_config(cin: int, inner: int, after: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The first tile that fits."""
    return configs(cin, inner, after, dtype)[0]


def check(
    x: torch.Tensor, weight2, bias2, weight3, bias3, residual, weight1, bias1,
    config: Sequence[int] = (),
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:  # fmt: skip
    """Shapes of both outputs. Raises BadArgument."""
    n, cin, h, w = image(_OP, x)
    if any(weight.dim() != 3 for weight in (weight2, weight3, weight1)):
        raise BadArgument(f"{_OP}: weights must be [taps, Cin, Cout]. Pack them with pack_weight.")
    inner, wide, after = (weight.shape[2] for weight in (weight2, weight3, weight1))
    for name, weight, shape in (
        ("weight2", weight2, (9, cin, inner)),
        ("weight3", weight3, (1, inner, wide)),
        ("weight1", weight1, (1, wide, after)),
    ):
        expect(_OP, name, weight, shape, x.dtype)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, bias, size in (
        ("bias2", bias2, inner),
        ("bias3", bias3, wide),
        ("bias1", bias1, after),
    ):
        expect(_OP, name, bias, (size,), kind)
    expect(_OP, "residual", residual, (n, wide, h, w), x.dtype)
    if config and (len(config) != 5 or any(v < 1 for v in config)):
        raise BadArgument(
            f"{_OP}: config {list(config)} must be (pixels, chunk, K, warps, stages), or empty."
        )
    if x.device.type == "cuda" and (problem := why_not(cin, inner, wide, after, x.dtype)):
        raise BadArgument(f"{_OP}: {problem}. Use implicit_gemm_conv2d three times instead.")
    return (n, wide, h, w), (n, after, h, w)


def padded_weights(weight2, bias2, weight3, weight1, bias1):
    """Inner widths padded with zeros to powers of two; ((weights, biases), inner, after)."""
    inner, after = weight2.shape[2], weight1.shape[2]
    more, last = power(inner) - inner, power(after) - after
    if more:
        weight2, bias2 = F.pad(weight2, (0, more)), F.pad(bias2, (0, more))
        weight3 = F.pad(weight3, (0, 0, 0, more))
    if last:
        weight1, bias1 = F.pad(weight1, (0, last)), F.pad(bias1, (0, last))
    packed = tuple(t.contiguous() for t in (weight2, bias2, weight3, weight1, bias1))
    return packed, inner + more, after + last
