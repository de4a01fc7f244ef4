"""Modules that a replacement stands for without calling them: noticed when they come to matter.

A block that runs as one op does not call its convolutions, so a hook that somebody gives one of
them after acceleration would be dropped. The replacement asks its :class:`Watch` at every call, and
where something was added, the masked dense modules run instead, hooks included.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .errors import UnsupportedModelError
from .masks.packed import pack_bits
from .topology.behaviour import added_behaviour

__all__ = ["Untouched", "Watch", "hooked"]

_log = logging.getLogger(__name__)
RESTORE = "opentrans_kernels.restore(model)"


def hooked(module: nn.Module) -> bool:
    """Whether calling the module runs hooks of any kind, or a forward set on the instance."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return True
    return bool(module._backward_hooks or module._backward_pre_hooks)


class _Place:
    """One watched module: where it hangs, and how it looked when acceleration was built."""

    def __init__(self, name: str, module: nn.Module, parent: dict[str, Any] | None) -> None:
        self.name, self.module, self.parent = name, module, parent
        self.key = name.rpartition(".")[2]
        self.size = len(module.__dict__)
        # A replacement is timed before it takes its original's place.
        self._in_place = (module, module.__dict__.get("opentrans_original", module))

    def changed(self, undo: str) -> str | None:
        if self.parent is not None and self.parent.get(self.key) not in self._in_place:
            raise UnsupportedModelError(
                f"{self.name} was exchanged after the modules around it were replaced, and they "
                f"compute with the one that was there. Call {undo}, exchange it then, and do the "
                "rest again."
            )
        if (extra := added_behaviour(self.module)) is not None:
            return f"{self.name} {extra}"
        self.size = len(self.module.__dict__)  # an attribute that calling it does not use
        return None


class _Seen:
    """How modules stood at one moment. Lists, for C to walk them."""

    def __init__(self, places: Iterable[_Place]) -> None:
        places = list(places)
        self._states = [place.module.__dict__ for place in places]
        self._sizes = list(map(len, self._states))
        held = [place for place in places if place.parent is not None]
        self._parents = [place.parent for place in held]
        self._keys = [place.key for place in held]
        self._children = [place.module for place in held]

    def same(self) -> bool:
        return list(map(len, self._states)) == self._sizes and all(
            map(operator.is_, map(dict.get, self._parents, self._keys), self._children)
        )


class Untouched:
    """That nothing was added to parts that hang in one place, since their watches found nothing.

    held: the ``_modules`` they hang in, and nothing else does.
    """

    def __init__(self, watches: Iterable[Watch], held: dict[str, Any]) -> None:
        places = [place for watch in watches for place in watch._places]
        self._seen = _Seen([*places, *(_Place(key, part, held) for key, part in held.items())])
        self._held, self._count = held, len(held)
        self._newest = RemovableHandle.next_id  # of the hooks, anywhere

    def same(self) -> bool:
        return (
            RemovableHandle.next_id == self._newest
            and len(self._held) == self._count
            and self._seen.same()
        )


class Watch:
    """The modules of one replaced part, and the masks that make it the masked dense part.

    modules: (name, module, the ``_modules`` that holds it or None).
    masks: path of a parameter below the replaced module ("conv1.weight") -> bool mask, for those
        whose mask is not in the weights.
    undo: the call that puts the original modules back, for messages.
    """

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module, dict[str, Any] | None]],
        masks: Mapping[str, torch.Tensor],
        undo: str = RESTORE,
    ) -> None:
        self.undo = undo
        self._places = [_Place(*entry) for entry in modules]
        self._masks = {p: (tuple(m.shape), pack_bits(m)) for p, m in masks.items()}
        self._told = False
        self._newest: int | None = None  # number of the newest hook when nothing was found
        self._seen: _Seen | None = None  # how the modules stood then

    @classmethod
    def inside(
        cls, block: nn.Module, name: str, held: dict[str, Any],
        masks: Mapping[str, torch.Tensor], undo: str = RESTORE,
    ) -> Watch:  # fmt: skip
        """Everything below ``block`` (``name`` in the model), whose replacement holds ``held``."""
        places = []
        for path, module in block.named_modules():
            if path:
                above = path.rpartition(".")[0]
                parent = block.get_submodule(above)._modules if above else held
                places.append((f"{name}.{path}".lstrip("."), module, parent))
        return cls(places, masks, undo)

    def changed(self) -> str | None:
        """What was added since, in words; None for nothing."""
        if torch.compiler.is_compiling():
            return self._walk(quiet=False)
        newest = RemovableHandle.next_id
        quiet = newest == self._newest  # nobody anywhere has registered a hook since
        if quiet and self._seen is not None and self._seen.same():
            return None
        if (why := self._walk(quiet)) is not None:
            return why
        self._newest, self._seen = newest, _Seen(self._places)
        return None

    def _walk(self, quiet: bool) -> str | None:
        for place in self._places:
            state = place.module.__dict__
            if (
                len(state) != place.size
                or (place.parent is not None and place.parent.get(place.key) is not place.module)
                or not (
                    quiet
                    or (not state["_forward_hooks"] and not state["_forward_pre_hooks"])
                    and not (state["_backward_hooks"] or state["_backward_pre_hooks"])
                )
            ) and (why := place.changed(self.undo)) is not None:
                return why
        return None

    def __getstate__(self) -> dict[str, Any]:
        # Another process counts its hooks anew, and copies have dicts of their own.
        return {**self.__dict__, "_newest": None, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        known = self._masks.items()  # pickled when they were named after modules
        self._masks = {
            p if p.endswith("weight") else f"{p}.weight".lstrip("."): m for p, m in known
        }

    def dense(self, original: nn.Module, x: torch.Tensor, why: str) -> torch.Tensor:
        """The masked dense part; said once per part, because it is slower."""
        if not self._told:
            self._told = True
            _log.warning(
                "%s since acceleration: this %s runs densely, so that it is called. Remove it to "
                "be fast again.", why, type(original).__name__,
            )  # fmt: skip
        return self.masked(original, x)

    def masked(self, original: nn.Module, *args: Any) -> Any:
        """Call the original with its masks applied."""
        if not self._masks:
            return original(*args)
        weights = {}
        for path, (shape, bits) in self._masks.items():
            keep = np.unpackbits(bits, count=math.prod(shape)).view(np.bool_)
            mask = torch.from_numpy(keep).view(shape)
            weights[path] = original.get_parameter(path).detach() * mask
        return torch.func.functional_call(original, weights, args, tie_weights=False)
