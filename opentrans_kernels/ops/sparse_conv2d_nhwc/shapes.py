"""Argument checks of ``sparse_conv2d_nhwc``."""

from __future__ import annotations

import torch

from ..arguments import BadArgument, image
from ..nhwc import expect
from .pack import GROUP, WARPS

__all__ = ["check"]

_OP = "sparse_conv2d_nhwc"


def check(
    x: torch.Tensor, entries, begin, slots, bias, residual, cin: int, kernel: int, chunk: int
) -> tuple[int, int, int, int]:
    """The output's shape. Raises BadArgument."""
    n, c, h, w = image(_OP, x)
    if kernel not in (1, 3) or chunk < 1:
        raise BadArgument(f"{_OP}: kernel {kernel} must be 1 or 3, chunk {chunk} positive.")
    if c != cin:
        raise BadArgument(f"{_OP}: x has {c} channels, the pack expects {cin}.")
    cout = bias.shape[0]
    groups, chunks = -(-cout // GROUP), max(1, -(-cin // chunk))
    expect(_OP, "entries", entries, (max(1, entries.shape[0]), 2), torch.int32)
    expect(_OP, "begin", begin, (groups, chunks, WARPS + 1), torch.int32)
    expect(_OP, "slots", slots, (groups, GROUP), torch.int32)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    expect(_OP, "bias", bias, (cout,), wide)
    if residual is not None:
        expect(_OP, "residual", residual, (n, cout, h, w), x.dtype)
    return n, cout, h, w
