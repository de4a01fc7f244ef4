"""``sparse_conv2d_dgrad``: the gradient of the input, a convolution with the mirrored weight.

It runs on the forward kernels. The mirrored structure of a pack is made once and kept as long as
the pack lives.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...pack import transposed_structure, version_of
from ..arguments import gradient, packed_header
from ..library import define, plane_padded

__all__ = ["OP"]

_TRANSPOSED = WeakTensorKeyDictionary()  # structure -> (version, (mirrored, order of the values))


def _fake(grad, structure, values, cin, h, w, stride, padding):
    return plane_padded(grad, grad.shape[0], cin, h, w)


def dgrad(grad, structure, values, cin, h, w, stride, padding):
    """Gradient ``[N, cin, h, w]`` of the input of a packed convolution."""
    header = packed_header("sparse_conv2d_dgrad", structure)
    gradient("sparse_conv2d_dgrad", header, grad, (cin, h, w))
    span, stride, padding = header.span, header.stride, header.padding
    entry, version = _TRANSPOSED.get(structure), version_of(structure)
    if entry is None or entry[0] != version:
        entry = _TRANSPOSED[structure] = (version, transposed_structure(structure))
    mirrored, order = entry[1]
    n, cout, gh, gw = grad.shape
    if n == 0:
        return plane_padded(grad, n, cin, h, w)
    # A stride spreads the gradient over the input's grid; rows and columns of the input that no
    # window reached are the padding on the right.
    spread = grad.new_zeros(n, cout, h + 2 * padding - span + 1, w + 2 * padding - span + 1)
    spread[:, :, : (gh - 1) * stride + 1 : stride, : (gw - 1) * stride + 1 : stride] = grad
    inner = span - 1 - padding
    out = torch.ops.opentrans_kernels.sparse_conv2d(
        spread, mirrored, values[order], None, None, cin, header.kernel, 1, max(inner, 0),
        False, dilation=header.dilation,
    )  # fmt: skip
    if inner < 0:  # padding beyond the window: its border saw zeros only
        inside = out[:, :, -inner : h - inner, -inner : w - inner]
        out = plane_padded(out, n, cin, h, w).copy_(inside)
    return out


OP = define(
    "sparse_conv2d_dgrad",
    "(Tensor grad, Tensor structure, Tensor values, int cin, int h, int w, int stride, "
    "int padding) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}:dgrad",
    compiled=False,
)
