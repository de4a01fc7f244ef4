"""Weights that are computed from other tensors on every pass, and how to make them permanent."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def make_permanent(module: nn.Module, name: str = "weight") -> str:
    """The call that turns the computed ``weight`` of ``module`` into a parameter with its values.

    Which one depends on what computes it: a parametrization, the older weight norm, or pruning.
    """
    if parametrize.is_parametrized(module, name):
        return (
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}, "
            "leave_parametrized=True)"
        )
    if hasattr(module, f"{name}_g") and hasattr(module, f"{name}_v"):
        more = "" if name == "weight" else f", {name!r}"
        return f"torch.nn.utils.remove_weight_norm(module{more})"
    return f"torch.nn.utils.prune.remove(module, {name!r})"
