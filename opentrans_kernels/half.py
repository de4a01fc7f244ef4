"""Weights in half precision, for files of half the size: stored only where nothing is lost."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .errors import UnsupportedModelError
from .finite import count_non_finite
from .plan.models import accelerated_parts, require_module
from .topology import packed_projections

__all__ = ["as_half", "round_to_half"]

LARGEST = torch.finfo(torch.float16).max


def round_to_half(model: nn.Module) -> dict[str, float]:
    """Round the weights of every Conv2d, Linear and packed projection of an attention to half
    precision, in place, kept as float32.

    **This changes the numbers**: each by at most 2**-11 of itself, and numbers below 6e-5 by at
    most 3e-8. Measure what the network is worth after it, then accelerate and store
    (``save_accelerated(..., values=torch.float16)``). Biases and norms stay as they are.

    Returns layer -> largest change of a weight.

    Raises:
        UnsupportedModelError: no module; accelerated already; or a weight that half precision
            cannot hold (beyond 65504, NaN) or that is computed from others. Nothing was changed.
    """
    require_module(model)
    if found := accelerated_parts(model):
        raise UnsupportedModelError(
            f"round_to_half: the model is accelerated ({len(found)} modules), and what was packed "
            "would keep the old numbers. Call opentrans_kernels.restore(model) first, round, and "
            "accelerate again."
        )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    layers |= packed_projections(model)
    for name, layer in layers.items():
        if is_lazy(layer.weight) or layer.weight.is_meta:
            raise UnsupportedModelError(
                f"round_to_half: {name} has no weights yet. Load them first."
            )
        if not isinstance(layer.weight, nn.Parameter):
            raise UnsupportedModelError(
                f"round_to_half: the weight of {name} is computed from others (pruned or "
                "parametrized), so rounding it would not last. Make it permanent first."
            )
        bad = count_non_finite(layer.weight)
        large = layer.weight.detach().abs() > LARGEST
        if bad or bool(large.any()):
            raise UnsupportedModelError(
                f"round_to_half: {name} has {bad} weights that are NaN or infinite and "
                f"{int(large.sum())} beyond {LARGEST:.0f}, the largest number of half precision. "
                "Keep this network in float32: leave values out."
            )
    changes = {}
    with torch.no_grad():
        for name, layer in layers.items():
            rounded = layer.weight.half().to(layer.weight.dtype)
            changes[name] = _largest_change(layer.weight, rounded)
            layer.weight.copy_(rounded)
    return changes


def as_half(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 values by layer name in half precision, every one of them the same number.

    Raises UnsupportedModelError that names the layer with the largest rounding.
    """
    halves = {name: tensor.half() for name, tensor in values.items()}
    changes = {n: _largest_change(values[n], halves[n].to(values[n].dtype)) for n in values}
    inexact = {name: change for name, change in changes.items() if change != 0}
    if inexact:
        worst = max(inexact, key=lambda name: inexact[name])
        raise UnsupportedModelError(
            f"values=torch.float16 would change the weights of {len(inexact)} layers, most of all "
            f"{worst}, by up to {inexact[worst]:.1e}: they are not numbers of half precision. "
            "Round them first, which changes the network, and measure what it is worth then "
            "(restore(model); round_to_half(model); accelerate again); or leave values out."
        )
    return halves


def _largest_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Infinity where one overflows; 0 for no values."""
    return float((before - after).abs().max()) if before.numel() else 0.0
