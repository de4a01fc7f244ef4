"""Exact channel compaction: smaller dense-shaped layers that compute the same masked network.

``compact_trunk`` finds, per residual block, output channels that are constant (their masked row is
zero) and channels nobody reads (their masked column is zero), removes both and carries the
constants along. ``forward_reference`` runs the result in plain torch; it is the oracle for every
kernel.
"""

from __future__ import annotations

from opentrans_kernels.compact.block import analyse, any_along, compact_layers, forward_reference
from opentrans_kernels.compact.layers import (
    BlockLayers,
    ChannelSets,
    CompactBlock,
    FoldedConv,
    fold_block,
    fold_conv,
    rounded,
)
from opentrans_kernels.compact.trunk import BlockSummary, CompactTrunk, compact_stem, compact_trunk

__all__ = [
    "BlockLayers",
    "BlockSummary",
    "ChannelSets",
    "CompactBlock",
    "CompactTrunk",
    "FoldedConv",
    "analyse",
    "any_along",
    "compact_layers",
    "compact_stem",
    "compact_trunk",
    "fold_block",
    "fold_conv",
    "forward_reference",
    "rounded",
]
