"""Argument checks and tile sizes of ``fused_stem``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments import BadArgument, image
from ..nhwc import expect

__all__ = ["CONFIGS", "PATCH", "check", "output_size", "why_not"]

_OP = "fused_stem"
#: 27 values of a 3x3 window of a colour image, padded to what tensor cores take.
PATCH = 32
#: (pixels, warps, stages) of a program, the default first. 128 pixels spill with 4 warps.
CONFIGS = ((64, 4, 2), (128, 8, 2))
WIDEST = 64


def output_size(h: int, w: int) -> tuple[int, int]:
    """Height and width behind a 3x3 with stride 2 and padding 1."""
    return (h + 1) // 2, (w + 1) // 2


def why_not(cin: int, middle: int, cout: int) -> str | None:
    """Why these widths do not fit the kernel; None if they do."""
    if cin != 3:
        return f"the image has {cin} channels, not 3"
    if max(middle, cout) > WIDEST:
        return f"widths {middle} and {cout} exceed the {WIDEST} that pay when computed nine times"
    return None


def check(
    x: torch.Tensor, weight1, bias1, weight2, bias2, config: Sequence[int] = ()
) -> tuple[int, int, int, int]:
    """The output's shape. Raises BadArgument."""
    n, cin, h, w = image(_OP, x)
    if weight1.dim() != 3 or weight2.dim() != 3:
        raise BadArgument(f"{_OP}: weights must be [9, Cin, Cout]. Pack them with pack_weight.")
    middle, cout = weight1.shape[2], weight2.shape[2]
    if (problem := why_not(cin, middle, cout)) is not None:
        raise BadArgument(f"{_OP}: {problem}. Run the convolutions one by one instead.")
    expect(_OP, "weight1", weight1, (9, cin, middle), x.dtype)
    expect(_OP, "weight2", weight2, (9, middle, cout), x.dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    expect(_OP, "bias1", bias1, (middle,), wide)
    expect(_OP, "bias2", bias2, (cout,), wide)
    if config and (len(config) != 3 or any(v < 1 for v in config)):
        raise BadArgument(
            f"{_OP}: config {list(config)} must be (pixels, warps, stages), or empty."
        )
    return (n, cout, *output_size(h, w))
