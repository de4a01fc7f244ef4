"""``sparse_bottleneck``: a whole residual block in one pass over bands of rows.

``out = relu(c3(pool(relu(c2(relu(c1(x)))))) + shortcut)`` with ``shortcut = x`` or
``down(pool(x))``. The intermediates of a band stay in cache; only the block's output is written.
Inference only: differentiate through three :func:`sparse_conv2d` instead.
"""

from __future__ import annotations

import torch

from ...errors import PlanError
from ...pack import SparseWeight
from ..arguments import bottleneck_size, image
from ..library import define, kernel_for, plane_padded

__all__ = ["fusible", "sparse_bottleneck"]


def _fake(x, s1, v1, b1, s2, v2, b2, s3, v3, b3, sd, vd, bd, cout, pool, down_pool, stride=1):
    size = image("sparse_bottleneck", x)
    out = bottleneck_size(size, pool, down_pool, sd is not None, stride)
    return plane_padded(x, size[0], cout, *out)


def _no_backward(ctx, grad):
    raise PlanError(
        "sparse_bottleneck computes no gradients: its intermediates are not kept. Run it under "
        "torch.no_grad(), or chain sparse_conv2d calls, which are differentiable."
    )


OP = define(
    "sparse_bottleneck",
    "(Tensor x, Tensor s1, Tensor v1, Tensor b1, Tensor s2, Tensor v2, Tensor b2, Tensor s3, "
    "Tensor v3, Tensor b3, Tensor? sd, Tensor? vd, Tensor? bd, int cout, int pool, "
    "int down_pool, int stride=1) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:sparse_bottleneck",
    backward=_no_backward,
    setup_context=lambda ctx, inputs, output: None,
)


def fusible(
    c1: SparseWeight, c2: SparseWeight, c3: SparseWeight, down: SparseWeight | None
) -> str | None:
    """Why these convolutions cannot run as one fused block, or None if they can."""
    if (c2.kernel, c2.padding, c2.dilation) != (3, 1, 1) or c2.stride not in (1, 2):
        return (
            f"conv2 is {c2.kernel}x{c2.kernel} with stride {c2.stride}, padding {c2.padding}, "
            f"dilation {c2.dilation}"
        )
    if c2.stride > 1 and down is None:
        return f"conv2 has stride {c2.stride}, and the shortcut no convolution"
    for name, w, stride in (("conv1", c1, 1), ("conv3", c3, 1), ("downsample", down, c2.stride)):
        if w is not None and (w.kernel, w.stride, w.padding) != (1, stride, 0):
            return (
                f"{name} is {w.kernel}x{w.kernel} with stride {w.stride}, not 1x1 with stride "
                f"{stride}"
            )
    return None


def sparse_bottleneck(
    x: torch.Tensor,
    c1: SparseWeight,
    c2: SparseWeight,
    c3: SparseWeight,
    down: SparseWeight | None = None,
    pool: int = 1,
    down_pool: int = 1,
) -> torch.Tensor:
    """Run a bottleneck block with packed, BN-folded convolutions.

    Args:
        x: ``[N, c1.cin, H, W]`` float32; float64 on the reference.
        c1, c3: 1x1, stride 1. c2: 3x3, padding 1, stride 1, or 2 with ``down``. down: 1x1 with the
            stride of c2.
        pool, down_pool: average-pool windows before c3 and before ``down`` (equal with ``down``;
            1 without, and where c2 has stride 2).

    Returns:
        ``[N, c3.cout, H // pool, W // pool]``, with stride 2 half of ``H`` and ``W``, rounded up;
        dense rows, padded planes.

    Raises:
        PlanError: convolutions that do not form such a block; gradients asked for.
        KernelUnavailable: no kernel for this device and dtype.
        RuntimeError: shapes or dtypes that do not fit, or an image smaller than the pool.
    """
    if why := fusible(c1, c2, c3, down):
        raise PlanError(f"these convolutions do not form a fused bottleneck: {why}.")
    run = kernel_for("sparse_bottleneck", x)
    size = image("sparse_bottleneck", x)
    bottleneck_size(size, pool, down_pool, down is not None, c2.stride)
    parts = [t for w in (c1, c2, c3) for t in (w.structure, w.values, w.bias)]
    extra = (None,) * 3 if down is None else (down.structure, down.values, down.bias)
    return run(x, *parts, *extra, c3.cout, pool, down_pool, c2.stride)
