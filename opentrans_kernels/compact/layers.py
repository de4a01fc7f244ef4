"""The records of compaction, and folding of masks and batch norms into float64 weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from opentrans_kernels.errors import MaskError, UnsupportedModelError
from opentrans_kernels.finite import count_non_finite
from opentrans_kernels.topology import BlockNode, ConvNode, fold_bn


@dataclass(frozen=True)
class FoldedConv:
    """A convolution with mask and batch norm folded in.

    weight: float64 [Cout, Cin, k, k]; bias: float64 [Cout]; stride, padding and dilation in pixels.
    relu: a ReLU follows; for the last convolution of a block it comes after the residual addition.
    """

    name: str
    weight: torch.Tensor
    bias: torch.Tensor
    stride: int = 1
    padding: int = 0
    relu: bool = False
    dilation: int = 1

    @property
    def nnz(self) -> int:
        return int(torch.count_nonzero(self.weight))

    @property
    def density(self) -> float:
        return self.nnz / max(1, self.weight.numel())


@dataclass(frozen=True)
class ChannelSets:
    """What became of the output channels of one convolution, in the original numbering.

    dead: the masked weight row is all zero.
    constant: channel -> value (float) for outputs that are the same at every pixel; holds every
        dead channel and those that read nothing but constants. Values are after the ReLU, for the
        last convolution of a block after the addition (only channels constant in the sum).
    unread: no live consumer has a nonzero weight for it (empty for the last convolution: always
        visible).
    live: channels kept, in order; before and after are widths, after counting a channel of ones.
    """

    dead: tuple[int, ...]
    constant: Mapping[int, float]
    unread: tuple[int, ...]
    live: tuple[int, ...]
    before: int
    after: int

    def rounded(self, multiple: int) -> int:
        """Width after compaction, rounded up to ``multiple`` but never above the original width."""
        return min(rounded(self.after, multiple), max(self.before, self.after))


@dataclass(frozen=True)
class CompactBlock:
    """One residual block with only its live inner channels.

    The input and the output keep their full width; conv1 reads all of the input, the last
    convolution and the downsample write all of the output.

    ones_channel: conv1's last output channel is the constant 1 (zero row, bias 1) and conv2's last
        input channel carries the constants of removed channels, so that zero padding acts on them
        as well.
    channels: "conv1", "conv2", ("conv3") -> ChannelSets.
    constant_in: constant channels of the block's input that were used (original numbering ->
        value).
    """

    name: str
    conv1: FoldedConv
    conv2: FoldedConv
    conv3: FoldedConv | None
    downsample: FoldedConv | None
    pool: int
    down_pool: int
    ones_channel: bool
    channels: Mapping[str, ChannelSets]
    constant_in: Mapping[int, float] = field(default_factory=dict)

    @property
    def convs(self) -> tuple[FoldedConv, ...]:
        """The main path in order."""
        return tuple(c for c in (self.conv1, self.conv2, self.conv3) if c is not None)

    @property
    def changed(self) -> bool:
        """True if any inner width shrank."""
        return any(sets.after < sets.before for sets in self.channels.values())


@dataclass(frozen=True)
class BlockLayers:
    """A block as full-width folded convolutions, before compaction."""

    name: str
    convs: tuple[FoldedConv, ...]
    downsample: FoldedConv | None
    pool: int = 1
    down_pool: int = 1


def rounded(width: int, multiple: int) -> int:
    """``width`` rounded up to a multiple of ``multiple``."""
    return -(-width // multiple) * multiple


def masked_weight(node: ConvNode, mask: torch.Tensor | None) -> torch.Tensor:
    """float64 [Cout, Cin, kh, kw] weight with masked entries exactly zero.

    Raises MaskError for a mask of another shape or with values other than 0 and 1,
    UnsupportedModelError for NaN or Inf weights.
    """
    weight = node.conv.weight.detach()
    bad = count_non_finite(weight)
    if bad:
        raise UnsupportedModelError(
            f"{node.name}: {bad} of {weight.numel()} weights are NaN or Inf. The checkpoint is "
            "damaged or diverged; load a sound one."
        )
    if mask is None:
        return weight.to(torch.float64, copy=True)
    if mask.shape != weight.shape:
        raise MaskError(
            f"mask '{node.name}' has shape {tuple(mask.shape)}; the model's weight has "
            f"{tuple(weight.shape)}. The mask belongs to another architecture; use one made for "
            "this model."
        )
    keep = mask.to(weight.device)
    if keep.dtype != torch.bool:
        if not ((keep == 0) | (keep == 1)).all():
            raise MaskError(
                f"mask '{node.name}' holds values other than 0 and 1. Masks are binary; binarise "
                "it with (mask != 0) if nonzero means kept."
            )
        keep = keep != 0
    # Masked in its own dtype: half the bytes, and float64 times bool is a slow loop.
    return torch.where(keep, weight, weight.new_zeros(())).to(torch.float64)


def fold_conv(node: ConvNode, mask: torch.Tensor | None = None) -> FoldedConv:
    """One convolution with mask and batch norm folded, full width. Errors as in ``fold_bn``.

    A grouped one becomes an ordinary one whose weights outside of the groups are zero.
    """
    kernel, stride, padding = node.conv.kernel_size, node.conv.stride, node.conv.padding
    dilation = node.conv.dilation
    sizes = (kernel, stride, padding, dilation)
    if any(isinstance(v, str) or len(set(v)) != 1 for v in sizes):
        raise UnsupportedModelError(
            f"{node.name}: only square convolutions can be folded, this one has kernel {kernel}, "
            f"stride {stride}, padding {padding}, dilation {dilation}. Leave it dense."
        )
    weight, bias = fold_bn(node, masked_weight(node, mask))
    groups = node.conv.groups
    if groups > 1:
        whole = weight.new_zeros(weight.shape[0], node.conv.in_channels, *weight.shape[2:])
        for out, inside, part in zip(
            whole.chunk(groups), range(groups), weight.chunk(groups), strict=True
        ):
            out[:, inside * part.shape[1] : (inside + 1) * part.shape[1]] = part
        weight = whole
    return FoldedConv(node.name, weight, bias, stride[0], int(padding[0]), node.relu, dilation[0])


def fold_block(node: BlockNode, masks: Mapping[str, torch.Tensor] | None = None) -> BlockLayers:
    """All convolutions of a block folded at full width. ``masks``: convolution name -> 0/1."""
    masks = masks or {}
    down = node.downsample
    return BlockLayers(
        name=node.name,
        convs=tuple(fold_conv(c, masks.get(c.name)) for c in node.convs),
        downsample=None if down is None else fold_conv(down, masks.get(down.name)),
        pool=node.pool,
        down_pool=node.down_pool,
    )
