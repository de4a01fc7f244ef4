"""Two sparse linear layers in plain PyTorch: the oracle of the fused op, and its fallback."""

from __future__ import annotations

from .. import arguments
from ..library import in_float32
from ..sparse_linear.reference import linear

__all__ = ["sparse_mlp"]


@in_float32
def sparse_mlp(
    x, structure1, values1, bias1, structure2, values2, bias2, residual, cout, activation=0,
    slope=0.0,
):  # fmt: skip
    """See :func:`opentrans_kernels.ops.sparse_mlp`; the op's arguments in schema order."""
    op = "sparse_mlp"
    act = arguments.activation(op, False, activation, slope)
    y = linear(
        op, act.apply_(linear(op, x, structure1, values1, bias1)), structure2, values2, bias2
    )
    arguments.result(op, y.shape, cout, residual)
    return y if residual is None else y + residual
