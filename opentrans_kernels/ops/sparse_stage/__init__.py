"""``sparse_stage``: the residual blocks of a stage as one op.

Equal, bit for bit, to :func:`sparse_bottleneck` of one block after the other. Blocks run a few rows
behind each other, so that a block's output is read while it is in cache, and only the last one's
goes to memory. With several threads an image is cut into ranges of rows; where too many rows would
have to be computed twice, the blocks run one by one. So they do where that is asked for: outputs of
small images stay in cache anyway, and bands leave tiles that are not full. Inference only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import PlanError
from ...pack import SparseWeight
from ..arguments import image, stage_sizes
from ..library import define, kernel_for, plane_padded
from ..sparse_bottleneck import fusible

__all__ = ["sparse_stage"]

Block = tuple[SparseWeight, SparseWeight, SparseWeight, SparseWeight | None]


def _fake(x, weights, cout, pool, down, stride=(), in_turn=False):
    size = image("sparse_stage", x)
    out = stage_sizes(size, pool, stride)[-1]
    return plane_padded(x, size[0], cout[-1], *out)


def _no_backward(ctx, grad):
    raise PlanError(
        "sparse_stage computes no gradients: its intermediates are not kept. Run it under "
        "torch.no_grad(), or chain sparse_conv2d calls, which are differentiable."
    )


OP = define(
    "sparse_stage",
    "(Tensor x, Tensor[] weights, int[] cout, int[] pool, int[] down, int[] stride=[], "
    "bool in_turn=False) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:sparse_stage",
    backward=_no_backward,
    setup_context=lambda ctx, inputs, output: None,
)


def sparse_stage(
    x: torch.Tensor, blocks: Sequence[Block], pools: Sequence[int], in_turn: bool = False
) -> torch.Tensor:
    """Run residual bottlenecks one after the other.

    Args:
        x: ``[N, cin of the first conv1, H, W]`` float32; float64 on the reference.
        blocks: (conv1, conv2, conv3, downsample or None) of each, as for
            :func:`sparse_bottleneck`.
        pools: the average-pool window of each block, 1 without a downsample.
        in_turn: finish every block before the next one begins.

    Returns:
        The last block's output, dense rows, padded planes.

    Raises:
        PlanError: convolutions that do not form such blocks; gradients asked for.
        KernelUnavailable: no kernel for this device and dtype.
        RuntimeError: shapes or dtypes that do not fit, or an image smaller than a pool.
    """
    for i, block in enumerate(blocks):
        if why := fusible(*block):
            raise PlanError(f"block {i} is no fused bottleneck: {why}.")
    if not blocks or len(pools) != len(blocks):
        raise PlanError(
            f"sparse_stage: {len(blocks)} blocks and {len(pools)} pools; give at least one block, "
            "and one pool window for each."
        )
    run = kernel_for("sparse_stage", x)
    strides = [block[1].stride for block in blocks]
    stage_sizes(image("sparse_stage", x), pools, strides)
    tensors = [
        t for block in blocks for w in block if w is not None
        for t in (w.structure, w.values, w.bias)
    ]  # fmt: skip
    downs = [int(block[3] is not None) for block in blocks]
    couts = [block[2].cout for block in blocks]
    return run(x, tensors, couts, list(pools), downs, strides, in_turn)
