"""Changing what trains in a model that DistributedDataParallel already wraps."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from opentrans_kernels.errors import PlanError

from ..towers import unwrap

__all__ = ["unwrapped", "wrapper_options"]

log = logging.getLogger(__name__)

MIB = 1 << 20
_OLD_NAME = "broadcast_buffers"
# Constructor arguments that are not kept under their own name, or say nothing about a wrapper that
# exists; ``wrapper_options`` handles or refuses each.
_OTHER = (
    "module", "process_group", "device_mesh", "bucket_cap_mb", "bucket_cap_mb_list",
    "broadcast_buffers", "forward_sync_buffers", "init_sync", "check_reduction",
    "delay_all_reduce_named_params", "param_to_hook_all_reduce", "mixed_precision",
)  # fmt: skip


@contextlib.contextmanager
def unwrapped(trainer: Any) -> Iterator[nn.Module]:
    """Take the wrapper off the trainer's model, yield the model, wrap it anew at the end.

    The reducer of a wrapper waits for the gradients of every parameter that trained when it was
    built. The new one has the same options and communication hooks. Hooks of the trainer that hold
    the old wrapper get the new one.

    Raises PlanError, with nothing changed, for a wrapper that cannot be built again as it was.
    """
    model = unwrap(trainer.model)
    if not isinstance(trainer.model, DistributedDataParallel):
        yield model
        return
    # DefaultTrainer reads its model from the trainer it holds inside.
    holder = trainer._trainer if hasattr(trainer, "_trainer") else trainer
    options, hooks = wrapper_options(holder.model), list(holder.model._comm_hooks)
    training = holder.model.training
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
        with warnings.catch_warnings():
            # The old name is the only one that leaves the buffers of every rank as they are.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            wrapper = DistributedDataParallel(model, **options)
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)
        wrapper.training = training
        holder.model = wrapper
        for attributes, key in places:
            attributes[key] = wrapper


def wrapper_options(wrapper: DistributedDataParallel) -> dict[str, Any]:
    """Arguments that build ``wrapper`` again around its module.

    An argument of a later torch that the wrapper does not keep under its name is left at its
    default, with a line in the log.

    Raises PlanError for what cannot be read back or carried over.
    """
    for problem, is_there in _LOST.items():
        if is_there(wrapper):
            raise PlanError(
                f"freezing wraps the model in DistributedDataParallel anew, and {problem} of the "
                "present wrapper cannot be carried over. Freeze before wrapping "
                "(opentrans.d2.attach(model, freeze=...)), or leave that out."
            )
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {}
    for name in known:
        if name in ("self", *_OTHER):
            continue
        if hasattr(wrapper, name):
            options[name] = getattr(wrapper, name)
        else:
            log.warning("the new DistributedDataParallel has the default of %s", name)
    mesh = getattr(wrapper, "device_mesh", None)
    if mesh is not None:
        options["device_mesh"] = mesh
    else:
        options["process_group"] = wrapper.process_group
    kept = "forward_sync_buffers" if hasattr(wrapper, "forward_sync_buffers") else _OLD_NAME
    options[_OLD_NAME if _OLD_NAME in known else kept] = getattr(wrapper, kept)
    return options | _buckets(wrapper)


def _buckets(wrapper: Any) -> dict[str, Any]:
    each = list(getattr(wrapper, "bucket_bytes_cap_list", ()))
    if each:
        return {"bucket_cap_mb_list": [size / MIB for size in each]}
    if wrapper.bucket_bytes_cap_default:  # also makes the first bucket smaller
        return {}
    return {"bucket_cap_mb": wrapper.bucket_bytes_cap / MIB}


def _builtin_hook(wrapper: Any) -> bool:
    """Torch keeps its own communication hooks in C++, by name only."""
    named = wrapper._get_ddp_logging_data().get("comm_hook")
    return bool(named) and not wrapper._comm_hooks


# What -> whether a wrapper has it.
_LOST: Mapping[str, Callable[[Any], bool]] = {
    "the subclass": lambda w: type(w) is not DistributedDataParallel,
    # Its hooks on every module, and its copies of every parameter, belong to the old wrapper.
    "mixed_precision": lambda w: getattr(w, "mixed_precision", None) is not None,
    "delay_all_reduce_named_params": lambda w: bool(getattr(w, "_delay_all_reduce_params", ())),
    "the hook of _register_buffer_comm_hook": lambda w: hasattr(w, "buffer_hook"),
    "the hook of _register_builtin_comm_hook": _builtin_hook,
    "a forward or backward hook": lambda w: any(
        (w._forward_hooks, w._forward_pre_hooks, w._backward_hooks, w._backward_pre_hooks)
    ),
}
