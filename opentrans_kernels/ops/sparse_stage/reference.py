"""A stage in plain PyTorch: its blocks one by one, in turn or not."""

from __future__ import annotations

from ..arguments import BadArgument
from ..library import in_float32
from ..sparse_bottleneck.reference import sparse_bottleneck

__all__ = ["sparse_stage"]


@in_float32
def sparse_stage(x, weights, cout, pool, down, stride=(), in_turn=False):
    """See :func:`opentrans_kernels.ops.sparse_stage`; arguments in schema order."""
    stride = stride or [1] * len(cout)
    if not cout or not len(cout) == len(pool) == len(down) == len(stride):
        raise BadArgument(
            "sparse_stage: cout, pool, down and stride must have one element per block."
        )
    expected = sum(12 if has_down else 9 for has_down in down)
    if len(weights) != expected:
        raise BadArgument(
            f"sparse_stage: these blocks have {expected} tensors (structure, values, bias of each "
            f"convolution), got {len(weights)}."
        )
    at = 0
    for channels, size, has_down, step in zip(cout, pool, down, stride, strict=True):
        parts = list(weights[at : at + (12 if has_down else 9)])
        at += len(parts)
        parts += [None] * (12 - len(parts))
        x = sparse_bottleneck(x, *parts, channels, size, size if has_down else 1, step)
    return x
