"""Pruning masks: reading them from files, matching them to a model by name, saving them.

``load_masks("seg_backbone_imp10.pth").match(model)`` is the usual start; ``print`` the result to
see what found a partner. The kinds of files in ``READERS`` are told apart by content and never
executed. ``FILE:ENTRY`` reads one of several networks in a file ("run.ckpt:teacher").
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import nn

from opentrans_kernels.errors import MaskError
from opentrans_kernels.finite import count_non_finite
from opentrans_kernels.masks.atomic import atomic_write
from opentrans_kernels.masks.computed import make_permanent
from opentrans_kernels.masks.contents import split_entry
from opentrans_kernels.masks.files import open_checkpoint
from opentrans_kernels.masks.names import (
    MaskMatch,
    conv_modules,
    masked_modules,
    match_masks,
    owner_of,
    require_one_mask,
)
from opentrans_kernels.masks.packed import (
    Provenance,
    content_hash,
    pack_bits,
    write_packed,
)
from opentrans_kernels.masks.readers import READERS, read_masks
from opentrans_kernels.masks.readers.checks import collect_masks, zeros_as_masks
from opentrans_kernels.masks.readers.state import fold_masks, holds_masks, read_state_dict
from opentrans_kernels.topology import packed_projections, pruned_linears
from opentrans_kernels.topology.linears import is_pruned, kind_of

__all__ = [
    "READERS",
    "MaskMatch",
    "MaskSet",
    "Provenance",
    "atomic_write",
    "fold_masks",
    "holds_masks",
    "load_masks",
    "make_permanent",
    "open_checkpoint",
    "read_state_dict",
    "split_entry",
]


@dataclass(frozen=True)
class MaskSet:
    """Masks by module name: bool tensors on the CPU, True where a weight is kept.

    Names are as in the file, without ``.weight_mask`` and the like; prefixes stay until the masks
    are matched to a model. All-zero and all-one masks are legal. Raises MaskError if there is no
    mask or one is not a bool tensor (:meth:`from_tensors` converts 0/1 tensors of other dtypes).
    """

    masks: Mapping[str, torch.Tensor]
    source: Provenance = field(default_factory=lambda: Provenance("memory"))

    def __post_init__(self) -> None:
        if not self.masks:
            raise MaskError("a mask set needs at least one mask. Pass name -> bool tensor.")
        for name, mask in self.masks.items():
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise MaskError(
                    f"mask {name!r} is {kind}, not a bool tensor. Use MaskSet.from_tensors, which "
                    "checks and converts 0/1 values."
                )
        # Read-only, so that the hash and the counts stay true.
        object.__setattr__(self, "masks", MappingProxyType(dict(self.masks)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Read a mask file of any kind in ``READERS``, told apart by content.

        ``path``: FILE, or FILE:ENTRY for one of several networks or mask sets in it.
        Raises CheckpointError (not a readable, safe checkpoint) or MaskError (no valid masks).
        """
        masks, source = read_masks(path)
        return cls(masks, source)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], source: Provenance | None = None
    ) -> MaskSet:
        """Masks from 0/1 tensors of any dtype. Raises MaskError on any other value."""
        masks, notes = collect_masks(tensors, "the given dict")
        return cls(masks, source or Provenance("memory", notes=notes))

    @classmethod
    def from_model_zeros(cls, model: nn.Module) -> MaskSet:
        """The exact zeros of the model's weights as masks, one per Conv2d and per pruned Linear.

        A conv without zeros gets a mask that keeps everything. A linear layer, or the packed
        projections of an attention, counts from one zero in a hundred weights. Raises MaskError if
        there is neither, or a weight is NaN or infinite.
        """
        packed = {n: p for n, p in packed_projections(model).items() if is_pruned(p.weight)}
        layers = {**conv_modules(model), **packed, **pruned_linears(model)}
        weights = {name: layer.weight for name, layer in layers.items()}
        if not weights:
            raise MaskError(
                f"{type(model).__name__} has no Conv2d module and no Linear module with zeros, so "
                "its zeros cannot be a mask. Pass the network that holds the pruned layers."
            )
        masks = zeros_as_masks(weights, type(model).__name__)
        notes = {"model": type(model).__name__}
        return cls(masks, Provenance("model zeros", notes=notes))

    @property
    def numel(self) -> int:
        """Number of weights covered."""
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def nnz(self) -> int:
        """Number of weights kept."""
        return sum(int(torch.count_nonzero(mask)) for mask in self.masks.values())

    def density(self) -> float:
        """Share of weights kept, 0 to 1."""
        return self.nnz / self.numel

    def content_hash(self) -> str:
        """SHA-256 (hex) over names, shapes and bits: equal for equal masks in any kind of file."""
        shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        return content_hash(shapes, {n: pack_bits(mask) for n, mask in self.masks.items()})

    def match(self, model: nn.Module, *, strict: bool = False) -> MaskMatch:
        """Find each mask's Conv2d or Linear in ``model`` by module name, whatever the prefix.

        With ``strict`` a mask without a conv of its name and shape raises MaskError, and so do
        layers that share one weight and are masked differently; without, the first are listed in
        the result. Raises MaskError if two parts of the model fit equally well.
        """
        match = match_masks(self.masks, model)
        if strict:
            match.require_complete()
            require_one_mask(match.masks, model)
        return match

    def transfer_to(self, model: nn.Module) -> MaskSet:
        """The same masks under the model's module names. Raises MaskError if one has no conv."""
        match = self.match(model, strict=True)
        return replace(self, masks=match.masks)

    def masked_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Model layer name -> masked copy of its weight (exact +0 where removed), if it has a mask.

        The model is not changed. Raises MaskError if a mask has no conv or a weight is not finite.
        """
        return {
            name: weight.detach().masked_fill(~mask.to(weight.device), 0)
            for name, (weight, mask) in self._paired(model).items()
        }

    def apply_(self, model: nn.Module) -> MaskMatch:
        """Set the removed weights of ``model`` to zero, in place; returns the match.

        All checks come first: if it raises MaskError, no weight was changed. A conv whose weight is
        computed from others (``torch.nn.utils.prune``, parametrizations) is refused.
        """
        match = self.match(model, strict=True)
        layers = masked_modules(model, match.masks)
        for name in match.masks:
            module, parameter = owner_of(layers[name])
            if parameter not in module._parameters:
                raise MaskError(
                    f"the weight of {kind_of(layers[name])} {name!r} is not a parameter but "
                    "computed (pruned or parametrized), so zeros written to it would not last. "
                    f"Make it permanent first: {make_permanent(module, parameter)}."
                )
        pairs = self._paired(model, match)
        with torch.no_grad():
            for weight, mask in pairs.values():
                weight.masked_fill_(~mask.to(weight.device), 0)
        return match

    def _paired(
        self, model: nn.Module, match: MaskMatch | None = None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        match = match or self.match(model, strict=True)
        layers = masked_modules(model, match.masks)
        for name in match.masks:
            if count_non_finite(layers[name].weight):
                raise MaskError(
                    f"the weight of {kind_of(layers[name])} {name!r} holds NaN or infinity; "
                    "masking would hide a broken model. Load finite weights first."
                )
        return {name: (layers[name].weight, mask) for name, mask in match.masks.items()}

    def save(
        self, path: str | os.PathLike[str], provenance: Mapping[str, str] | None = None
    ) -> None:
        """Write the bit-packed safetensors file (see ``packed``), all or nothing.

        ``provenance``: text entries to keep with the masks, such as the training run. Raises
        CheckpointError if the path cannot be written; nothing is left behind.
        """
        write_packed(path, self.masks, self.source, provenance)

    def __str__(self) -> str:
        return (
            f"{len(self.masks)} masks, {self.nnz} of {self.numel} weights kept "
            f"({self.density():.2%}), {self.source}"
        )


def load_masks(path: str | os.PathLike[str]) -> MaskSet:
    """Read a mask file of any kind; see :meth:`MaskSet.load`."""
    return MaskSet.load(path)
