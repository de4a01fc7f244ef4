"""State dicts as the network computes with them: masks applied, wrappers' names taken off."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from opentrans_kernels.masks.contents import Section, open_source, weights_section
from opentrans_kernels.masks.readers.checks import Masked, Masks, module_name, to_mask
from opentrans_kernels.masks.readers.families import masked_parameters, unmasked_parametrizations
from opentrans_kernels.masks.readers.leftover import refuse_absent_masks, unread_masks
from opentrans_kernels.masks.readers.material import Material, conv_weights, weight_masks
from opentrans_kernels.masks.wrappers import without_wrappers


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint file, as a plain state dict on the CPU.

    ``path``: FILE, or FILE:ENTRY for one of several networks in it. Reads the same files as the
    masks are read from, with the same care. Masks that the file holds are folded into the weights
    as exact zeros, in the words of every tool in ``FAMILIES``, so that a pruned checkpoint is never
    loaded as if it were dense. Names come without what wrappers put into them.

    Raises CheckpointError if the file cannot be read or it is not clear which network is meant,
    MaskError if it holds masks that cannot be applied.
    """
    material = Material(open_source(path))
    sections = material.weight_sections or list(material.source.sections)
    section = weights_section(material.source, sections)
    masks: Masks = {}
    beside = [s for s in material.mask_sections if s is not section]
    if beside:
        found = [(s, weight_masks({"": _entries(s)}, s.origin)[0]) for s in beside]
        chosen = material.one(found, any_network=True)
        masks = next(m for s, m in found if s is chosen)
    return fold_masks(section.tensors, section.origin, masks)


def _entries(section: Section) -> list[Masked]:
    """The masks of a section that holds nothing else, each as that of its module's weight."""
    names = ((key, module_name(key), mask) for key, mask in section.tensors.items())
    return [
        Masked(f"{name}.weight" if name else "weight", key, mask, None, (key,))
        for key, name, mask in names
        if mask.ndim > 1
    ]


def holds_masks(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict names masks beside its weights, or weights whose masks it lacks."""
    return bool(masked_parameters(tensors, "the state dict") or unmasked_parametrizations(tensors))


def fold_masks(
    tensors: Mapping[str, torch.Tensor], origin: str, masks: Mapping[str, torch.Tensor] = {}
) -> dict[str, torch.Tensor]:
    """A state dict with the masks it holds applied, in the order of ``tensors``.

    ``masks``: module name -> bool mask from elsewhere, for weights without one of their own; one of
    another name or shape is ignored, as that of a part that is not in ``tensors``. ``origin`` names
    the state dict in messages.

    Raises MaskError if a mask is not 0/1, does not fit its weight, or cannot be read.
    """
    groups = masked_parameters(tensors, origin)
    own = {m.parameter: m for group in groups.values() for m in group if m.weight is not None}
    owner = {entry: m for m in own.values() for entry in m.entries}
    bare = {key: parameter for parameter, key in unmasked_parametrizations(tensors).items()}
    given = {f"{name}.weight" if name else "weight": mask for name, mask in masks.items()}
    refuse_absent_masks(tensors, set(own) | set(given), origin)
    state: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if key in owner:
            masked = owner[key]
            if masked.weight is not None and masked.key == key:
                mask = to_mask(key, masked.mask, origin).to(masked.weight.device)
                state[masked.parameter] = masked.weight.masked_fill(~mask, 0)
            else:
                state.setdefault(masked.parameter, tensor)  # holds the place in the order
            continue
        name = bare.get(key, without_wrappers(key))
        mask = given.get(name)
        if mask is not None and mask.shape == tensor.shape:
            tensor = tensor.masked_fill(~mask.to(tensor.device), 0)
        if name not in state or name != key:  # a wrapper's own parameter is the one in use
            state[name] = tensor
    whole = {n: w for n, w in conv_weights(state).items() if bool((w != 0).all())}
    section = Section(origin, "", tensors)
    unread_masks(section, frozenset(owner), whole, {})
    return state
