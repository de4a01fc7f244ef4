"""State dicts as the network computes with them: masks applied, wrappers' names taken off."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks.contents import Section, open_source, weights_section
from opentrans_kernels.masks.files import shorten
from opentrans_kernels.masks.names import find_prefixes, rename
from opentrans_kernels.masks.readers.checks import Masked, Masks, is_weight, module_name, to_mask
from opentrans_kernels.masks.readers.families import masked_parameters, unmasked_parametrizations
from opentrans_kernels.masks.readers.leftover import refuse_absent_masks, unread_masks
from opentrans_kernels.masks.readers.material import Material, conv_weights, weight_masks
from opentrans_kernels.masks.wrappers import without_wrappers
from opentrans_kernels.topology.linears import parameter_name


def read_state_dict(
    path: str | os.PathLike[str], *, masked: bool = True
) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint file, as a plain state dict on the CPU.

    ``path``: FILE, or FILE:ENTRY for one of several networks in it. Reads the same files as the
    masks are read from, with the same care. Masks that the file holds are folded into the weights
    as exact zeros, in the words of every tool in ``FAMILIES``, so that a pruned checkpoint is never
    loaded as if it were dense. Names come without what wrappers put into them. ``masked=False``
    returns the weights under the masks instead, which are checked all the same.

    Raises CheckpointError if the file cannot be read or it is not clear which network is meant,
    MaskError if it holds masks that cannot be applied.
    """
    material = Material(open_source(path))
    sections = material.weight_sections or list(material.source.sections)
    section = weights_section(material.source, sections)
    masks: Masks = {}
    beside = [s for s in material.source.sections if s not in sections]
    if beside:
        found = [(s, weight_masks({"": _entries(s)}, s.origin)[0]) for s in beside]
        chosen = material.one(found, any_network=True)
        masks = next(m for s, m in found if s is chosen)
    return fold_masks(section.tensors, section.origin, masks, apply=masked)


def _entries(section: Section) -> list[Masked]:
    """The masks of a section that holds nothing else, each as that of its module's weight."""
    names = ((key, module_name(key), mask) for key, mask in section.tensors.items())
    return [
        Masked(parameter_name(name), key, mask, None, (key,))
        for key, name, mask in names
        if mask.ndim > 1
    ]


def holds_masks(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict names masks beside its weights, or weights whose masks it lacks."""
    return bool(masked_parameters(tensors, "the state dict") or unmasked_parametrizations(tensors))


def fold_masks(
    tensors: Mapping[str, torch.Tensor],
    origin: str,
    masks: Mapping[str, torch.Tensor] = {},
    *,
    apply: bool = True,
) -> dict[str, torch.Tensor]:
    """A state dict with the masks it holds applied, in the order of ``tensors``.

    ``masks``: module name -> bool mask from elsewhere, under any prefix. ``origin`` names the state
    dict in messages. ``apply=False`` leaves the masks out of the result.

    Raises MaskError if a mask is not 0/1, does not fit its weight or finds none, or cannot be read.
    """
    groups = masked_parameters(tensors, origin)
    own = {m.parameter: m for group in groups.values() for m in group if m.weight is not None}
    owner = {entry: m for m in own.values() for entry in m.entries}
    bare = {key: parameter for parameter, key in unmasked_parametrizations(tensors).items()}
    names = {key: bare.get(key, without_wrappers(key)) for key in tensors}
    given = _placed(masks, {n: tensors[k] for k, n in names.items() if k not in owner}, own, origin)
    refuse_absent_masks(tensors, set(own) | set(given), origin)
    state: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if key in owner:
            masked = owner[key]
            if masked.weight is not None and masked.key == key:
                mask = to_mask(key, masked.mask, origin).to(masked.weight.device)
                kept = masked.weight.masked_fill(~mask, 0) if apply else masked.weight
                state[masked.parameter] = kept
            else:
                state.setdefault(masked.parameter, tensor)  # holds the place in the order
            continue
        name = names[key]
        mask = given.get(name)
        if mask is not None and apply:
            tensor = tensor.masked_fill(~mask.to(tensor.device), 0)
        if name not in state or name != key:  # a wrapper's own parameter is the one in use
            state[name] = tensor
    unread_masks(Section(origin, "", tensors), frozenset(owner), conv_weights(state), {})
    return state


def _placed(
    masks: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    own: Mapping[str, Masked],
    origin: str,
) -> dict[str, torch.Tensor]:
    """Parameter name -> mask. Raises MaskError if one that removes something finds no weight."""
    if not masks:
        return {}
    shapes = {module_name(n): tuple(t.shape) for n, t in tensors.items() if is_weight(n)}
    shapes |= {module_name(n): tuple(m.mask.shape) for n, m in own.items() if is_weight(n)}
    off, on = find_prefixes({name: tuple(mask.shape) for name, mask in masks.items()}, shapes)
    placed: dict[str, torch.Tensor] = {}
    lost = []
    for name, mask in masks.items():
        module = rename(name, off, on)
        parameter = parameter_name(module or "", {**tensors, **own})
        fits = module is not None and shapes.get(module) == tuple(mask.shape)
        if fits and parameter in own:
            fits = torch.equal(own[parameter].mask != 0, mask)
        elif fits:
            placed[parameter] = mask
        if not fits and not mask.all():
            lost.append(name)
    if lost:
        raise MaskError(
            f"{origin}: {len(lost)} of {len(masks)} masks beside the weights fit none of them "
            f"({shorten(lost, 3)}). Loading the weights without them would be another network. "
            "Save masks and weights of one network, under the names of its modules."
        )
    return placed
