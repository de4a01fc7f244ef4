"""Which weights of a parameter are alive: packed bits, an index, and moves between the two forms.

The *dense* form of a tensor has the parameter's shape, the *compact* form [count] holds the values
at live positions, in the order they lie in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks import MaskSet, load_masks
from opentrans_kernels.masks.names import conv_modules
from opentrans_kernels.masks.packed import content_hash, pack_bits

__all__ = ["LiveWeights", "Masks", "apply_masks", "masks_digest", "regrown"]

Masks = MaskSet | Mapping[str, torch.Tensor] | str | os.PathLike[str]


class LiveWeights:
    """The live positions of one masked parameter.

    name: of the parameter's module. parameter: dense, of any dense memory format. mask: bool, of
    the parameter's shape, True where alive. ``bits`` (one bit per weight) is always kept; the
    index (4 bytes per live weight) only between :meth:`build_index` and :meth:`drop_index`.
    """

    def __init__(self, name: str, parameter: nn.Parameter, mask: torch.Tensor) -> None:
        self.name = name
        self.parameter = parameter
        self.bits = pack_bits(mask)
        self.count = int(torch.count_nonzero(mask))
        self.index: torch.Tensor | None = None
        self._order = _order(parameter)
        if not _is_dense(parameter):
            raise MaskError(
                f"{name}: its weight of shape {tuple(parameter.shape)} has strides "
                f"{parameter.stride()}, it shares or skips memory. Replace it by a copy: "
                "module.weight = nn.Parameter(module.weight.detach().clone())."
            )

    def mask(self) -> torch.Tensor:
        """Bool tensor of the parameter's shape, on the CPU."""
        count = self.parameter.numel()
        flat = torch.from_numpy(np.unpackbits(self.bits, count=count).view(np.bool_))
        return flat.view(self.parameter.shape)

    def build_index(self) -> None:
        """Positions of live weights in memory order: int32 [count] on the parameter's device."""
        if self.index is None:
            ordered = torch.empty_like(self.parameter, dtype=torch.bool, device="cpu")
            ordered.copy_(self.mask())
            positions = torch.nonzero(_flat(ordered)).flatten()
            small = self.parameter.numel() < 2**31
            kind = torch.int32 if small else torch.int64
            self.index = positions.to(self.parameter.device, kind)

    def drop_index(self) -> None:
        """Free the index; the bits stay."""
        self.index = None

    def gather(self, dense: torch.Tensor) -> torch.Tensor:
        """Dense -> compact: a new tensor [count]."""
        return self._flat(dense).index_select(0, self._positions())

    def scatter_(self, dense: torch.Tensor, values: torch.Tensor) -> None:
        """Write compact ``values`` into ``dense`` (laid out as the parameter), in place."""
        self._flat(dense, must_view=True).scatter_(0, self._positions().long(), values)

    def to_dense(self, values: torch.Tensor) -> torch.Tensor:
        """Compact -> dense in the parameter's layout, +0 at dead positions."""
        dense = torch.zeros_like(self.parameter, dtype=values.dtype, requires_grad=False)
        self.scatter_(dense, values)
        return dense

    def masked(self, dense: torch.Tensor) -> torch.Tensor:
        """A copy of ``dense`` with +0 at dead positions, whatever was there (NaN too)."""
        return self.to_dense(self.gather(dense))

    def dead_nonzero(self, dense: torch.Tensor) -> int:
        """Number of dead positions where ``dense`` is not zero (NaN counts)."""
        if self.index is not None:
            return int(torch.count_nonzero(dense)) - int(torch.count_nonzero(self.gather(dense)))
        dead = ~self.mask().to(dense.device)
        return int(torch.count_nonzero(dense.detach()[dead]))

    def check_place(self) -> None:
        """Raise MaskError if the parameter was moved or laid out anew since the index was built."""
        if self.index is not None and self.index.device != self.parameter.device:
            raise MaskError(
                f"{self.name}: its weight moved from {self.index.device} to "
                f"{self.parameter.device}. Move the model first, then make the optimizer, then "
                "load its state."
            )
        if _order(self.parameter) != self._order:
            raise MaskError(
                f"{self.name}: its memory format changed (strides {self.parameter.stride()}). Call "
                "model.to(memory_format=...) first, then make the optimizer, then load its state."
            )

    @property
    def index_bytes(self) -> int:
        return 0 if self.index is None else self.index.numel() * self.index.element_size()

    def _positions(self) -> torch.Tensor:
        if self.index is None:
            self.build_index()
        assert self.index is not None
        return self.index

    def _flat(self, dense: torch.Tensor, must_view: bool = False) -> torch.Tensor:
        dense = dense.detach()
        if dense.shape != self.parameter.shape:
            raise MaskError(
                f"{self.name}: a tensor of shape {tuple(dense.shape)} for a weight of shape "
                f"{tuple(self.parameter.shape)}. Use a checkpoint of the same network."
            )
        if _order(dense) == self._order and _is_dense(dense):
            return _flat(dense)
        if must_view:
            raise MaskError(
                f"{self.name}: a tensor with strides {dense.stride()} where the weight has "
                f"{self.parameter.stride()}. Change the memory format before the optimizer is made."
            )
        copy = torch.empty_like(self.parameter, dtype=dense.dtype, device=dense.device)
        return _flat(copy.detach().copy_(dense))


def _order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that matter; those of size 1 may hold anything."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(stride for size, stride in pairs if size != 1)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether every memory cell of the tensor's range belongs to exactly one element."""
    expected = 1
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(pair for pair in pairs if pair[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def as_mask_set(masks: Masks) -> MaskSet:
    """A MaskSet from one of its forms: itself, name -> 0/1 tensors, or a mask file."""
    if isinstance(masks, MaskSet):
        return masks
    return MaskSet.from_tensors(masks) if isinstance(masks, Mapping) else load_masks(masks)


def apply_masks(model: nn.Module, masks: Masks) -> dict[str, LiveWeights]:
    """Zero the dead weights and their gradients, once; conv name -> its live positions.

    masks: a MaskSet, name -> 0/1 tensors, or a mask file, matched to ``model`` by module name.
    Raises MaskError if one has no conv, or a weight is not finite or computed from others; nothing
    is changed then.
    """
    masks = as_mask_set(masks)
    match = masks.apply_(model)
    convs = conv_modules(model)
    live = {}
    for name, mask in match.masks.items():
        weight = convs[name].weight
        live[name] = LiveWeights(name, weight, mask)
        if weight.grad is not None:
            weight.grad.masked_fill_(~mask.to(weight.device), 0)
    return live


def masks_digest(live: Mapping[str, LiveWeights]) -> str:
    """SHA-256 (hex) of the masks under the model's names; a wrapper's ``module.`` is left out."""
    named = {name.removeprefix("module."): weights for name, weights in live.items()}
    shapes = {name: tuple(w.parameter.shape) for name, w in named.items()}
    return content_hash(shapes, {name: w.bits for name, w in named.items()})


def regrown(live: Mapping[str, LiveWeights]) -> dict[str, int]:
    """Conv name -> number of dead weights that are not zero any more; empty if all is well."""
    counts = {name: w.dead_nonzero(w.parameter) for name, w in live.items()}
    return {name: count for name, count in counts.items() if count}


def check_regrowth(live: Mapping[str, LiveWeights]) -> None:
    """Raise MaskError if a dead weight is not zero."""
    found = regrown(live)
    if found:
        worst = max(found, key=lambda name: found[name])
        raise MaskError(
            f"{sum(found.values())} pruned weights in {len(found)} layers are not zero any more "
            f"(most in {worst}: {found[worst]}), so this is not the pruned network. Something "
            "other than the optimizer wrote to them: a load_state_dict of unpruned weights, an "
            "average of weights, another optimizer. Call masks.apply_(model) after such a write."
        )
