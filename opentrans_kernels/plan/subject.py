"""What is planned: a checked model, its trunk, and its masks under the model's own names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..errors import MaskError, UnsupportedModelError
from ..masks import MaskSet
from ..synthetic import is_mask_spec, masks_for
from ..topology import (
    BlockNode,
    ConvNode,
    ConvShape,
    Trunk,
    conv_shapes,
    find_linears,
    find_trunk,
    pruned_linears,
)
from ..topology.behaviour import added_behaviour, first_changed
from ..topology.blocks import alone, is_depthwise, plain_conv
from ..topology.collapse import Collapse, collapse_of
from ..topology.fold import uses_batch_statistics
from .arguments import checked_size
from .layers import Layer, LinearUnit, linear_units, nonzero, reached, removes_nothing
from .models import accelerated_parts as accelerated_parts
from .models import check_model as check_model

#: Where towers keep the size of their image: CLIP, timm, transformers.
_IMAGE_SIZES = ("image_size", "patch_embed.img_size", "config.image_size")

Masks = MaskSet | Mapping[str, torch.Tensor] | str | os.PathLike[str] | None


#: Grouped convolutions are packed from a weight that has zeros between its groups: in float64, the
#: largest takes 128 MB meanwhile.
LARGEST_GROUPED = 1 << 24


def unsupported_conv(conv: nn.Conv2d) -> str | None:
    """Why the sparse kernels cannot run a convolution on its own; None if they can."""
    whole = conv.weight.numel() * conv.groups
    if conv.groups > 1 and whole > LARGEST_GROUPED and not is_depthwise(conv):
        return f"has groups={conv.groups} and would have {whole} weights without"
    return plain_conv(conv, grouped=True)


@dataclass(frozen=True)
class Unit:
    """What is accelerated as one: a residual block, or a single convolution with its norm.

    name: module path of the block or convolution. role: "stem", "block" or "loose".
    nnz: convolution name -> nonzero weights after masking.
    must_mask: the mask removes weights that are not zero in the model.
    """

    name: str
    role: str
    convs: tuple[ConvNode, ...]
    block: BlockNode | None
    nnz: Mapping[str, int]
    must_mask: bool

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its weights; a convolution alone runs densely with its norm behind it, as "0"."""
        cut = 0 if self.block is None else len(self.name) + 1
        return tuple(Layer(n.name, n.conv, n.name[cut:] if cut else "0") for n in self.convs)

    @property
    def places(self) -> frozenset[str]:
        """Paths of what a replacement takes the place of."""
        return frozenset(p for node in self.convs for p, _ in node.folded()) | {self.name}

    @property
    def numel(self) -> int:
        return sum(node.conv.weight.numel() for node in self.convs)

    @property
    def density(self) -> float:
        """Share of nonzero weights, 0 to 1."""
        return sum(self.nnz.values()) / max(1, self.numel)

    @property
    def unsupported(self) -> str | None:
        """Why the sparse kernels cannot run it; None if they can."""
        if self.block is not None:
            return None  # recognised blocks hold plain convolutions only
        return unsupported_conv(self.convs[0].conv)

    @property
    def changed(self) -> str | None:
        """What a replacement would not call ("layer1.0.bn2 has hooks"); None if there is none."""
        if self.block is not None:
            # The class of the block is proved by tracing; what its instance adds is not.
            if extra := added_behaviour(self.block.module):
                return f"{self.name} {extra}"
            inner = self.block.module.named_modules()
            return first_changed((f"{self.name}.{n}", m) for n, m in inner if n)
        return first_changed((n, m) for n, m in self.convs[0].folded())


@dataclass(frozen=True)
class PlanSubject:
    """A model ready to be planned.

    masks: every mask by layer name; empty if the weights' own zeros count.
    masks_hash: content hash of the masks, of the zeros' masks if none were given.
    shapes: feature map sizes of the convolutions that an image reaches; of linear layers, tokens.
    left_alone: linear layer -> why it cannot be replaced alone.
    """

    model: nn.Module
    trunk: Trunk
    masks: Mapping[str, torch.Tensor]
    masks_hash: str
    masks_label: str
    input_size: tuple[int, int]
    shapes: Mapping[str, ConvShape]
    units: tuple[Unit | LinearUnit, ...]
    collapse: Collapse
    notes: tuple[str, ...]
    left_alone: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_zeros(self) -> bool:
        return any(unit.density < 1 for unit in self.units)

    def unfolded(self, unit: Unit) -> tuple[PlanSubject, Unit]:
        """The subject with nothing claimed about what follows the convolution of ``unit``."""
        bare = replace(unit, convs=tuple(alone(node) for node in unit.convs))
        units = tuple(bare if other is unit else other for other in self.units)
        return replace(self, units=units), bare

    def architecture(self) -> str:
        """SHA-256 (hex) over names, shapes, strides and paddings of all layers."""

        def form(module: nn.Module) -> str:
            if not isinstance(module, nn.Conv2d):
                return "linear"
            return repr((module.stride, module.padding))

        parts = [
            [layer.name, list(layer.weight.shape), form(layer.module)]
            for unit in self.units
            for layer in unit.layers
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def prepare(model: nn.Module, masks: Masks, input_size: tuple[int, int] | None) -> PlanSubject:
    """Check model and masks and list the units. Changes nothing.

    Raises UnsupportedModelError, MaskError, CheckpointError (mask file).
    """
    check_model(model)
    trunk = find_trunk(model)
    size = _input_size(trunk, input_size)
    notes = list(trunk.notes)
    try:
        shapes = conv_shapes(trunk, size)
    except UnsupportedModelError as error:
        if trunk.family != "generic":
            raise
        shapes = {}
        notes.append(f"no sizes and no timings: {error}")
    given, digest, label = _resolve_masks(model, masks)
    if isinstance(masks, str) and is_mask_spec(masks):
        linear = sum(mask.dim() == 2 for mask in given.values())
        covers = f"; it covers the {linear} linear layers of the blocks" if linear else ""
        notes.append(
            f"SYNTHETIC mask from the recipe {masks!r}: speed and exactness are real measurements, "
            f"the network's predictions mean nothing{covers}"
        )
    linears = find_linears(model)
    found = tuple(linear_units(linears, pruned_linears(model), given))
    known = {node.name for node in trunk.convs()}
    known |= {layer.name for unit in found for layer in unit.layers}
    stray = [name for name in given if name not in known]
    if stray := [name for name in stray if not removes_nothing(model, name, given[name])]:
        why = linears.left_alone.get(stray[0]) or "; ".join(trunk.notes)
        raise MaskError(
            f"the mask of {stray[0]!r} cannot be applied: that layer is left alone ({why}). Leave "
            "this mask out, or multiply it into the weights first (MaskSet.apply_)."
        )
    found, tokens, more = reached(model, found, size)
    shapes, notes = {**shapes, **tokens}, notes + more
    collapse = collapse_of(trunk, lambda name: nonzero(name, trunk.conv(name).conv.weight, given))
    batch = [node.name for node in trunk.loose if uses_batch_statistics(node)]
    if batch:
        notes.append(
            f"the norm behind {', '.join(batch)} is in training mode and normalises with the "
            "statistics of each batch: it stays as it is"
        )
    return PlanSubject(
        model=model,
        trunk=trunk,
        masks=given,
        masks_hash=digest,
        masks_label=label,
        input_size=size,
        shapes=shapes,
        units=(*_units(trunk, given), *found),
        collapse=collapse,
        notes=(*notes, *collapse.notes()),
        left_alone=linears.left_alone,
    )


def _input_size(trunk: Trunk, given: tuple[int, int] | None) -> tuple[int, int]:
    if given is None:
        root = trunk.model.get_submodule(trunk.prefix.rstrip("."))
        named = (_at(root, path) for path in _IMAGE_SIZES)
        side = next((size for size in named if size is not None), 224)
        given = tuple(side) if isinstance(side, tuple | list) else (side, side)
    return checked_size(given)


def _at(root: nn.Module, path: str) -> object:
    found: object = root
    for key in path.split("."):
        found = getattr(found, key, None)
    return found


def _resolve_masks(model: nn.Module, masks: Masks) -> tuple[dict[str, torch.Tensor], str, str]:
    """(mask by model name, content hash, label). Without masks: none, the zeros' hash."""
    if masks is None:
        zeros = MaskSet.from_model_zeros(model)
        return {}, zeros.content_hash(), "the weights' own zeros"
    if isinstance(masks, str | os.PathLike):
        masks = masks_for(masks, model)
    elif isinstance(masks, Mapping):
        masks = MaskSet.from_tensors(masks)
    elif not isinstance(masks, MaskSet):
        raise MaskError(
            f"masks must be a MaskSet, a dict of name -> 0/1 tensor, a mask file or a recipe such "
            f"as 'global:0.90', got {type(masks).__name__}. None takes the weights' own zeros."
        )
    found = masks.transfer_to(model)
    return dict(found.masks), found.content_hash(), str(found)


def _units(trunk: Trunk, masks: Mapping[str, torch.Tensor]) -> Iterator[Unit]:
    for node in trunk.stem.convs if trunk.stem is not None else ():
        yield _unit(node.name, "stem", (node,), None, masks)
    for block in trunk.blocks:
        yield _unit(block.name, "block", block.all_convs, block, masks)
    for node in trunk.loose:
        known = alone(node) if uses_batch_statistics(node) else node
        yield _unit(node.name, "loose", (known,), None, masks)


def _unit(
    name: str, role: str, convs: tuple[ConvNode, ...], block: BlockNode | None,
    masks: Mapping[str, torch.Tensor],
) -> Unit:  # fmt: skip
    nnz, must_mask = {}, False
    for node in convs:
        before = int(torch.count_nonzero(node.conv.weight.detach()))
        nnz[node.name] = int(torch.count_nonzero(nonzero(node.name, node.conv.weight, masks)))
        must_mask |= nnz[node.name] != before
    return Unit(name, role, convs, block, nnz, must_mask)
