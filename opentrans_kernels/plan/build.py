"""Building the replacement modules of one unit, and the layers it will execute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..compact import CompactBlock, FoldedConv, compact_trunk, fold_conv
from ..compact.layers import masked_weight
from ..errors import UnsupportedModelError
from ..freshness import Freshness, freshness_of
from ..linears import (
    AcceleratedAttention,
    AcceleratedLinear,
    AcceleratedMlp,
    DenseLinear,
    SelfAttention,
    SparseLinear,
)
from ..nn import (
    AcceleratedBlock,
    AcceleratedConv2d,
    DenseEngine,
    DepthwiseEngine,
    Engine,
    FoldedActivation,
    FoldedBatchNorm,
    Replacement,
    SparseConv2d,
    SparseEngine,
    WinogradEngine,
    watch_together,
)
from ..topology import ConvNode, fold_bn
from ..topology.blocks import is_depthwise
from .layers import LinearUnit
from .subject import PlanSubject, Unit


@dataclass(frozen=True)
class Built:
    """One form of a unit.

    swaps: module path -> replacement. nnz, widths: convolution name -> nonzeros and
    (out, in) channels it executes.
    """

    kind: str
    module: Replacement
    swaps: Mapping[str, Replacement]
    nnz: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def call(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What computes the unit from its input alone."""
        attends = isinstance(self.module, AcceleratedAttention)
        return SelfAttention(self.module) if attends else self.module

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors it adds to the model."""
        parts = (m for m in self.module.modules() if isinstance(m, Engine))
        return sum(part.nbytes for part in parts)


class Builder:
    """Builds units of one subject, folding float64 weights one block at a time."""

    def __init__(self, subject: PlanSubject) -> None:
        self.subject = subject
        # Every block stays exact on its own, whatever runs before it.
        convs = {node.name for node in subject.trunk.convs()}
        masks = {name: mask for name, mask in subject.masks.items() if name in convs}
        self.compact = compact_trunk(subject.trunk, masks, residual_constants=False)
        self._folded: tuple[str, dict[str, FoldedConv]] = ("", {})

    def shrinks(self, unit: Unit | LinearUnit) -> bool:
        """True if inner channels of the block disappear."""
        if unit.block is None:
            return False
        return any(s.after < s.before for s in self.compact.summaries[unit.name].channels.values())

    def build(self, unit: Unit | LinearUnit, kind: str) -> Built:
        """The unit as ``kind`` "sparse", "winograd" or "compact". Nothing in the model changes."""
        if isinstance(unit, LinearUnit):
            return self._linears(unit, kind)
        if unit.block is None:
            return self._conv(unit, kind)
        folded = self._block_layers(unit)
        originals = {self._role(unit, node): node for node in unit.convs}
        engines: dict[str, Engine] = {
            role: SparseEngine.from_folded(conv)
            if kind == "sparse"
            else DenseEngine(conv.weight, conv.bias, originals[role].conv)
            for role, conv in folded.items()
        }
        block = unit.block
        masks = self._inside(unit)
        module = AcceleratedBlock(
            block.module, engines, block.pool, block.down_pool, masks, block.name
        )
        module.opentrans_freshness = freshness_of(unit.convs)
        return Built(
            kind,
            module,
            {unit.name: module},
            {originals[role].name: engine.nnz for role, engine in engines.items()},
            {originals[r].name: tuple(c.weight.shape[:2]) for r, c in folded.items()},
        )

    def release(self) -> None:
        """Drop the float64 weights of the block built last."""
        self._folded = ("", {})

    def _block_layers(self, unit: Unit) -> dict[str, FoldedConv]:
        if self._folded[0] != unit.name:
            self.release()  # before the next one is folded: they are large
            found: CompactBlock = self.compact.blocks[unit.name]
            layers = {f"conv{i}": conv for i, conv in enumerate(found.convs, 1)}
            if found.downsample is not None:
                layers["downsample"] = found.downsample
            self._folded = (unit.name, layers)
        return self._folded[1]

    @staticmethod
    def _role(unit: Unit, node: ConvNode) -> str:
        if unit.block is not None and node is unit.block.downsample:
            return "downsample"
        return f"conv{unit.convs.index(node) + 1}"

    def _masks(self, unit: Unit | LinearUnit) -> dict[str, torch.Tensor]:
        """The masks of a unit that are not in its weights."""
        if not unit.must_mask:
            return {}
        given = self.subject.masks
        return {layer.name: given[layer.name] for layer in unit.layers if layer.name in given}

    def _inside(self, unit: Unit | LinearUnit, cut: str = "") -> dict[str, torch.Tensor]:
        """Path of a parameter below the unit's module -> its mask; ``cut`` stands before them."""
        masks = self._masks(unit)
        named = ((layer.below.removeprefix(cut), layer.name) for layer in unit.layers)
        return {path: masks[name] for path, name in named if name in masks}

    def _linears(self, unit: LinearUnit, kind: str) -> Built:
        masks = self._masks(unit)
        engines: list[Engine] = []
        for layer in unit.layers:
            weight, bias = layer.weight.detach(), layer.bias
            if layer.name in masks:
                weight = weight * masks[layer.name]
            engines.append((SparseLinear.of if kind == "sparse" else DenseLinear)(weight, bias))
        if unit.role == "linear":
            module: Replacement = AcceleratedLinear(unit.module, engines[0])
        elif unit.mlp is None:
            below = self._inside(unit, "attention.")
            module = AcceleratedAttention(unit.module, *engines, unit.name, below)
        else:
            inside = self._inside(unit)
            named = dict(zip(("first", "second"), engines, strict=True))
            module = AcceleratedMlp(unit.module, named, unit.mlp.activation, inside, unit.name)
        held = {unit.name: unit.module} if unit.role == "attention" else {
            layer.name: layer.module for layer in unit.layers
        }  # fmt: skip
        module.opentrans_freshness = Freshness(held)
        return Built(
            kind,
            module,
            {unit.name: module},
            {la.name: engine.nnz for la, engine in zip(unit.layers, engines, strict=True)},
            {la.name: la.shape[:2] for la in unit.layers},
        )

    def _conv(self, unit: Unit, kind: str) -> Built:
        node = unit.convs[0]
        mask = self.subject.masks.get(node.name)
        if kind == "sparse" and not is_depthwise(node.conv):
            folded = fold_conv(node, mask)
            weight = folded.weight
            module: AcceleratedConv2d = SparseConv2d(
                node.conv, SparseEngine.from_folded(folded), node.activation
            )
        else:
            weight, bias = fold_bn(node, masked_weight(node, mask))
            form = _ENGINES.get(kind, DenseEngine)
            module = AcceleratedConv2d(node.conv, form(weight, bias, node.conv), node.activation)
        freshness = module.opentrans_freshness = freshness_of(unit.convs)
        swaps: dict[str, Replacement] = {node.name: module}
        if node.bn is not None and node.bn_name is not None:
            swaps[node.bn_name] = FoldedBatchNorm(node.bn)
            swaps[node.bn_name].opentrans_freshness = freshness
        if node.act is not None and node.act_name is not None:
            swaps[node.act_name] = FoldedActivation(node.act)
        if len(swaps) > 1:
            masks = {"weight": mask} if unit.must_mask and mask is not None else {}
            watch_together(self.subject.model, swaps, masks, through=node.through)
        nnz = {node.name: module.opentrans_engine.nnz}
        return Built(kind, module, swaps, nnz, {node.name: tuple(weight.shape[:2])})


#: Of a convolution alone that is not packed.
_ENGINES = {"sparse": DepthwiseEngine, "winograd": WinogradEngine}


def check_replaceable(unit: Unit | LinearUnit) -> None:
    """Raise UnsupportedModelError if a unit that needs its mask applied cannot be replaced."""
    if unit.must_mask and (what := unit.changed):
        raise UnsupportedModelError(
            f"{what}, which a replacement of {unit.name} would not call, and its mask is not in "
            "the weights yet, so the layer cannot stay as it is either. Remove what was added, or "
            "multiply the mask into the weights first (MaskSet.apply_)."
        )


def dense_call(unit: Unit | LinearUnit) -> Callable[[torch.Tensor], torch.Tensor]:
    """The unit as the model runs it now: block, or convolution, norm and activation of its own."""
    if isinstance(unit, LinearUnit):
        return SelfAttention(unit.module) if unit.role == "attention" else unit.module
    if unit.block is not None:
        return unit.block.module
    return nn.Sequential(*(module for _, module in unit.convs[0].folded()))
