"""What calling a module does beyond its class and tensors: hooks and methods set on the instance.

A replacement computes from class and tensors alone. A module that does more is left as it is before
acceleration; one that gets a hook afterwards is called again, see ``opentrans_kernels.watch``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CALLING = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward")


def own_behaviour(module: nn.Module) -> str | None:
    """What ``module`` does beyond its class and tensors ("has hooks", ...); None for nothing."""
    if extra := added_behaviour(module):
        return extra
    own = type(module)
    if own.__call__ is not nn.Module.__call__ or own._call_impl is not nn.Module._call_impl:
        return f"is a {own.__name__} with a __call__ of its own"
    return None


def added_behaviour(module: nn.Module) -> str | None:
    """The part of :func:`own_behaviour` that can change while the module lives."""
    state = vars(module)
    # A pruning hook computes the weight, which is read instead.
    hooks = (hook for key in HOOKS for hook in (state.get(key) or {}).values())
    if any(not isinstance(hook, BasePruningMethod) for hook in hooks):
        return "has hooks"
    if set_here := next(_shadowing(module), None):
        return f"has a {set_here} of its own, set on the instance"
    return None


def _shadowing(module: nn.Module) -> Iterator[str]:
    """Methods of the class that the instance replaces, if calling the module may run them."""
    for key in vars(module):
        method = getattr(type(module), key, None)
        foreign = not hasattr(nn.Module, key) and key != "extra_repr"
        if key in _CALLING or (foreign and callable(method)):
            yield key


def first_changed(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """ "NAME has hooks" of the first module with :func:`own_behaviour`; None if there is none."""
    for name, module in modules:
        if extra := own_behaviour(module):
            return f"{name or type(module).__name__} {extra}"
    return None
