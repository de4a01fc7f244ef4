"""The trunk as a chain of convolutions: batch norms folded in float64, channels compacted, padded.

A bottleneck becomes three :class:`Layer` records; the shortcut's convolution is the second K
segment of the last one, so that both are one GEMM. Every block exists in up to two widths: ``full``
(all channels, zeros included: what dense arithmetic computes) and ``compact`` (only channels that
carry information, rounded up to what tensor cores take). Both compute the same function. Inner
channels are ordered by nonzeros, so that kernels find pieces without any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..compact import CompactBlock, FoldedConv, compact_trunk, fold_block, rounded
from ..errors import UnsupportedModelError
from ..plan.subject import PlanSubject
from ..topology.blocks import pool_size

__all__ = ["Block", "Layer", "Network", "Second", "describe_network", "stage_counts"]

#: Widths are multiples of this: one K step of a half-precision tensor-core instruction.
MULTIPLE = 16


@dataclass(frozen=True)
class Second:
    """The shortcut's convolution: 1x1 weight [Cout, C2, 1, 1], after a pool or a stride."""

    weight: torch.Tensor
    pool: int = 1
    stride: int = 1


@dataclass(frozen=True, eq=False)
class Layer:
    """``pool(relu(conv(x) + second(x2) + residual + bias))``, weights in float64.

    weight: [Cout, Cin, k, k]; bias: [Cout], the second segment's included. residual: a tensor of
    the output's shape is added. pool: of the output. nnz: nonzero weights of both segments.
    """

    name: str
    weight: torch.Tensor
    bias: torch.Tensor
    stride: int = 1
    padding: int = 0
    relu: bool = True
    residual: bool = False
    second: Second | None = None
    pool: int = 1

    @property
    def kernel(self) -> int:
        return self.weight.shape[-1]

    @property
    def nnz(self) -> int:
        second = 0 if self.second is None else int(torch.count_nonzero(self.second.weight))
        return int(torch.count_nonzero(self.weight)) + second

    @property
    def density(self) -> float:
        second = 0 if self.second is None else self.second.weight.numel()
        return self.nnz / max(1, self.weight.numel() + second)

    @property
    def main_density(self) -> float:
        """Of the first segment alone."""
        return int(torch.count_nonzero(self.weight)) / max(1, self.weight.numel())

    def live_inputs(self) -> torch.Tensor:
        """Channels that some weight reads, int64, rounded up to :data:`MULTIPLE`."""
        read = (self.weight != 0).flatten(2).any(2).any(0)
        order = torch.argsort(read.int(), descending=True, stable=True)
        count = min(rounded(max(1, int(read.sum())), MULTIPLE), read.numel())
        return order[:count].sort().values

    def work(self, pixels: int) -> int:
        """MACs for this many output pixels of the convolution, before a pool."""
        after = pixels // self.pool**2
        second = 0 if self.second is None else self.second.weight.numel() * after
        return self.weight.numel() * pixels + second

    def traffic(self, size: tuple[int, int, int], out: tuple[int, int, int], itemsize: int) -> int:
        """Bytes that must move: inputs, weights and output once. Sizes: batch, height, width."""
        n, h, w = size
        cout, cin = self.weight.shape[:2]
        written = out[0] * out[1] * out[2] * cout
        count = n * h * w * cin + self.weight.numel() + written * (2 if self.residual else 1)
        if self.second is not None:
            step = self.second.pool * self.second.stride
            count += written // cout * self.second.weight.shape[1] * step**2
            count += self.second.weight.numel()
        return count * itemsize


@dataclass(frozen=True, eq=False)
class Block:
    """A residual block in its widths: variant name -> layers. Every variant has as many layers."""

    name: str
    stage: int
    variants: Mapping[str, tuple[Layer, ...]]


@dataclass(frozen=True, eq=False)
class Network:
    """A whole trunk. ``stem_pool``: module applied behind the stem's layers, None if fused in."""

    stem: tuple[Layer, ...]
    stem_pool: nn.Module | None
    blocks: tuple[Block, ...]
    stages: int
    notes: tuple[str, ...] = ()


def describe_network(subject: PlanSubject) -> Network:
    """Fold, compact and pad the trunk of a checked model.

    Raises UnsupportedModelError if the trunk is not a stem followed by recognised blocks only.
    """
    trunk = subject.trunk
    if trunk.stem is None or not trunk.blocks or not trunk.stages:
        raise UnsupportedModelError(
            f"this {trunk.family} model has no recognised stem with residual stages, so it cannot "
            f"be planned as a whole ({'; '.join(trunk.notes) or 'nothing was found'}). On the CPU "
            "its convolutions are accelerated one by one: accelerate(model, masks)."
        )
    if trunk.iterated:
        raise UnsupportedModelError(
            f"this {trunk.family} model calls the blocks of a stage one by one, so a stage cannot "
            "be planned as a whole. On the CPU its blocks are accelerated: accelerate(model, "
            "masks, device='cpu')."
        )
    for number, stage in enumerate(trunk.stages):
        parts = len(list(subject.model.get_submodule(stage).children()))
        known = sum(block.stage == trunk.blocks[0].stage + number for block in trunk.blocks)
        if parts != known:
            raise UnsupportedModelError(
                f"{stage} has {parts} parts of which {known} are recognised blocks "
                f"({'; '.join(trunk.notes)}). Every part must be recognised to plan the trunk."
            )
    if dilated := [node.name for node in trunk.convs() if node.conv.dilation != (1, 1)]:
        raise UnsupportedModelError(
            f"{dilated[0]} is dilated ({len(dilated)} convolutions are), which the kernels for "
            "GPUs do not compute. On the CPU they are accelerated: accelerate(model, masks)."
        )
    compacted = compact_trunk(trunk, subject.masks)
    stem, pool = _stem(subject, [compacted.stem[node.name] for node in trunk.stem.convs])
    blocks, narrowed = [], 0
    for node in trunk.blocks:
        layers = fold_block(node, subject.masks)
        first = trunk.blocks[0].stage
        full = _block_layers(layers.convs, layers.downsample, node.pool, node.down_pool)
        variants = {"full": _ordered(full)}
        compact = compacted.blocks[node.name]
        narrow = _padded(compact, full)
        if narrow is not None:
            variants["compact"] = _ordered(narrow)
            narrowed += 1
        blocks.append(Block(node.name, node.stage - first, variants))
    notes = (
        f"channel compaction narrows {narrowed} of {len(blocks)} blocks "
        f"(widths rounded up to {MULTIPLE})",
    )
    return Network(stem, pool, tuple(blocks), len(trunk.stages), notes)


def _stem(
    subject: PlanSubject, convs: list[FoldedConv]
) -> tuple[tuple[Layer, ...], nn.Module | None]:
    layers = [_layer(conv) for conv in convs]
    name = subject.trunk.stem.pool_name if subject.trunk.stem is not None else None
    if name is None:
        return tuple(layers), None
    pool = subject.model.get_submodule(name)
    if type(pool) is nn.AvgPool2d and pool_size(pool) == 2 and layers[-1].relu:
        layers[-1] = replace(layers[-1], pool=2)
        return tuple(layers), None
    return tuple(layers), pool


def _layer(conv: FoldedConv, **changes: object) -> Layer:
    found = Layer(conv.name, conv.weight, conv.bias, conv.stride, conv.padding, conv.relu)
    return replace(found, **changes)  # type: ignore[arg-type]


def _block_layers(
    convs: tuple[FoldedConv, ...], down: FoldedConv | None, pool: int, down_pool: int
) -> tuple[Layer, ...]:
    layers = [_layer(conv) for conv in convs]
    if len(layers) == 3:
        layers[1] = replace(layers[1], pool=pool)
    last = layers[-1]
    if down is None:
        layers[-1] = replace(last, residual=True, relu=True)
    else:
        second = Second(down.weight, down_pool, down.stride)
        layers[-1] = replace(last, bias=last.bias + down.bias, second=second, relu=True)
    return tuple(layers)


def _padded(block: CompactBlock, full: tuple[Layer, ...]) -> tuple[Layer, ...] | None:
    """The compact layers with inner widths rounded up; None if no width is smaller than before."""
    layers = list(_block_layers(block.convs, block.downsample, block.pool, block.down_pool))
    widths = [
        min(rounded(layer.weight.shape[0], MULTIPLE), max(before.weight.shape[0], MULTIPLE))
        for layer, before in zip(layers[:-1], full[:-1], strict=True)
    ]
    # One ones-channel more than a full width is possible; it costs a whole step of K.
    widths = [max(w, layer.weight.shape[0]) for w, layer in zip(widths, layers, strict=False)]
    if not any(w < b.weight.shape[0] for w, b in zip(widths, full, strict=False)):
        return None
    for i, width in enumerate(widths):
        rows = width - layers[i].weight.shape[0]
        layers[i] = replace(
            layers[i],
            weight=F.pad(layers[i].weight, (0, 0, 0, 0, 0, 0, 0, rows)),
            bias=F.pad(layers[i].bias, (0, rows)),
        )
        columns = width - layers[i + 1].weight.shape[1]
        weight = F.pad(layers[i + 1].weight, (0, 0, 0, 0, 0, columns))
        layers[i + 1] = replace(layers[i + 1], weight=weight)
    return tuple(layers)


def _ordered(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The same block, its inner channels by falling nonzeros of the 3x3 around them.

    Crowded rows meet crowded columns in few pieces of a weight, and others run empty. Only channels
    between two convolutions of the block may move.
    """
    found = list(layers)
    for i in range(len(layers) - 1):
        before, after = found[i], found[i + 1]
        live = torch.zeros(before.weight.shape[0], dtype=torch.int64)
        if before.kernel > 1:
            live += (before.weight != 0).sum((1, 2, 3))
        if after.kernel > 1:
            live += (after.weight != 0).sum((0, 2, 3))
        order = live.argsort(descending=True, stable=True)
        found[i] = replace(before, weight=before.weight[order], bias=before.bias[order])
        found[i + 1] = replace(after, weight=after.weight[:, order])
    return tuple(found)


def stage_counts(network: Network) -> Iterator[int]:
    """Blocks per stage."""
    for stage in range(network.stages):
        yield sum(block.stage == stage for block in network.blocks)
