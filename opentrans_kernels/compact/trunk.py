"""Compaction of a whole trunk, lazily: float64 weights of one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opentrans_kernels.compact.block import (
    analyse,
    compact_layers,
    constants_of,
    indices,
    read_constants,
)
from opentrans_kernels.compact.layers import (
    ChannelSets,
    CompactBlock,
    FoldedConv,
    fold_block,
    fold_conv,
)
from opentrans_kernels.errors import MaskError
from opentrans_kernels.topology import BlockNode, Trunk


@dataclass(frozen=True)
class BlockSummary:
    """What compaction did to one block, without weights."""

    name: str
    ones_channel: bool
    channels: Mapping[str, ChannelSets]
    constant_in: Mapping[int, float]
    constant_out: Mapping[int, float]


class LazyBlocks(Mapping[str, CompactBlock]):
    """Block name -> CompactBlock, built at each access and not kept (float64 weights are large)."""

    def __init__(
        self,
        nodes: Mapping[str, BlockNode],
        masks: Mapping[str, torch.Tensor],
        summaries: Mapping[str, BlockSummary],
    ) -> None:
        self._nodes, self._masks, self._summaries = nodes, masks, summaries

    def __getitem__(self, name: str) -> CompactBlock:
        layers = fold_block(self._nodes[name], self._masks)
        return compact_layers(layers, self._summaries[name].constant_in)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)


@dataclass(frozen=True)
class CompactTrunk:
    """The compacted trunk.

    blocks: name -> CompactBlock, computed on access from the model's weights (fold again = about 10
        ms).
    stem: convolution name -> FoldedConv at full width; rows nobody reads are zero with bias 0.
    summaries: name -> channel lists of every block, always in memory.
    stem_channels: name -> ChannelSets of the stem convolutions (before == after).
    residual_constants: constants of the residual stream were carried from block to block; then a
        block expects exactly the input that the block before it produces.
    """

    trunk: Trunk
    blocks: Mapping[str, CompactBlock]
    stem: Mapping[str, FoldedConv]
    summaries: Mapping[str, BlockSummary]
    stem_channels: Mapping[str, ChannelSets]
    residual_constants: bool

    def rows(self) -> list[dict[str, Any]]:
        """One record per inner width: block, conv, width before and after, rounded to 8 and 16,
        causes.
        """
        table = []
        for name, summary in self.summaries.items():
            inner = list(summary.channels.items())[:-1]
            for role, sets in inner:
                table.append(
                    {
                        "block": name,
                        "conv": role,
                        "before": sets.before,
                        "after": sets.after,
                        "after_8": sets.rounded(8),
                        "after_16": sets.rounded(16),
                        "dead": len(sets.dead),
                        "constant": len(sets.constant),
                        "unread": len(sets.unread),
                        "ones_channel": summary.ones_channel and role == "conv1",
                    }
                )
        return table

    def report(self) -> str:
        """A plain text table of every inner width that changed."""
        rows = self.rows()
        changed = [r for r in rows if r["after"] != r["before"]]
        head = f"{len(changed)} of {len(rows)} inner widths shrink"
        before, after = sum(r["before"] for r in rows), sum(r["after"] for r in rows)
        lines = [f"channel compaction: {head}, {before} -> {after} channels"]
        for r in changed:
            ones = ", one channel of ones" if r["ones_channel"] else ""
            lines.append(
                f"  {r['block']}.{r['conv']}: {r['before']} -> {r['after']} (8: {r['after_8']}, "
                f"16: {r['after_16']}); {r['constant']} constant, {r['unread']} unread{ones}"
            )
        for name, summary in self.summaries.items():
            if summary.constant_in:
                lines.append(
                    f"  {name}: {len(summary.constant_in)} constant input channels folded away"
                )
        for name, sets in self.stem_channels.items():
            if sets.unread:
                lines.append(f"  {name}: {len(sets.unread)} unread output channels emptied")
        return "\n".join(lines)


def _checked(trunk: Trunk, masks: Any) -> dict[str, torch.Tensor]:
    """name -> mask from a mapping or a MaskSet; every name must be a convolution of the trunk."""
    given = getattr(masks, "masks", masks) or {}
    names = {node.name for node in trunk.convs()}
    unknown = sorted(set(given) - names)
    if unknown:
        shown = ", ".join(unknown[:4]) + (", ..." if len(unknown) > 4 else "")
        raise MaskError(
            f"{len(unknown)} of {len(given)} masks name no convolution of this {trunk.family} "
            f"model: {shown}. Masks are matched by module name; rename them with "
            "MaskSet.transfer_to(model)."
        )
    return dict(given)


def compact_trunk(
    trunk: Trunk,
    masks: Mapping[str, torch.Tensor] | Any | None = None,
    *,
    residual_constants: bool = True,
) -> CompactTrunk:
    """Find every removable channel of a trunk, exactly.

    masks: convolution name -> 0/1 tensor of the weight's shape, or a MaskSet with this model's
        names. None: the weights' own zeros are the mask. A convolution without a mask keeps its own
        zeros.
    residual_constants: also use channels of the residual stream that are constant, within each
        stage. Then a block is exact only behind its predecessor; pass False to use blocks on their
        own.

    Raises MaskError (unknown names, wrong shapes, values other than 0/1) and UnsupportedModelError
    (training mode, missing statistics, NaN or Inf).
    """
    checked = _checked(trunk, masks)
    summaries: dict[str, BlockSummary] = {}
    constants: dict[int, float] = {}
    expected: tuple[int, int] | None = None
    for node in trunk.blocks:
        # A block behind an unrecognised one, or the first of a stage, knows nothing about its
        # input.
        if not residual_constants or (node.stage, node.index) != expected:
            constants = {}
        found = analyse(fold_block(node, checked), constants)
        summaries[node.name] = BlockSummary(
            node.name, found.ones_channel, found.channels, constants, found.constant_out
        )
        constants, expected = found.constant_out, (node.stage, node.index + 1)
    stem_nodes = trunk.stem.convs if trunk.stem is not None else ()
    stem, stem_channels = compact_stem([fold_conv(n, checked.get(n.name)) for n in stem_nodes])
    nodes = {node.name: node for node in trunk.blocks}
    blocks = LazyBlocks(nodes, checked, summaries)
    return CompactTrunk(trunk, blocks, stem, summaries, stem_channels, residual_constants)


def compact_stem(
    convs: Sequence[FoldedConv],
) -> tuple[dict[str, FoldedConv], dict[str, ChannelSets]]:
    """Full-width stem convolutions; rows that no later stem convolution reads become empty.

    convs: in order, each with a ReLU behind it. The output of the last one is visible to users and
    stays as it is.
    """
    convs = list(convs)
    readers = [read_constants(conv, {}, allow_ones=False) for conv in convs]
    constants = [constants_of(reader) for reader in readers]
    channels: dict[str, ChannelSets] = {}
    unread: tuple[int, ...] = ()
    for i in range(len(convs) - 1, -1, -1):
        conv = convs[i]
        width = conv.weight.shape[0]
        dead = indices(readers[i].dead)
        if unread:
            rows = torch.tensor(unread, device=conv.weight.device)
            weight, bias = conv.weight.clone(), conv.bias.clone()
            weight[rows], bias[rows] = 0, 0
            conv = replace(conv, weight=weight, bias=bias)
        if i > 0:
            # A channel that is constantly zero after its ReLU contributes nothing.
            silent = [c for c, value in constants[i - 1].items() if value == 0]
            if silent:
                weight = conv.weight.clone()
                weight[:, torch.tensor(silent, device=weight.device)] = 0
                conv = replace(conv, weight=weight)
        convs[i] = conv
        gone = set(unread)
        live = tuple(c for c in range(width) if c not in gone)
        only_unread = tuple(c for c in unread if c not in constants[i])
        channels[conv.name] = ChannelSets(dead, constants[i], only_unread, live, width, width)
        columns = (conv.weight != 0).flatten(2).any(2).any(0)
        unread = tuple((~columns).nonzero().flatten().tolist())
    return {conv.name: conv for conv in convs}, dict(reversed(channels.items()))
