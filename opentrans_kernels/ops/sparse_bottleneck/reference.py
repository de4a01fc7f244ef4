"""The fused bottleneck in plain PyTorch, in any floating dtype."""

from __future__ import annotations

import torch.nn.functional as F

from ...pack import dense_weight
from .. import arguments
from ..library import in_float32, plane_padded

__all__ = ["sparse_bottleneck"]


def _conv(x, structure, values, bias, stride=1, padding=0):
    _, _, cin, cout, kernel = structure[:5].tolist()
    weight = dense_weight(structure, values, cin, cout, kernel).to(x.dtype)
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)


@in_float32
def sparse_bottleneck(
    x, s1, v1, b1, s2, v2, b2, s3, v3, b3, sd, vd, bd, cout, pool, down_pool, stride=1
):
    """See :func:`opentrans_kernels.ops.sparse_bottleneck`; arguments in schema order."""
    convs = ((s1, v1, b1), (s2, v2, b2), (s3, v3, b3), (sd, vd, bd))
    arguments.bottleneck(x, *convs, cout, pool, down_pool, stride)
    y = _conv(x, s1, v1, b1).relu()
    y = _conv(y, s2, v2, b2, stride, 1).relu()
    if pool > 1:
        y = F.avg_pool2d(y, pool)
    y = _conv(y, s3, v3, b3)
    shortcut = F.avg_pool2d(x, down_pool) if down_pool > 1 else x
    if sd is not None:
        shortcut = _conv(shortcut, sd, vd, bd, stride)
    y = (y + shortcut).relu()
    return plane_padded(y, *y.shape).copy_(y)
