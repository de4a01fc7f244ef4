"""Batch norms of a tower that is trained in part: which use running statistics, which train."""

from __future__ import annotations

from torch import nn

from ..freeze.pairing import is_batch_norm
from .config_nodes import ConfigError
from .config_options import NORM_POLICIES

__all__ = ["hold_norms", "norms_in_training"]


def hold_norms(tower: nn.Module, policy: str) -> list[nn.Module]:
    """Put the batch norms into eval mode, so that their statistics stay; returns them.

    policy: "frozen" or "affine": all; "train": none. Scale and shift are the freeze plan's
    business. ``model.train()`` undoes it: call it again after that, as the hooks do every step.

    Raises ConfigError for another policy.
    """
    if policy not in NORM_POLICIES:
        raise ConfigError(f"norms={policy!r} must be one of {', '.join(NORM_POLICIES)}.")
    if policy == "train":
        return []
    held = [module for module in tower.modules() if is_batch_norm(module)]
    for norm in held:
        norm.eval()
    return held


def norms_in_training(tower: nn.Module) -> int:
    """How many batch norms use and update batch statistics."""
    return sum(module.training for module in tower.modules() if is_batch_norm(module))
