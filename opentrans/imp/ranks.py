"""Several processes in one run: the first one writes, and all of them must agree."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from opentrans_kernels.errors import OpenTransError

from .pruner import Pruner


def distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process writes the files of the run."""
    return not distributed() or dist.get_rank() == 0


def of_first(value: bool) -> bool:
    """``value`` as the first process has it; it waits for all of them."""
    if not distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def check_same_masks(pruner: Pruner) -> None:
    """Raise OpenTransError in every process unless all have the same masks."""
    if not distributed():
        return
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, pruner.masks.content_hash())
    if len(set(hashes)) > 1:
        raise OpenTransError(
            f"the processes disagree about the masks of round {pruner.round}, so their weights "
            "differ. Wrap the model in DistributedDataParallel before training, and give every "
            "process the same start."
        )
