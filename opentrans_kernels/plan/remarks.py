"""What a plan says about weights that are no part of it: zeros elsewhere, and unreadable ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..masks.files import shorten
from ..topology.find import walk_modules
from .layers import Layer

__all__ = ["other_zeros", "unread_weights"]


def other_zeros(
    model: nn.Module, layers: Iterable[Layer], left_alone: Mapping[str, str], least: float
) -> str | None:
    """Where zeros are outside of ``layers``: "96 of 128 weights of 1 ConvTranspose2d layer".

    left_alone: linear layer -> why it is no part of the plan. least: share of a weight that must be
    zero. None if there are none.
    """
    known = {(id(layer.module), layer.parameter) for layer in layers}
    found: dict[str, tuple[int, int, int]] = {}
    why: dict[str, list[str]] = {}
    for name, module in walk_modules(model):
        for key, weight in _weights(module):
            if (id(module), key) in known or weight.dim() < 2 or _unreadable(weight):
                continue
            zeros = weight.numel() - int(torch.count_nonzero(weight.detach()))
            if zeros <= least * weight.numel():
                continue
            kind = type(module).__name__
            count, all_zeros, all_weights = found.get(kind, (0, 0, 0))
            found[kind] = (count + 1, all_zeros + zeros, all_weights + weight.numel())
            layer = f"{name}.in_proj" if key == "in_proj_weight" else name
            if layer in left_alone:
                why.setdefault(left_alone[layer], []).append(layer)
    if not found:
        return None
    where = "; ".join(
        f"{zeros} of {weights} weights of {count} {kind} layer{'s' if count > 1 else ''}"
        for kind, (count, zeros, weights) in found.items()
    )
    reasons = "; ".join(f"{shorten(names, 3)} {reason}" for reason, names in why.items())
    return f"{where} ({reasons})" if reasons else where


def unread_weights(model: nn.Module) -> str | None:
    """Which layers may hold zeros that cannot be seen, because their weights are quantised."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, module in walk_modules(model):
        kind = type(module).__name__
        packed = getattr(type(module), "weight", None)
        if callable(packed) and not isinstance(packed, property | torch.Tensor):
            found.setdefault((kind, "packed integers"), []).append(name)
        for _, weight in _weights(module):
            if weight.dim() > 1 and (what := _unreadable(weight)):
                found.setdefault((kind, what), []).append(name)
    if not found:
        return None
    told = "; ".join(
        f"{len(names)} {kind} ({what}; {shorten(names, 3)})"
        for (kind, what), names in found.items()
    )
    return (
        "the weights of these layers are no floating-point numbers, so their zeros cannot be used: "
        f"{told}. Accelerate the model as it was before they were quantised"
    )


def _weights(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """(name, weight) of a module's own weights, those that are computed included."""
    for key, weight in module._parameters.items():
        if weight is not None and key.endswith("weight"):
            yield key, weight
    if parametrize.is_parametrized(module, "weight") or hasattr(module, "weight_v"):
        yield "weight", module.weight  # type: ignore[misc]


def _unreadable(weight: torch.Tensor) -> str | None:
    """What a weight is made of, if its zeros cannot be counted; None if they can."""
    if weight.is_meta:
        return "without values"
    if type(weight) not in (torch.Tensor, nn.Parameter):
        return type(weight).__name__
    if weight.is_quantized or not weight.is_floating_point():
        return str(weight.dtype).removeprefix("torch.")
    return None
