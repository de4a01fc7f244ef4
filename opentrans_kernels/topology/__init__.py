"""Finds the ResNet trunk inside a model: stem, residual blocks and every other convolution.

Recognition is duck-typed (attribute names, never a foreign class) and then *proved*: the block's
own forward is traced on the meta device and must compute the same expression as the structure
claims. What does not pass becomes a loose convolution and the reason is kept in ``Trunk.notes``.
"""

from __future__ import annotations

from opentrans_kernels.topology.find import find_trunk, find_trunks
from opentrans_kernels.topology.fold import fold_bn
from opentrans_kernels.topology.linears import (
    AttentionNode,
    LinearNode,
    Linears,
    MlpNode,
    Projections,
    block_linears,
    find_linears,
    linear_modules,
    packed_projections,
    parameter_name,
    pruned_linears,
    token_counts,
)
from opentrans_kernels.topology.nodes import (
    BlockNode,
    ConvNode,
    ConvShape,
    PoolNode,
    StemNode,
    Trunk,
    original,
)
from opentrans_kernels.topology.shapes import conv_shapes, forward_trunk

__all__ = [
    "AttentionNode",
    "BlockNode",
    "ConvNode",
    "ConvShape",
    "LinearNode",
    "Linears",
    "MlpNode",
    "PoolNode",
    "Projections",
    "StemNode",
    "Trunk",
    "block_linears",
    "conv_shapes",
    "find_linears",
    "find_trunk",
    "find_trunks",
    "fold_bn",
    "forward_trunk",
    "linear_modules",
    "original",
    "packed_projections",
    "parameter_name",
    "pruned_linears",
    "token_counts",
]
