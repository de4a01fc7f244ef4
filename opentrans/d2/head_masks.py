"""Masks of layers outside the tower: published mask files have a ``sem_seg_head`` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from opentrans_kernels.errors import MaskError
from opentrans_kernels.finite import count_non_finite
from opentrans_kernels.masks import MaskSet

from .towers import Tower

__all__ = ["apply_to_head", "describe_head_masks", "split_masks"]


def split_masks(
    model: nn.Module, tower: Tower, masks: MaskSet
) -> tuple[MaskSet, dict[str, torch.Tensor]]:
    """(masks of the tower, masks of the head by module path), of a set that may have both.

    A mask is of the head if its name begins with a child of ``model`` that does not hold the tower.

    Raises:
        MaskError: a mask of the head has no convolution or linear layer of its name and shape, or
            one whose weight is computed from others or not finite.
    """
    home = tower.path.split(".")[0]
    outside = {name for name, _ in model.named_children() if name != home} if home else set()
    head = {n: mask for n, mask in masks.masks.items() if n.split(".")[0] in outside}
    if not head:
        return masks, {}
    for name, mask in head.items():
        _check(model, name, mask)
    rest = {name: mask for name, mask in masks.masks.items() if name not in head}
    return replace(masks, masks=rest), head


def _check(model: nn.Module, name: str, mask: torch.Tensor) -> None:
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise MaskError(
            f"the mask of {name!r} has no layer in {type(model).__name__} ({error}). The file "
            "belongs to another head; leave those masks out, or build that model."
        ) from error
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise MaskError(
            f"the mask of {name!r} is for a {type(layer).__name__}. Convolutions and linear layers "
            "can be masked; leave this one out."
        )
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise MaskError(
            f"the weight of {name!r} is computed from others (pruned or parametrized), so zeros "
            "written to it would not last. Make it permanent first."
        )
    if weight.shape != mask.shape:
        raise MaskError(
            f"the mask of {name!r} has shape {tuple(mask.shape)}, the weight "
            f"{tuple(weight.shape)}. The file belongs to another head."
        )
    if count_non_finite(weight):
        raise MaskError(f"the weight of {name!r} holds NaN or infinity. Load finite weights first.")


def apply_to_head(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Set the removed weights of the head to zero, in place. ``masks``: from ``split_masks``."""
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_submodule(name).weight
            weight.masked_fill_(~mask.to(weight.device), 0)


def describe_head_masks(masks: Mapping[str, torch.Tensor], accelerated: bool = False) -> str:
    """One line for a report. ``accelerated``: the table of the head's parts is in it as well."""
    kept = sum(int(torch.count_nonzero(mask)) for mask in masks.values())
    numel = sum(mask.numel() for mask in masks.values())
    return (
        f"{len(masks)} layers of the head are masked, {kept} of {numel} weights kept "
        f"({kept / max(1, numel):.2%}); "
        + ("the parts of the head say which are packed" if accelerated else "they run densely")
    )
