"""Tensors of a file into a module: every one must be there, of its shape, finite, and none else."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from opentrans_kernels.errors import CheckpointError

__all__ = ["fill", "other_network"]


def other_network(path: str | os.PathLike[str], what: str, problem: str) -> CheckpointError:
    """The error for a file that holds something else. ``what``: the network it should hold."""
    return CheckpointError(
        f"{path} is no weights file of the {what}: it {problem}. Fetch the published one."
    )


def fill(
    model: nn.Module, found: Mapping[str, Tensor], path: str | os.PathLike[str], what: str
) -> None:
    """Copy ``found`` (names as in ``state_dict``) into the model; eval mode, no gradients.

    Counters of batches may be missing. Raises CheckpointError naming the first entry that does not
    fit; the model may then be partly filled.
    """
    wanted = model.state_dict()
    for name, target in wanted.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in found:
            raise other_network(path, what, f"has nothing for {name}")
        tensor = found[name]
        if tensor.shape != target.shape or not tensor.is_floating_point():
            raise other_network(
                path, what,
                f"has {tensor.dtype} {tuple(tensor.shape)} for {name}, not {tuple(target.shape)}",
            )  # fmt: skip
        if not torch.isfinite(tensor).all():
            raise other_network(path, what, f"has values for {name} that are not finite")
        if name.endswith("running_var") and not (tensor >= 0).all():
            raise other_network(path, what, f"has negative variances for {name}")
        target.copy_(tensor)
    if extra := sorted(set(found) - set(wanted)):
        raise other_network(path, what, f"has more, such as {extra[0]}")
    model.eval().requires_grad_(False)
