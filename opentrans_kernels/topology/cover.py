"""Classes put over those of modules, in place: a module keeps its identity, parameters and name.

Token reduction works this way. What is put over a module may do nothing for a while
(:func:`switched`), and a module is recognised by what lies under it (:func:`own_class`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from opentrans_kernels.topology.nodes import original

__all__ = ["LINK", "Cover", "covered", "give_back", "own_class", "put_over", "states", "switched"]

#: Attribute of a covered module: a tuple whose first entry is the state that all of them share. It
#: has ``paused``, and ``last``, what it knows of the calling thread's last forward.
LINK = "_opentrans_tokens"


class Cover(nn.Module):
    """Over another class; ``LINK`` of the instance holds what it needs."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, type(self).__bases__, self.__getstate__()  # type: ignore[attr-defined]


@functools.cache
def _made(over: type, under: type) -> type:
    return type(under.__name__, (over, under), {"__module__": under.__module__})


def _blank(over: type, under: type) -> Any:
    """An instance without contents, for copies and pickles."""
    made = _made(over, under)
    return made.__new__(made)


def own_class(module: nn.Module) -> type:
    """The class of ``module``, without what was put over it."""
    return type(module).__bases__[1] if isinstance(module, Cover) else type(module)


def covered(module: nn.Module) -> bool:
    """Whether something was put over the class of ``module``."""
    return LINK in vars(module)


def put_over(module: nn.Module, over: type[Cover], link: tuple[Any, ...]) -> None:
    """Let ``module`` compute what ``over`` says, with ``link`` at hand; so does the module that it
    replaces, if it is a replacement."""
    for one in {id(m): m for m in (module, original(module))}.values():
        vars(one)[LINK] = link
        one.__class__ = _made(over, type(one))


def put_over_as(module: nn.Module, other: nn.Module) -> None:
    """Put over ``module`` what lies over ``other``, if anything."""
    if covered(other):
        vars(module)[LINK] = vars(other)[LINK]
        module.__class__ = _made(type(other).__bases__[0], type(module))


def give_back(module: nn.Module) -> None:
    """Undo :func:`put_over`; nothing to do for a module that is not covered."""
    for one in (module, original(module)):
        if covered(one):
            one.__class__ = own_class(one)
            del vars(one)[LINK]


def states(model: nn.Module) -> list[Any]:
    """The states of the covered modules in ``model``, each once."""
    found = (vars(m)[LINK][0] for m in model.modules() if covered(m))
    return list({id(state): state for state in found}.values())


@contextlib.contextmanager
def switched(model: nn.Module, *, paused: bool) -> Iterator[bool]:
    """Let covered modules compute what they are under their cover, or what it says; afterwards they
    and what they know of the last forward are as before. Gives whether there are any."""
    found = states(model)
    before = [(state.paused, state.last) for state in found]
    for state in found:
        state.paused = paused
    try:
        yield bool(found)
    finally:
        for state, (was, last) in zip(found, before, strict=True):
            state.paused, state.last = was, last
