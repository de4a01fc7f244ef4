"""What is to be frozen: a plan or a list of names, resolved to convolutions and parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from opentrans_kernels.errors import PlanError
from opentrans_kernels.topology import Trunk

from ..freeze.rules import suggest

if TYPE_CHECKING:
    from ..freeze import FreezePlan

__all__ = ["freeze_affines", "named_parameters_of", "policy_of"]


def named_parameters_of(
    model: nn.Module, trunk: Trunk, frozen: FreezePlan | Iterable[str]
) -> list[nn.Parameter]:
    """Parameters that ``frozen`` freezes, without the batch norms that belong to them.

    A name is a module path; a container stands for everything in it. Nothing is changed.

    Raises:
        PlanError: a name the model does not have, or a plan for another model.
    """
    if hasattr(frozen, "check") and hasattr(frozen, "parameters"):
        frozen.check(model)
        own = dict(model.named_parameters(remove_duplicate=False))
        return [own[name] for name in frozen.parameters]
    if isinstance(frozen, str):
        raise PlanError(
            f"frozen must be a FreezePlan or a list of module names, got the text {frozen!r}. "
            f"Pass [{frozen!r}]."
        )
    names = list(frozen)
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules or not name]
    if unknown:
        known = [node.name for node in trunk.convs()]
        raise PlanError(
            f"{len(unknown)} of {len(names)} names are no modules of {type(model).__name__}: "
            f"{', '.join(map(repr, unknown[:5]))}.{suggest(str(unknown[0]), known)} "
            "Names are those of model.named_modules()."
        )
    empty = [name for name in names if not list(modules[name].parameters())]
    if empty:
        raise PlanError(
            f"{', '.join(empty[:5])} has no parameters, so there is nothing to freeze. Name the "
            "convolution before it."
        )
    return [p for name in names for p in modules[name].parameters()]


def freeze_affines(trunk: Trunk, policy: str, frozen: set[int]) -> list[nn.Parameter]:
    """Affine parameters of batch norms that the policy freezes.

    policy: "frozen": all of the trunk; otherwise those behind convolutions whose weight is in
        ``frozen`` (ids of parameters) or does not require grad.
    """
    found = []
    for node in trunk.convs():
        if node.bn is None:
            continue
        still = [p for p in node.conv.parameters() if p.requires_grad and id(p) not in frozen]
        if policy == "frozen" or not still:
            found += list(node.bn.parameters())
    return found


def policy_of(bn: str, policies: Iterable[str]) -> str:
    """``bn``, checked."""
    if bn not in policies:
        raise PlanError(
            f"bn={bn!r} is not a policy of batch norm. Use 'frozen' (running statistics, scale and "
            "shift fixed), 'affine' (running statistics, scale and shift train with their "
            "convolution) or 'train' (as the module's own mode says)."
        )
    return bn


def has_running_statistics(bn: nn.Module | None) -> bool:
    """Whether an eval-mode norm can be a fixed scale and shift."""
    return bn is None or isinstance(getattr(bn, "running_mean", None), torch.Tensor)
