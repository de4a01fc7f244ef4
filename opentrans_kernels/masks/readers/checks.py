"""Checked masks from tensors of any origin, shared by all readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from opentrans_kernels.errors import MaskError
from opentrans_kernels.finite import count_non_finite
from opentrans_kernels.masks.files import shorten
from opentrans_kernels.masks.wrappers import without_wrappers

#: Of an nn.MultiheadAttention: queries, keys and values.
PACKED = "in_proj_weight"
MASK_SUFFIXES = (".weight_mask", ".weight.mask", ".mask", ".weight")
Masks = dict[str, torch.Tensor]
Notes = dict[str, str]


@dataclass(frozen=True)
class Masked:
    """A parameter and its mask, as a file holds the two.

    ``parameter``: its name in the network. ``key``: the mask's name in the file. ``mask``: 0/1, of
    the parameter's shape. ``weight``: the parameter before masking, None if the file lacks it.
    ``entries``: all names in the file that the two came from.
    """

    parameter: str
    key: str
    mask: torch.Tensor
    weight: torch.Tensor | None
    entries: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What a reader found: checked masks by module name, and what it wants to tell.

    ``used``: names in the file that were understood; ``synthetic``: not from training.
    """

    masks: Masks
    notes: Notes = field(default_factory=dict)
    used: frozenset[str] = frozenset()
    synthetic: bool = False


def to_mask(name: str, tensor: torch.Tensor, origin: str) -> torch.Tensor:
    """A checked bool copy of a 0/1 tensor of any dtype. Raises MaskError on any other value."""
    if not isinstance(tensor, torch.Tensor):
        raise MaskError(
            f"mask {name!r} of {origin} is a {type(tensor).__name__}, not a tensor. Pass tensors "
            "with the shape of the weight."
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise MaskError(
            f"mask {name!r} of {origin} is a {tensor.layout} tensor of {tensor.dtype}. Save masks "
            "as ordinary dense bool, uint8 or float tensors."
        )
    if tensor.numel() == 0:
        raise MaskError(
            f"mask {name!r} of {origin} is empty, of shape {tuple(tensor.shape)}. A mask has the "
            "shape of the weight it belongs to; save it again."
        )
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bool:
        return tensor.clone(memory_format=torch.contiguous_format)
    keep = tensor != 0
    ones = tensor == 1
    if not torch.equal(keep, ones):  # NaN is kept and not one
        wrong = keep ^ ones
        where = tuple(wrong.nonzero()[0].tolist())
        raise MaskError(
            f"mask {name!r} of {origin} has {int(wrong.sum())} values other than 0 and 1, the "
            f"first {tensor[where].item():g} at {where}. A mask keeps a weight with 1 and removes "
            "it with 0: threshold scores first, or pass the weights as a dense checkpoint."
        )
    return keep.contiguous()


def countable(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype in which PyTorch counts and sums: not float8, and no wide unsigned integer."""
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        return tensor.float()
    wide = tensor.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return tensor.long() if wide else tensor


def is_weight(parameter: str) -> bool:
    """Whether a parameter is the weight of a layer; attention has one of its own name."""
    return parameter.rpartition(".")[2] in ("weight", PACKED)


def module_name(key: str) -> str:
    """Module name of a mask's key: "layer1.0.conv1.weight_mask" -> "layer1.0.conv1"; the layer
    "attn.in_proj" of "attn.in_proj_weight_mask"."""
    key = without_wrappers(key)
    bare = key.removesuffix(".mask").removesuffix("_mask")
    if bare.rpartition(".")[2] == PACKED:
        return bare.removesuffix("_weight")
    for suffix in MASK_SUFFIXES:
        if key.endswith(suffix):
            return key.removesuffix(suffix)
        if key == suffix[1:]:  # the model is a single conv, without a name
            return ""
    return key


def collect_masks(tensors: Mapping[str, torch.Tensor], origin: str) -> tuple[Masks, Notes]:
    """Checked masks by module name.

    Entries for anything but a weight of two or more dimensions that remove nothing (a norm's ones)
    are left out, with a note. Raises MaskError on bad values or two masks for one module.
    """
    masks: Masks = {}
    left_out = []
    for key, tensor in tensors.items():
        mask = to_mask(key, tensor, origin)
        if mask.ndim < 2 and mask.all():
            left_out.append(key)
            continue
        name = module_name(key)
        if name in masks:
            raise MaskError(
                f"{origin} has two masks for module {name!r} (one is {key!r}). Keep one of them."
            )
        masks[name] = mask
    return masks, {"entries that remove nothing": shorten(left_out)} if left_out else {}


def zeros_as_masks(weights: Mapping[str, torch.Tensor], origin: str) -> Masks:
    """weight != 0 per conv. Raises MaskError if a weight is NaN or infinite."""
    masks = {}
    for name, weight in weights.items():
        bad = count_non_finite(weight)
        if bad:
            kind = "conv" if weight.ndim == 4 else "linear layer"
            raise MaskError(
                f"the weight of {kind} {name!r} of {origin} has {bad} values that are NaN or "
                "infinite; the training that wrote it diverged. Use an earlier checkpoint."
            )
        masks[name] = (weight.detach() != 0).cpu().contiguous()
    return masks
