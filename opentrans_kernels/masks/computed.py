"""Weights that are computed from other tensors on every pass, and how to make them permanent."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def make_permanent(module: nn.Module) -> str:
    """The call that turns the computed ``weight`` of ``module`` into a parameter with its values.

    Which one depends on what computes it: a parametrization, the older weight norm, or pruning.
    """
    if parametrize.is_parametrized(module, "weight"):
        return (
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight', "
            "leave_parametrized=True)"
        )
    if hasattr(module, "weight_g") and hasattr(module, "weight_v"):
        return "torch.nn.utils.remove_weight_norm(module)"
    return "torch.nn.utils.prune.remove(module, 'weight')"
