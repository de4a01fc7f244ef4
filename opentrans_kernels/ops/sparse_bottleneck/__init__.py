"""``sparse_bottleneck``: a whole residual block in one pass over bands of rows.

``out = relu(c3(pool(relu(c2(relu(c1(x)))))) + shortcut)`` with ``shortcut = x`` or
``down(pool(x))``. The intermediates of a band stay in cache; only the block's output is written.
Inference only: differentiate through three :func:`sparse_conv2d` instead.
"""

from __future__ import annotations

import torch

from ...errors import PlanError
from ...pack import SparseWeight
from ..arguments import bottleneck_pools, image
from ..library import define, kernel_for, plane_padded

__all__ = ["fusible", "sparse_bottleneck"]


def _fake(x, s1, v1, b1, s2, v2, b2, s3, v3, b3, sd, vd, bd, cout, pool, down_pool):
    size = image("sparse_bottleneck", x)
    out = bottleneck_pools(size, pool, down_pool, sd is not None)
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
    "int down_pool) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:sparse_bottleneck",
    backward=_no_backward,
    setup_context=lambda ctx, inputs, output: None,
)


def fusible(
    c1: SparseWeight, c2: SparseWeight, c3: SparseWeight, down: SparseWeight | None
) -> str | None:
    """Why these convolutions cannot run as one fused block, or None if they can."""
    for name, w in (("conv1", c1), ("conv3", c3), ("downsample", down)):
        if w is not None and (w.kernel, w.stride, w.padding) != (1, 1, 0):
            return f"{name} is {w.kernel}x{w.kernel} with stride {w.stride}, not 1x1 with stride 1"
    if (c2.kernel, c2.stride, c2.padding) != (3, 1, 1):
        return f"conv2 is {c2.kernel}x{c2.kernel} with stride {c2.stride}, padding {c2.padding}"
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
        c1, c3, down: 1x1, stride 1. c2: 3x3, stride 1, padding 1.
        pool, down_pool: average-pool windows before c3 and before ``down`` (equal with ``down``;
            1 without).

    Returns:
        ``[N, c3.cout, H // pool, W // pool]``, dense rows, padded planes.

    Raises:
        PlanError: convolutions that do not form such a block; gradients asked for.
        KernelUnavailable: no kernel for this device and dtype.
        RuntimeError: shapes or dtypes that do not fit, or an image smaller than the pool.
    """
    if why := fusible(c1, c2, c3, down):
        raise PlanError(f"these convolutions do not form a fused bottleneck: {why}.")
    run = kernel_for("sparse_bottleneck", x)
    bottleneck_pools(image("sparse_bottleneck", x), pool, down_pool, down is not None)
    parts = [t for w in (c1, c2, c3) for t in (w.structure, w.values, w.bias)]
    extra = (None,) * 3 if down is None else (down.structure, down.values, down.bias)
    return run(x, *parts, *extra, c3.cout, pool, down_pool)
