"""Where the CLIP tower is in a model that somebody else built, and what is wrapped around it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from opentrans_kernels.errors import MaskError, UnsupportedModelError
from opentrans_kernels.masks import MaskSet, split_entry
from opentrans_kernels.synthetic import is_mask_spec, synthetic_masks
from opentrans_kernels.topology import find_trunks

__all__ = ["Masks", "Tower", "find_tower", "masks_for", "read_masks", "unwrap"]

log = logging.getLogger(__name__)

Masks = MaskSet | Mapping[str, torch.Tensor] | str | os.PathLike[str]

_CLIP = ("openai", "open_clip")  # families of ``topology.Trunk``
_HOME = "backbone"  # what detectron2's models call the part that is trained or run


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, whatever is around it: DistributedDataParallel, DataParallel, compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@dataclass(frozen=True)
class Tower:
    """The part of a model that holds the trunk.

    path: of ``module`` in the unwrapped model, "" for the model itself. family: "open_clip" or
    "openai" for CLIP's own function, else that of another ResNet with the same names.
    """

    path: str
    module: nn.Module
    family: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = f"at {self.path!r}" if self.path else "which is the model itself"
        return f"{type(self.module).__name__} tower {place} ({self.family} blocks)"


def find_tower(model: nn.Module, path: str = "") -> Tower:
    """The CLIP visual tower of a built model, found by structure.

    FC-CLIP: ``backbone.clip_model.visual``. Mask2Former-style models: ``backbone``. DeepLab: the
    ResNet under ``backbone``. Of several towers the one under ``backbone`` is meant; a teacher lies
    elsewhere.

    Args:
        model: wrapped or not.
        path: module path of the tower instead.

    Raises:
        UnsupportedModelError: no tower, or several that could be meant; they are listed.
    """
    model = unwrap(model)
    if path:
        try:
            part = model.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"the model has no module {path!r} ({error}). Correct MODEL.OPENTRANS.TOWER, or "
                "leave it empty to have the tower found."
            ) from error
        trunks = [t for t in find_trunks(part) if t.blocks]
        family = trunks[0].family if trunks else "generic"
        return Tower(path, part, family, trunks[0].notes if trunks else ())
    trunks = [trunk for trunk in find_trunks(model) if trunk.blocks]
    homes = [t for t in trunks if _HOME in t.prefix.split(".")] or trunks
    if len(homes) != 1:
        found = ", ".join(repr(t.prefix.rstrip(".")) for t in homes) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__} must hold exactly one ResNet tower under 'backbone', found: "
            f"{found}. Name the one that is meant: MODEL.OPENTRANS.TOWER, or attach(tower=...)."
        )
    trunk = homes[0]
    where = trunk.prefix.rstrip(".")
    notes = [note for note in trunk.notes if where in note]
    if trunk.family == "transformers":
        notes.append("a ResNet with other names than CLIP's: a mask found on CLIP does not fit it")
    elif trunk.family not in _CLIP:
        notes.append(
            f"the tower has the names of CLIP's ResNet but another function ({trunk.family} "
            "blocks): a mask found on CLIP fits by name, and prunes weights that mean other things"
        )
    return Tower(where, model.get_submodule(where), trunk.family, tuple(notes))


def masks_for(tower: nn.Module, masks: Masks) -> MaskSet:
    """Masks under the tower's names, from a MaskSet, tensors, a file or a recipe.

    Raises MaskError if they were made for another backbone, and as :func:`read_masks` does.
    """
    return read_masks(tower, masks).transfer_to(tower)


def read_masks(tower: nn.Module, masks: Masks) -> MaskSet:
    """All masks that are given, under their own names; those of a recipe are the tower's.

    Raises:
        MaskError: neither file nor recipe, or no valid masks.
        CheckpointError: the file cannot be read safely.
    """
    if isinstance(masks, str | os.PathLike):
        text = os.fspath(masks)
        if is_mask_spec(text):
            log.warning("mask %s is SYNTHETIC: made from the weights as they are", text)
            return synthetic_masks(tower, text)
        if not os.path.isfile(split_entry(text)[0]):
            raise MaskError(
                f"mask {text!r} is neither a file nor a recipe. Set MODEL.OPENTRANS.MASK.FILE to "
                "an existing file, or to a recipe such as global:0.90."
            )
        masks = MaskSet.load(text)
    elif not isinstance(masks, MaskSet):
        masks = MaskSet.from_tensors(masks)
    return masks
