"""One opened file as the readers see it; each question about it is answered once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks.contents import (
    Section,
    Source,
    ambiguous,
    equal_tensors,
    preferred,
    same_network,
)
from opentrans_kernels.masks.readers.checks import (
    Masked,
    Masks,
    Notes,
    collect_masks,
    countable,
    is_weight,
    module_name,
    to_mask,
)
from opentrans_kernels.masks.readers.families import masked_parameters
from opentrans_kernels.topology.linears import is_pruned


class Material:
    """A file's sections, with what stands in each."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def path(self) -> str:
        """The file, for messages."""
        return self.source.file.path

    @cached_property
    def recorded(self) -> list[tuple[Section, dict[str, list[Masked]]]]:
        """Sections whose masks stand beside the weights, with the families that wrote them."""
        found = ((s, masked_parameters(s.tensors, s.origin)) for s in self.source.sections)
        return [(section, groups) for section, groups in found if groups]

    @cached_property
    def mask_sections(self) -> list[Section]:
        """Sections that are masks and nothing else.

        Beside weights such a section has to say that it is one: by a name, or by names and shapes
        of those weights. A table of anchors holds zeros and ones too.
        """
        recorded = [section for section, _ in self.recorded]
        others = [s for s in self.source.sections if s not in recorded]
        plain = [s for s in others if is_plain(s.tensors)]
        if len(plain) > 1:  # a table of numbers beside masks is not meant as one of them
            plain = [s for s in plain if _mostly_ones(_largest(s.tensors))] or plain
        weights = [s for s in others if conv_weights(s.tensors) and s not in plain]
        shapes = {(name, w.shape) for s in weights for name, w in conv_weights(s.tensors).items()}
        shapes |= {
            (module_name(m.parameter), m.mask.shape)
            for _, groups in self.recorded
            for group in groups.values()
            for m in group
        }
        return [
            s
            for s in plain
            if not (weights or recorded)
            or any("mask" in name.lower() for name in (s.entry, *s.tensors))
            or any((module_name(k), t.shape) in shapes for k, t in s.tensors.items())
        ]

    @cached_property
    def weight_sections(self) -> list[Section]:
        """The sections that are not masks alone."""
        if len(self.source.sections) == 1:  # masks or not, there is no other
            return list(self.source.sections)
        return [s for s in self.source.sections if s not in self.mask_sections]

    def one(self, found: Sequence[tuple[Section, Masks]], *, any_network: bool) -> Section:
        """The section to read. Raises MaskError if another gives other masks.

        Of another network that matters only ``any_network``: where masks were meant as such, none
        is passed over.
        """
        chosen = preferred(self.source, [section for section, _ in found])
        masks = next(masks for section, masks in found if section is chosen)
        differ = [
            section
            for section, other in found
            if section is not chosen
            and (any_network or same_network(section.tensors, chosen.tensors))
            and not equal_tensors(other, masks)
        ]
        if differ:
            raise MaskError(ambiguous(self.source, [chosen, *differ], "masks"))
        return chosen


def weight_masks(groups: Mapping[str, list[Masked]], origin: str) -> tuple[Masks, Notes]:
    """Checked masks by module name, of weights only."""
    chosen: dict[str, torch.Tensor] = {}
    keys: dict[str, str] = {}
    others = []
    for masked in (m for group in groups.values() for m in group):
        if is_weight(masked.parameter):
            chosen[masked.parameter] = to_mask(masked.key, masked.mask, origin)
            keys[masked.parameter] = masked.key
        else:
            others.append(masked.key)
    masks, notes = collect_masks(chosen, origin)
    if others:
        notes["masks of other parameters, not used"] = ", ".join(others[:8])
    return masks, notes


def is_plain(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Masks rather than weights: more ones than values other than 0 and 1.

    Judged on the largest rank present, so a few bad values are an error of a mask file and not a
    reason to take it for weights. A trained weight is practically never exactly 1.
    """
    judged = _largest(tensors)
    plain = all(t.layout == torch.strided and not t.is_quantized for t in judged)
    if not judged or judged[0].ndim < 2 or not plain:
        return False
    if not any(t.is_floating_point() or t.is_complex() for t in judged):
        return True
    if not any(bool(t.any()) for t in judged):  # all zero: only the names can tell
        return not any(key.endswith("weight") for key in tensors)
    return _mostly_ones(judged)


def _largest(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of the largest rank present."""
    rank = max((t.ndim for t in tensors.values()), default=0)
    return [countable(t) for t in tensors.values() if t.ndim == rank]


def _mostly_ones(judged: Sequence[torch.Tensor]) -> bool:
    """More ones than values other than 0 and 1."""
    nonzero = sum(int(torch.count_nonzero(t)) for t in judged)
    ones = sum(int(torch.count_nonzero(t.detach() == 1)) for t in judged)
    return ones > nonzero - ones


def pruned_matrices(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Module name -> weight of two dimensions of which at least a hundredth is zero."""
    found = {
        module_name(key): countable(t)
        for key, t in tensors.items()
        if is_weight(key) and t.ndim == 2 and t.is_floating_point()
    }
    return {name: t for name, t in found.items() if is_pruned(t)}


def conv_weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Module name -> weight of four dimensions."""
    return {
        module_name(key): countable(t)
        for key, t in tensors.items()
        if key.rpartition(".")[2] == "weight" and t.ndim == 4 and t.is_floating_point()
    }
