"""Mask files of every kind -> {conv module name: bool tensor}.

``READERS`` lists the kinds in the order in which they are tried. A reader answers None for a file
that is not of its kind. Masks that stand beside weights are a family (``families.py``) and a row
here; a new kind also needs a test with a small file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks import packed
from opentrans_kernels.masks.contents import Section, open_source
from opentrans_kernels.masks.files import file_sha256, shorten
from opentrans_kernels.masks.readers.checks import (
    Masks,
    Notes,
    Reading,
    collect_masks,
    module_name,
    zeros_as_masks,
)
from opentrans_kernels.masks.readers.families import masked_parameters
from opentrans_kernels.masks.readers.leftover import refuse_absent_masks, unread_masks
from opentrans_kernels.masks.readers.material import (
    Material,
    conv_weights,
    pruned_matrices,
    weight_masks,
)

OPENTRANS_SECTIONS = ("backbone", "first_conv", "sem_seg_head")


@dataclass(frozen=True)
class Reader:
    """One kind of mask file. ``read`` answers None if the file is of another kind."""

    summary: str
    read: Callable[[Material], Reading | None]


def read_masks(path: str | os.PathLike[str]) -> tuple[Masks, packed.Provenance]:
    """Masks of a file of any kind, with their provenance. ``path``: FILE, or FILE:ENTRY.

    Raises CheckpointError if the file cannot be read, MaskError if it can but holds no valid masks,
    or masks that cannot be told apart or read.
    """
    material = Material(open_source(path))
    with ThreadPoolExecutor(1) as pool:  # hashing a large file takes as long as reading it
        digest = pool.submit(file_sha256, material.path)
        for kind, reader in READERS.items():
            reading = reader.read(material)
            if reading is not None and reading.masks:
                return reading.masks, packed.Provenance(
                    kind, material.path, digest.result(), reading.notes, reading.synthetic
                )
    for section in material.source.sections:
        refuse_absent_masks(section.tensors, set(), section.origin)
    kinds = "; ".join(f"{kind} ({reader.summary})" for kind, reader in READERS.items())
    raise MaskError(
        f"{os.fspath(path)} is a readable checkpoint but holds no masks, no convolution "
        f"weights and no other weights with zeros. Known kinds: {kinds}."
    )


def _read_packed(material: Material) -> Reading | None:
    file = material.source.file
    if file.container != "safetensors" or not packed.is_packed(file.metadata):
        return None
    masks, notes, synthetic = packed.unpack(file.content, file.metadata, file.path)
    return Reading(masks, notes, synthetic=synthetic)


def _read_accelerated(material: Material) -> Reading | None:
    file = material.source.file
    return Reading(dict(file.masks)) if file.masks else None


def _read_opentrans(material: Material) -> Reading | None:
    content = material.source.file.content
    if not isinstance(content, Mapping) or material.source.entry:
        return None
    sections = [s for s in OPENTRANS_SECTIONS if isinstance(content.get(s), Mapping)]
    pruned = (str(k).rpartition(".")[2] == "weight_mask" for s in sections for k in content[s])
    if len(sections) < 2 or not any(pruned):
        return None
    masks: Masks = {}
    notes: Notes = {}
    for name in sections:
        tensors = {str(k): v for k, v in content[name].items() if isinstance(v, torch.Tensor)}
        section = Section(material.path, name, tensors)
        found, more = weight_masks(masked_parameters(tensors, section.origin), section.origin)
        # The backbone's names stand alone; those of other sections must not collide with them.
        prefix = "" if name == "backbone" else f"{name}."
        masks |= {prefix + module: mask for module, mask in found.items()}
        notes |= {f"{name}: {key}": value for key, value in more.items()}
    return Reading(masks, notes)


def _family(family: str) -> Callable[[Material], Reading | None]:
    """Reads masks beside weights if ``family`` is the first of those that wrote them."""

    def read(material: Material) -> Reading | None:
        if not any(family in groups for _, groups in material.recorded):
            return None
        read = [(s, *weight_masks(groups, s.origin)) for s, groups in material.recorded]
        section = material.one([(s, masks) for s, masks, _ in read], any_network=True)
        groups = next(groups for s, groups in material.recorded if s is section)
        if next(iter(groups)) != family:
            return None
        masks, notes = next((masks, notes) for s, masks, notes in read if s is section)
        if len(groups) > 1:
            notes["kinds of masks"] = ", ".join(groups)
        known = [m for group in groups.values() for m in group]
        weights = {module_name(m.parameter): m.weight for m in known if m.weight is not None}
        notes |= _kept_of_all(masks, {**conv_weights(section.tensors), **weights})
        used = frozenset(entry for m in known for entry in m.entries)
        return _checked(material, section, Reading(masks, notes, used))

    return read


def _kept_of_all(masks: Masks, weights: Mapping[str, torch.Tensor]) -> Notes:
    """How much the file keeps of all its convolutions, if some are without a mask."""
    weights = {name: w for name, w in weights.items() if w.ndim == 4}
    rest = {name: w for name, w in weights.items() if name not in masks}
    if not rest:
        return {}
    zeros = sum(w.numel() - int(torch.count_nonzero(w)) for w in rest.values())
    kept = sum(int((masks[n] if n in masks else w).count_nonzero()) for n, w in weights.items())
    numel = sum(w.numel() for w in weights.values())
    return {
        "convolutions without a mask": f"{shorten(rest, 4)}, {zeros} zeros in their weights",
        "kept of all convolutions in the file": f"{kept} of {numel} ({kept / numel:.2%})",
    }


def _read_plain(material: Material) -> Reading | None:
    if not material.mask_sections:
        return None
    read = [(s, *collect_masks(s.tensors, s.origin)) for s in material.mask_sections]
    section = material.one([(s, masks) for s, masks, _ in read], any_network=True)
    masks, notes = next((masks, notes) for s, masks, notes in read if s is section)
    return _checked(material, section, Reading(masks, notes, frozenset(section.tensors)))


def _read_dense(material: Material) -> Reading | None:
    weights = [
        (s, {**conv_weights(s.tensors), **pruned_matrices(s.tensors)})
        for s in material.source.sections
    ]
    read = [(s, zeros_as_masks(found, s.origin)) for s, found in weights if found]
    if not read:
        return None
    section = material.one(read, any_network=False)
    masks = next(masks for s, masks in read if s is section)
    removed = sum(int((~mask).sum()) for mask in masks.values())
    notes = {"zeros of the weights": str(removed) if removed else "none: every weight is kept"}
    return _checked(material, section, Reading(masks, notes))


def _checked(material: Material, section: Section, reading: Reading) -> Reading:
    """The reading with its notes, after a look at what else in the file may be a mask."""
    weights = {f"{name}.weight" if name else "weight" for name in reading.masks}
    for other in material.source.sections:
        refuse_absent_masks(other.tensors, weights, other.origin)
    unmasked = {
        name: w
        for name, w in conv_weights(section.tensors).items()
        if name not in reading.masks or reading.masks[name].all()
    }
    beside = {
        f"{s.entry}.{key}" if s.entry else key: tensor
        for s in material.source.sections
        if s is not section
        for key, tensor in s.tensors.items()
        if not _read_elsewhere(material, s, key)
    }
    unread = unread_masks(section, reading.used, unmasked, beside)
    notes = material.source.notes(section) | reading.notes
    if unread:
        notes["look like masks, not used"] = shorten(unread)
    return Reading(reading.masks, notes, reading.used, reading.synthetic)


def _read_elsewhere(material: Material, section: Section, key: str) -> bool:
    """Whether another section's entry was understood: its masks are equal, or were refused."""
    groups = next((groups for s, groups in material.recorded if s is section), {})
    return any(key in m.entries for group in groups.values() for m in group)


READERS: dict[str, Reader] = {
    "packed": Reader("bit-packed safetensors of this package", _read_packed),
    "accelerated": Reader("sparse checkpoint of save_accelerated", _read_accelerated),
    "opentrans": Reader(
        "OpenTrans seg_backbone_imp*.pth: sections backbone, first_conv, sem_seg_head",
        _read_opentrans,
    ),
    "prune": Reader("torch.nn.utils.prune, NNI: weight_orig, weight_mask", _family("prune")),
    "parametrize": Reader(
        "torch.nn.utils.parametrize: parametrizations.weight.0.mask", _family("parametrize")
    ),
    "nncf": Reader("NNCF: binary_mask in __nncf_hooks", _family("nncf")),
    "compressed-tensors": Reader(
        "compressed-tensors: bitmask and compressed", _family("compressed-tensors")
    ),
    "buffer": Reader("a buffer named mask beside a weight of its shape", _family("buffer")),
    "plain": Reader("dict of name -> 0/1 tensor", _read_plain),
    "dense": Reader("dense checkpoint whose zeros are the mask", _read_dense),
}
