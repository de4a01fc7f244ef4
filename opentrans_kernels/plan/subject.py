"""What is planned: a checked model, its trunk, and its masks under the model's own names."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from ..errors import MaskError, PlanError, UnsupportedModelError
from ..masks import MaskSet
from ..topology import BlockNode, ConvNode, ConvShape, Trunk, conv_shapes, find_trunk
from ..topology.blocks import plain_conv
from ..topology.fold import count_non_finite

Masks = MaskSet | Mapping[str, torch.Tensor] | str | os.PathLike[str] | None


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
        return plain_conv(self.convs[0].conv)

    @property
    def hooks(self) -> str | None:
        """A module with hooks that a replacement would not call; None if there is none."""
        if self.block is not None:
            modules = [(f"{self.name}.{n}" if n else self.name, m)
                       for n, m in self.block.module.named_modules()]  # fmt: skip
        else:
            node = self.convs[0]
            modules = [(node.name, node.conv), *((p, b) for p, b in [(node.bn_name, node.bn)] if b)]
        return next((str(name) for name, module in modules if _has_hooks(module)), None)


def _has_hooks(module: nn.Module) -> bool:
    state = vars(module)
    before = [
        hook
        for hook in state.get("_forward_pre_hooks", {}).values()
        if not isinstance(hook, BasePruningMethod)  # computes the weight, which is read instead
    ]
    others = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return bool(before) or any(state.get(key) for key in others)


@dataclass(frozen=True)
class PlanSubject:
    """A model ready to be planned.

    masks: every mask by convolution name; empty if the weights' own zeros count.
    masks_hash: content hash of the masks, of the zeros' masks if none were given.
    shapes: feature map sizes of the convolutions that an image reaches.
    """

    model: nn.Module
    trunk: Trunk
    masks: Mapping[str, torch.Tensor]
    masks_hash: str
    masks_label: str
    input_size: tuple[int, int]
    shapes: Mapping[str, ConvShape]
    units: tuple[Unit, ...]
    notes: tuple[str, ...]

    @property
    def has_zeros(self) -> bool:
        return any(unit.density < 1 for unit in self.units)

    def architecture(self) -> str:
        """SHA-256 (hex) over names, shapes, strides and paddings of all convolutions."""
        parts = [
            [node.name, list(node.conv.weight.shape), repr((node.conv.stride, node.conv.padding))]
            for unit in self.units
            for node in unit.convs
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def accelerated_parts(model: nn.Module) -> list[str]:
    """Names of the replacements that an earlier ``accelerate`` put into the model."""
    return [n for n, m in model.named_modules() if "opentrans_original" in vars(m)]


def check_model(model: nn.Module) -> None:
    """Raise UnsupportedModelError unless ``model`` is a dense float32 CPU model in eval mode."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a torch.nn.Module is needed, got {type(model).__name__}. Build the network and load "
            "its weights first."
        )
    if found := accelerated_parts(model):
        raise UnsupportedModelError(
            f"the model is already accelerated ({len(found)} modules, the first is "
            f"{found[0] or type(model).__name__!r}). Call opentrans_kernels.restore(model) first "
            "to plan it again."
        )
    if isinstance(model, nn.Conv2d):
        raise UnsupportedModelError(
            "the model is a bare Conv2d, which cannot be replaced in place. Use "
            "opentrans_kernels.nn.SparseConv2d.from_conv(conv, mask), or wrap it in nn.Sequential."
        )
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                hook(module, None)  # weight = weight_orig * weight_mask, as each forward does
        _check_conv(name, module)


def _check_conv(name: str, conv: nn.Conv2d) -> None:
    weight = conv.weight
    if weight.device.type != "cpu":
        raise UnsupportedModelError(
            f"{name} is on {weight.device}; this version accelerates on the CPU only. Call "
            "model.cpu() first."
        )
    if weight.dtype != torch.float32:
        raise UnsupportedModelError(
            f"{name} is {weight.dtype}; the sparse kernels compute in float32. Call model.float() "
            "first."
        )
    if conv.training:
        raise UnsupportedModelError(
            f"{name} is in training mode; acceleration folds batch norms and packs weights for "
            "inference. Call model.eval() first."
        )
    for label, tensor in (("weight", weight), ("bias", conv.bias)):
        if tensor is not None and (bad := count_non_finite(tensor.detach())):
            raise UnsupportedModelError(
                f"{name}: {bad} of {tensor.numel()} {label} values are NaN or Inf. The checkpoint "
                "is damaged or diverged; load a sound one."
            )


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
    known = {node.name for node in trunk.convs()}
    if stray := [name for name in given if name not in known]:
        raise MaskError(
            f"the mask of {stray[0]!r} cannot be applied: that convolution is left alone "
            f"({'; '.join(trunk.notes)}). Leave this mask out, or multiply it into the weights "
            "first (MaskSet.apply_)."
        )
    return PlanSubject(
        model=model,
        trunk=trunk,
        masks=given,
        masks_hash=digest,
        masks_label=label,
        input_size=size,
        shapes=shapes,
        units=tuple(_units(trunk, given)),
        notes=tuple(notes),
    )


def _input_size(trunk: Trunk, given: tuple[int, int] | None) -> tuple[int, int]:
    if given is None:
        root = trunk.model.get_submodule(trunk.prefix.rstrip("."))
        side = getattr(root, "image_size", 224)
        given = tuple(side) if isinstance(side, tuple | list) else (side, side)
    valid = isinstance(given, tuple | list) and len(given) == 2
    if not valid or not all(isinstance(n, int) and n > 0 for n in given):
        raise PlanError(
            f"input_size={given!r} must be (height, width) in pixels, such as (224, 224)."
        )
    return given[0], given[1]


def _resolve_masks(model: nn.Module, masks: Masks) -> tuple[dict[str, torch.Tensor], str, str]:
    """(mask by model name, content hash, label). Without masks: none, the zeros' hash."""
    if masks is None:
        zeros = MaskSet.from_model_zeros(model)
        return {}, zeros.content_hash(), "the weights' own zeros"
    if isinstance(masks, str | os.PathLike):
        masks = MaskSet.load(masks)
    elif not isinstance(masks, MaskSet):
        masks = MaskSet.from_tensors(masks)
    found = masks.transfer_to(model)
    return dict(found.masks), found.content_hash(), str(found)


def _units(trunk: Trunk, masks: Mapping[str, torch.Tensor]) -> Iterator[Unit]:
    for node in trunk.stem.convs if trunk.stem is not None else ():
        yield _unit(node.name, "stem", (node,), None, masks)
    for block in trunk.blocks:
        yield _unit(block.name, "block", block.all_convs, block, masks)
    for node in trunk.loose:
        yield _unit(node.name, "loose", (node,), None, masks)


def _unit(
    name: str, role: str, convs: tuple[ConvNode, ...], block: BlockNode | None,
    masks: Mapping[str, torch.Tensor],
) -> Unit:  # fmt: skip
    nnz, must_mask = {}, False
    for node in convs:
        nonzero = node.conv.weight.detach() != 0
        before = int(torch.count_nonzero(nonzero))
        if node.name in masks:
            nonzero &= masks[node.name]
        nnz[node.name] = int(torch.count_nonzero(nonzero))
        must_mask |= nnz[node.name] != before
    return Unit(name, role, convs, block, nnz, must_mask)


@contextlib.contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """Run with this many torch threads (None: as they are); yields the number in force."""
    before = torch.get_num_threads()
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise PlanError(f"threads={threads!r} must be a whole number of at least 1.")
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def as_plain(value: Any) -> Any:
    """Tuples as lists, recursively: what JSON gives back."""
    return json.loads(json.dumps(value))
