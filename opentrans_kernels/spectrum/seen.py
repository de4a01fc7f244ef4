"""Which weights an estimate saw: as the network computes, or those that lie under its masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import MaskError, OpenTransError
from ..masks import MaskSet, fold_masks, holds_masks
from ..masks.readers.families import masked_parameters
from ..masks.wrappers import without_wrappers
from .table import MASKED_SHARE, LayerAlpha

__all__ = [
    "WEIGHTS",
    "Under",
    "check_weights",
    "given_masks",
    "masked_note",
    "of_mapping",
    "zeros_note",
]

#: Of a source that holds weights beside their masks: the weights as they are, or masked.
WEIGHTS = ("dense", "masked")


@dataclass
class Under:
    """The dense weights of a network whose layers compute theirs from a weight and a mask.

    Attributes:
        weights: parameter -> the weight before masking.
        removed: parameter -> share of it that its mask removes, 0 to 1.
        note: why they could not be told; "" if they could.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    removed: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> Under:
        """What ``torch.nn.utils.prune``, parametrizations and the like keep under their masks."""
        tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
        try:
            groups = masked_parameters(tensors, type(model).__name__)
        except MaskError as error:
            return cls(note=f"weights are measured as the network computes: {error}")
        found = cls()
        for masked in (one for group in groups.values() for one in group):
            if masked.weight is not None:
                found.weights[masked.parameter] = masked.weight
                found.removed[masked.parameter] = _share(masked.mask)
        found.removed = {name: share for name, share in found.removed.items() if share}
        return found

    def weight(self, parameter: str, computed: object) -> object:
        """The dense weight of ``parameter``, or what the module computes."""
        return self.weights.get(without_wrappers(parameter), computed)


def check_weights(weights: str) -> None:
    """Raise OpenTransError unless ``weights`` is one of :data:`WEIGHTS`."""
    if weights not in WEIGHTS:
        raise OpenTransError(
            f"weights={weights!r} is not known. Use one of {', '.join(map(repr, WEIGHTS))}: those "
            "under the masks a pruned network holds, or what it computes with."
        )


def of_mapping(
    source: Mapping[str, torch.Tensor], weights: str, removed: dict[str, float] | None = None
) -> Mapping[str, torch.Tensor]:
    """A mapping of weights without its masks: applied to them, or left out.

    removed: receives parameter -> share, for the masks that were left out.

    Raises:
        MaskError: masks that are none of the weights'.
    """
    tensors = {str(k): t for k, t in source.items() if isinstance(t, torch.Tensor)}
    if not holds_masks(tensors):
        return source
    folded = fold_masks(tensors, "the mapping", apply=weights == "masked")
    if weights == "dense" and removed is not None:
        for group in masked_parameters(tensors, "the mapping").values():
            for masked in group:
                if masked.weight is not None and (share := _share(masked.mask)):
                    removed[masked.parameter] = share
    return folded | {str(k): v for k, v in source.items() if str(k) not in tensors}


def given_masks(
    source: nn.Module | Mapping[str, torch.Tensor], masks: MaskSet | None
) -> dict[str, torch.Tensor]:
    """Parameter -> the mask to measure it under.

    Raises:
        MaskError: a mask that fits none of the weights.
    """
    if masks is None:
        return {}
    if isinstance(source, nn.Module):
        matched = masks.transfer_to(source).masks
        return {(f"{name}.weight" if name else "weight"): mask for name, mask in matched.items()}
    keys = {str(key).removesuffix(".weight"): str(key) for key in source}
    lost = [name for name in masks.masks if name.removesuffix(".weight") not in keys]
    if lost:
        raise MaskError(
            f"{len(lost)} of {len(masks.masks)} masks belong to no weight of the mapping, for "
            f"instance {lost[0]!r}. Name masks as the weights."
        )
    return {keys[name.removesuffix(".weight")]: mask for name, mask in masks.masks.items()}


def _share(mask: torch.Tensor) -> float:
    return 1 - int(torch.count_nonzero(mask)) / max(1, mask.numel())


def left_out_note(removed: Mapping[str, float]) -> str:
    """What must be said if masks were left out; "" if none was."""
    if not removed:
        return ""
    return (
        f"{len(removed)} of the weights have masks of their own (which remove "
        f"{_spread(list(removed.values()))}); the dense weights under them were measured: those of "
        "the moment they were pruned. weights='masked' measures what the network computes with"
    )


def masked_note(rows: Sequence[LayerAlpha]) -> str:
    """The warning that belongs to a table of masked weights; "" if none is masked."""
    return zeros_note([(row.name, row.zeros, math.prod(row.shape)) for row in rows])


def zeros_note(layers: Sequence[tuple[str, float, int]]) -> str:
    """:func:`masked_note` of (name, share of exact zeros, elements) of every layer."""
    masked = [one for one in layers if one[1] >= MASKED_SHARE]
    if not masked:
        return ""
    share = sum(zeros * size for _, zeros, size in masked) / sum(size for _, _, size in masked)
    name, most, _ = max(masked, key=lambda one: one[1])
    return (
        f"masked weights: {len(masked)} of {len(layers)} layers hold exact zeros ({share:.1%} of "
        f"their weights, {most:.1%} in {name}). A mask moves alpha, up or down with the fit, so "
        "these alphas measure the pruning too and freeze other layers than those of the dense "
        "weights. Estimate the weights from before pruning, if there are any"
    )


def _spread(shares: Sequence[float]) -> str:
    low, high = min(shares), max(shares)
    return f"{low:.1%}" if low == high else f"{low:.1%} to {high:.1%}"
