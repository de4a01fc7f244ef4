"""What takes the place of a part of a head, and how it is proved, swapped in and undone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..accelerate.parts import PartError
from ..nn import Replacement
from ..plan.models import refresh_pruned
from ..topology.behaviour import first_changed, own_behaviour

__all__ = ["Found", "HeadPart", "NotTheSame", "head_parts", "prove", "swap_in", "swap_out"]

_log = logging.getLogger(__name__)


#: No rounding of float32 in the trial of a part is larger, relative to the largest output.
_ROUNDING = 1e-3


class NotTheSame(Exception):
    """A module looks like a known part, but computes something else; the message says what."""


class HeadPart(Replacement):
    """Stands in for a part of a head: same attributes, parameters and children, which it calls.

    ``fast`` is the inference path: eval mode, float32, CPU. In training mode and for other tensors
    the original module runs, with the very same children and parameters. It also runs, and says so
    once, after a hook was put on one of the modules that ``fast`` does not call (``bypassed``), or
    one of them was put in training mode.
    Weights may be written to or loaded at any time: what is packed is compared with them.
    """

    #: What it is and what is done about it, for the report.
    what, how = "part", ""
    #: The inference path; its signature is that of the original's forward.
    fast: Callable[..., Any]

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.__dict__["opentrans_told"] = False
        self.__dict__["_version"] = original._version  # of the names in the state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = vars(self).get("opentrans_original")
            if original is None:
                raise
            return getattr(original, name)  # a method of its class

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Whose class may know older names. Its parameters and buffers are the ones here.
        self.opentrans_original._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.ready([*args, *kwargs.values()]):
            return self.fast(*args, **kwargs)
        return self.as_it_was(*args, **kwargs)

    def ready(self, given: Iterable[Any]) -> bool:
        """Whether ``fast`` may run on these arguments."""
        if self.training or not _is_plain(given):
            return False
        if (why := self.changed()) is None:
            return True
        self.tell(why)
        return False

    def tell(self, why: str) -> None:
        """Say once that the original runs, and ``why`` ("NAME has hooks")."""
        if self.opentrans_told:
            return
        self.__dict__["opentrans_told"] = True
        _log.warning(
            "%s since acceleration: this %s runs as it was, on the modules that are there now. "
            "Undo that to be fast again.", why, type(self.opentrans_original).__name__,
        )  # fmt: skip

    def unready(self) -> nn.Module:
        """The original, in the mode and with the children that this has now."""
        original = self.opentrans_original
        original.training = self.training
        original._modules.update(self._modules)  # what was exchanged here is exchanged there
        return original

    def as_it_was(self, *args: Any, **kwargs: Any) -> Any:
        """What the original computes."""
        return self.unready()(*args, **kwargs)

    def bypassed(self) -> Iterable[tuple[str, nn.Module]]:
        """(name, module) of what ``fast`` computes without calling it."""
        return ()

    def changed(self) -> str | None:
        """Why ``fast`` no longer does what the modules do ("NAME has hooks"); None if it does."""
        bypassed = list(self.bypassed())
        if (name := next((name for name, module in bypassed if module.training), None)) is not None:
            return f"{name} is in training mode"
        return first_changed(bypassed)


@dataclass
class Found:
    """A part of a known kind at ``path``: its replacement, or why it stays as it is.

    error: of the replacement against float64, with that of the original in float32.
    """

    path: str
    kind: str
    replacement: HeadPart | None = None
    reason: str = ""
    error: PartError | None = field(default=None, compare=False)


def _is_plain(values: Iterable[Any]) -> bool:
    """Whether floating tensors are float32 on the CPU, and autocast is off."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu" or (
                value.is_floating_point() and value.dtype != torch.float32
            ):
                return False
        elif isinstance(value, (list, tuple)) and not _is_plain(value):
            return False
        elif isinstance(value, dict) and not _is_plain(value.values()):
            return False
    return not torch.is_autocast_enabled("cpu")


def prove(
    path: str,
    kind: str,
    original: nn.Module,
    make: Callable[[nn.Module], HeadPart],
    inputs: Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]],
    outputs: Callable[[Any], Sequence[torch.Tensor]] = lambda out: [out],
    call: Callable[[nn.Module], Callable[..., Any]] = lambda module: module,
) -> Found:
    """Replace ``original`` if both give the same on noise; otherwise say what is different.

    make: builds the replacement, or raises NotTheSame. inputs: arguments of a call in a dtype, the
    same numbers in each. outputs: the tensors of a result that must agree. call: how the module is
    called, if not as itself.

    What does not run in float64, because it converts its input to float32, is compared with the
    replacement in float64: the original must agree with that but for rounding.
    """
    learning = next((name for name, m in original.named_modules() if m.training), None)
    if learning is not None:  # a run of which would write to its statistics
        where = f"has {learning} in" if learning else "is in"
        return Found(path, kind, None, f"{where} training mode; call model.eval()")
    if (extra := own_behaviour(original)) is not None:
        return Found(path, kind, None, extra)
    try:
        new = make(original)
        with torch.no_grad():
            refresh_pruned(original)  # a weight with a gradient function cannot be copied
            args, kwargs = inputs(torch.float64)
            try:
                exact = outputs(call(copy.deepcopy(original).double())(*args, **kwargs))
            except RuntimeError:  # it makes float32 of its input, whatever it is given
                exact = outputs(copy.deepcopy(new).double().fast(*args, **kwargs))
            args, kwargs = inputs(torch.float32)
            dense = outputs(call(original)(*args, **kwargs))
            ours = outputs(call(new)(*args, **kwargs))
    except NotTheSame as different:
        return Found(path, kind, None, str(different))
    except Exception as error:  # another signature, an attribute that is not there
        why = f"does not run as its kind does ({type(error).__name__}: {error})"
        return Found(path, kind, None, why.splitlines()[0][:200])
    worst = PartError(path, 0.0, 0.0)
    for number, (right, rough, got) in enumerate(zip(exact, dense, ours, strict=True)):
        if got.shape != right.shape:
            return Found(path, kind, None, f"output {number} has another shape")
        top = right.abs().max().clamp(min=1e-30) if right.numel() else 1.0
        errors = [
            float((t.double() - right).abs().max() / top) if right.numel() else 0.0
            for t in (got, rough)
        ]
        found = PartError(path, *errors)
        # The second: where ``exact`` is our own, the original has to agree with it.
        if not found.exact or errors[1] > _ROUNDING:
            return Found(path, kind, None, f"computes something else: output {number}: {found}")
        worst = max(worst, found, key=lambda part: part.error / part.bound)
    return Found(path, kind, new, new.how, worst)


def head_parts(model: nn.Module) -> dict[str, HeadPart]:
    """Path -> replacement that is in the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HeadPart)}


def _parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    above, _, key = path.rpartition(".")
    return model.get_submodule(above), key


def swap_in(model: nn.Module, found: Iterable[Found]) -> None:
    """Put replacements in place; the outer ones first, so that inner ones end up inside them."""
    chosen = [part for part in found if part.replacement is not None]
    for part in sorted(chosen, key=lambda part: part.path.count(".")):
        parent, key = _parent_of(model, part.path)
        parent._modules[key] = part.replacement


def swap_out(model: nn.Module, paths: Iterable[str]) -> None:
    """Put the very same original modules back, the inner ones first."""
    for path in sorted(paths, key=lambda path: -path.count(".")):
        parent, key = _parent_of(model, path)
        part = parent._modules[key]
        original = part.opentrans_original  # type: ignore[union-attr]
        original.training = part.training  # type: ignore[union-attr]
        original._modules.update(part._modules)  # a run of the original may have left ours in it
        parent._modules[key] = original
