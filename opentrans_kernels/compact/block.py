"""Compaction of one block, and the plain torch forward of the result.

Two passes reach the fixpoint, because a block is a chain. *Forward*: a row that reads nothing but
constants is a constant itself; its value needs only what lies before it. *Backward*: a channel is
needed only if a needed, non-constant row behind it reads it; that needs only what lies behind it.

A constant c read by weight w contributes w*c wherever the tap lies inside the image and nothing
where it lies in the zero padding. Taps that can never touch the padding go into the bias. The
others are summed per output row and tap into the weights of one extra input channel that is 1
everywhere: the padding then acts on it exactly as on the removed channels. A plain bias would be
wrong on every border pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from opentrans_kernels.compact.layers import BlockLayers, ChannelSets, CompactBlock, FoldedConv


def _inside_taps(conv: FoldedConv) -> torch.Tensor:
    """bool [k, k]: taps that read inside the image for every output pixel of every image size."""
    k = conv.weight.shape[-1]
    line = torch.arange(k, device=conv.weight.device) * conv.dilation
    inside = (line >= conv.padding) & (line <= (k - 1) * conv.dilation - conv.padding)
    return inside[:, None] & inside[None, :]


def _reads(weight: torch.Tensor) -> torch.Tensor:
    """bool [Cout, Cin]: some tap is nonzero. weight: [Cout, Cin, k, k] of any dtype."""
    return any_along((weight if weight.dtype == torch.bool else weight != 0).flatten(2), 2)


def any_along(flags: torch.Tensor, dim: int) -> torch.Tensor:
    """``flags.any(dim)`` by a maximum of bytes, 30 to 60 times faster on the CPU."""
    if flags.shape[dim] == 0:
        return flags.any(dim)
    return flags.view(torch.uint8).amax(dim).view(torch.bool)


@dataclass
class _Reader:
    """One convolution seen as a reader of channels of which some are constant.

    dead: bool [Cout], rows whose weights are all zero.
    removed: [n] input channels folded away; reads: bool [Cout, Cin] without them.
    bias: [Cout] with the inside taps of the removed constants.
    ones: [Cout, k, k] weights for a channel of ones, None when no constant needs it.
    """

    conv: FoldedConv
    dead: torch.Tensor
    removed: torch.Tensor
    reads: torch.Tensor
    bias: torch.Tensor
    ones: torch.Tensor | None = None

    def fixed_rows(self) -> torch.Tensor:
        """bool [Cout]: rows whose output does not depend on the input or the position."""
        fixed = ~any_along(self.reads, 1)
        return fixed if self.ones is None else fixed & ~(self.ones != 0).flatten(1).any(1)

    def columns(self, rows: torch.Tensor) -> torch.Tensor:
        """bool [Cin]: columns with a nonzero in one of ``rows`` (bool [Cout])."""
        return any_along(self.reads[rows], 0)


def read_constants(conv: FoldedConv, constants: Mapping[int, float], allow_ones: bool) -> _Reader:
    """Fold ``constants`` (input channel -> value) into ``conv``.

    Without ``allow_ones`` a nonzero constant that needs the channel of ones stays an ordinary
    input.
    """
    reads = _reads(conv.weight)
    dead = ~any_along(reads, 1)
    device = conv.weight.device
    index = torch.tensor(list(constants), dtype=torch.long, device=device)
    value = torch.tensor(list(constants.values()), dtype=torch.float64, device=device)
    inside = _inside_taps(conv)
    if not allow_ones and not bool(inside.all()):
        index, value = index[value == 0], value[value == 0]
    if not index.numel():
        return _Reader(conv, dead, index, reads, conv.bias)
    taps = torch.einsum("onij,n->oij", conv.weight[:, index].double(), value)
    bias = conv.bias + (taps * inside).sum((1, 2))
    border = taps * ~inside
    reads[:, index] = False
    return _Reader(conv, dead, index, reads, bias, border if bool((border != 0).any()) else None)


def _fixed(reader: _Reader) -> dict[int, float]:
    """Fixed rows -> value before any activation."""
    rows = reader.fixed_rows().nonzero().flatten()
    return dict(zip(rows.tolist(), reader.bias[rows].tolist(), strict=True))


def constants_of(reader: _Reader) -> dict[int, float]:
    """Fixed rows -> value after the convolution's own ReLU."""
    relu = reader.conv.relu
    return {row: max(value, 0.0) if relu else value for row, value in _fixed(reader).items()}


def indices(flags: torch.Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero().flatten().tolist())


@dataclass
class _Cut:
    """The channels that survive between two convolutions."""

    live: torch.Tensor  # bool [C]
    ones: bool = False

    @property
    def width(self) -> int:
        return max(1, int(self.live.sum()) + self.ones)  # a layer needs at least one channel


def _assemble(reader: _Reader, before: _Cut | None, after: _Cut | None) -> FoldedConv:
    """Cut rows down to ``after`` and columns down to ``before``; None keeps all of them."""
    weight, bias, ones = reader.conv.weight, reader.bias, reader.ones
    if before is None and reader.removed.numel():  # otherwise the cut leaves them out
        weight = weight.clone()
        weight[:, reader.removed] = 0
    if after is not None and not bool(after.live.all()):
        weight, bias = weight[after.live], bias[after.live]
        ones = None if ones is None else ones[after.live]
    if before is not None:
        if not bool(before.live.all()):
            weight = weight[:, before.live]
        if before.ones and ones is not None:
            weight = torch.cat([weight, ones.unsqueeze(1)], 1)
        if weight.shape[1] < before.width:
            weight = F.pad(weight, (0, 0, 0, 0, 0, before.width - weight.shape[1]))
    if after is not None and weight.shape[0] < after.width:
        missing = after.width - weight.shape[0]
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing))
        bias = F.pad(bias, (0, missing), value=1.0 if after.ones else 0.0)
    return replace(reader.conv, weight=weight.contiguous(), bias=bias.contiguous())


@dataclass
class Analysis:
    """The fixpoint of one block: which channels are constant, which survive. No weights copied."""

    readers: list[_Reader]
    shortcut: _Reader | None
    borders: list[_Cut | None]
    channels: dict[str, ChannelSets]
    constant_out: dict[int, float]

    @property
    def ones_channel(self) -> bool:
        return any(cut is not None and cut.ones for cut in self.borders)


def analyse(layers: BlockLayers, constant_in: Mapping[int, float]) -> Analysis:
    """The two passes of the module docstring. ``constant_in``: input channel -> value.

    Weights may be bool masks: then only zeros count, and constants follow from the biases.
    """
    readers = [read_constants(layers.convs[0], constant_in, allow_ones=False)]
    constants = [constants_of(readers[0])]
    for conv in layers.convs[1:]:
        readers.append(read_constants(conv, constants[-1], allow_ones=True))
        constants.append(constants_of(readers[-1]))

    # Backward. The last convolution writes the residual stream: all of its rows are needed.
    rows = torch.ones_like(readers[-1].dead)
    cuts: list[_Cut] = []
    for reader in reversed(readers[1:]):
        ones = reader.ones is not None and bool((reader.ones[rows] != 0).any())
        rows = reader.columns(rows)
        cuts.insert(0, _Cut(rows, ones))

    shortcut = None
    arriving = constant_in
    if layers.downsample is not None:
        shortcut = read_constants(layers.downsample, constant_in, allow_ones=False)
        arriving = _fixed(shortcut)
    own = _fixed(readers[-1])
    constant_out = {c: max(own[c] + arriving[c], 0.0) for c in own if c in arriving}

    borders: list[_Cut | None] = [None, *cuts, None]
    channels = {}
    for i, (reader, cut) in enumerate(zip(readers, borders[1:], strict=True)):
        width = reader.dead.numel()
        fixed = constant_out if cut is None else constants[i]
        removed = () if cut is None else indices(~cut.live)
        channels[f"conv{i + 1}"] = ChannelSets(
            dead=indices(reader.dead),
            constant=fixed,
            unread=tuple(c for c in removed if c not in fixed),
            live=tuple(range(width)) if cut is None else indices(cut.live),
            before=width,
            after=width if cut is None else cut.width,
        )
    return Analysis(readers, shortcut, borders, channels, constant_out)


def compact_layers(
    layers: BlockLayers, constant_in: Mapping[int, float] | None = None
) -> tuple[CompactBlock, dict[int, float]]:
    """Compact one block.

    layers: full-width folded convolutions, float64 weights [Cout, Cin, k, k]. Weights that nothing
        was cut from are shared with the result.
    constant_in: channels of the block's input known to be constant (channel -> value).
    Returns the block and the channels of its *output* that are constant.

    An all-zero layer is legal; where no inner channel survives, one empty one is kept.
    """
    constant_in = dict(constant_in or {})
    found = analyse(layers, constant_in)
    compact = [
        _assemble(reader, found.borders[i], found.borders[i + 1])
        for i, reader in enumerate(found.readers)
    ]
    block = CompactBlock(
        name=layers.name,
        conv1=compact[0],
        conv2=compact[1],
        conv3=compact[2] if len(compact) > 2 else None,
        downsample=None if found.shortcut is None else _assemble(found.shortcut, None, None),
        pool=layers.pool,
        down_pool=layers.down_pool,
        ones_channel=found.ones_channel,
        channels=found.channels,
        constant_in=constant_in,
    )
    return block, found.constant_out


def forward_reference(block: CompactBlock, x: torch.Tensor) -> torch.Tensor:
    """The block in plain torch, computed in x's dtype. x: [N, Cin, H, W] -> [N, Cout, H', W'].

    float64 input gives the oracle; float32 input rounds the folded weights once, as the kernels do.
    """

    def run(conv: FoldedConv, value: torch.Tensor) -> torch.Tensor:
        weight, bias = conv.weight.to(value), conv.bias.to(value)
        return F.conv2d(value, weight, bias, conv.stride, conv.padding, conv.dilation)

    y = x
    for conv in block.convs[:-1]:
        y = F.relu(run(conv, y))
        if conv is block.conv2 and block.pool > 1:
            y = F.avg_pool2d(y, block.pool)
    y = run(block.convs[-1], y)
    shortcut = x
    if block.downsample is not None:
        pooled = F.avg_pool2d(x, block.down_pool) if block.down_pool > 1 else x
        shortcut = run(block.downsample, pooled)
    return F.relu(y + shortcut)
