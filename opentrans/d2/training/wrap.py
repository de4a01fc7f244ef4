"""Changing what trains in a model that DistributedDataParallel already wraps."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..towers import unwrap

__all__ = ["unwrapped"]


@contextlib.contextmanager
def unwrapped(trainer: Any) -> Iterator[nn.Module]:
    """Take the wrapper off the trainer's model, yield the model, wrap it anew at the end.

    The reducer of a wrapper waits for the gradients of every parameter that trained when it was
    built. The new one has the same options and communication hooks. Hooks of the trainer that hold
    the old wrapper get the new one.
    """
    model = unwrap(trainer.model)
    if not isinstance(trainer.model, DistributedDataParallel):
        yield model
        return
    # DefaultTrainer reads its model from the trainer it holds inside.
    holder = trainer._trainer if hasattr(trainer, "_trainer") else trainer
    options, hooks = _options(holder.model), list(holder.model._comm_hooks)
    places = [
        (vars(hook), key)
        for hook in getattr(trainer, "_hooks", ())
        for key, value in vars(hook).items()
        if value is holder.model
    ]
    for attributes, key in places:
        attributes[key] = model
    holder.model = model
    gc.collect()  # the wrapper and its reducer hold each other
    try:
        yield model
    finally:
        wrapper = DistributedDataParallel(model, **options)
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)
        holder.model = wrapper
        for attributes, key in places:
            attributes[key] = wrapper


def _options(wrapper: DistributedDataParallel) -> dict[str, Any]:
    names = (
        "device_ids", "output_device", "dim", "broadcast_buffers", "process_group",
        "find_unused_parameters", "gradient_as_bucket_view", "static_graph",
    )  # fmt: skip
    return {name: getattr(wrapper, name) for name in names if hasattr(wrapper, name)}
