"""Nobody computes with copies of weights that are no longer the weights.

What was packed or folded from parameters and buffers keeps a :class:`Freshness` over them. Asked at
every call, it compares, of every tensor, which object stands in the module, where it lies, its
version counter, and the bits of one block in :data:`TURNS`, another one each time: writes PyTorch
counts and tensors that were replaced are noticed at once, whatever else wrote (``tensor.data``,
numpy, another process) within ``TURNS`` calls, and at once where it wrote to a whole weight. Biases
and norms, which are four tensors in five, are looked at in every :data:`SMALL` th call. Where
something looks different, all bits are compared: the same weights at another place are no change.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._mode_utils import no_dispatch

from . import settings
from .errors import UnsupportedModelError
from .ops.contents import Contents
from .ops.library import in_dispatch_mode
from .topology import ConvNode

__all__ = ["TURNS", "Freshness", "freshness_of"]

#: Calls after which every bit was looked at.
TURNS = 256
#: Calls from one look at the place and the bits of a tensor of one dimension to the next.
SMALL = 8
# Counts training batches; no inference reads it.
_UNREAD = ("num_batches_tracked",)
# What is taken down anew where one was copied or loaded.
_PLACES = ("_seen", "_views", "number")
_numbers = itertools.count(1)
_ALIVE: weakref.WeakValueDictionary[int, Freshness] = weakref.WeakValueDictionary()


def _changed_at_capture(number: int) -> str:
    """Path of what changed, or ""."""
    return _ALIVE[number].at_capture() or ""


# As torch.compiler.assume_constant_result does, which would import the compiler, and triton.
_changed_at_capture._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Freshness:
    """The tensors that something was derived from, and whether they are still what they were.

    Args:
        modules: path for messages -> module; all parameters and buffers in it, and its ``eps``.
        parent: (path, module) that holds them; replacing one of them is noticed as well.
        leave_out: how the paths of tensors begin that do not matter.
        every: calls from one look at a tensor of one dimension to the next.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parent: tuple[str, nn.Module] | None = None,
        leave_out: tuple[str, ...] = (),
        every: int = SMALL,
    ) -> None:
        self._every = every
        self._tensors: list[tuple[str, nn.Module, str, str]] = []
        # Places that must stay as they are: children of the parent, and tensors that are missing.
        self._objects: list[tuple[str, nn.Module, str, str, Any]] = []
        for path, module in modules.items():
            for name, owner, kind, key, tensor in _entries(path, module):
                if name.startswith(leave_out):
                    continue
                if tensor is None:
                    self._objects.append((name, owner, kind, key, None))
                else:
                    self._tensors.append((name, owner, kind, key))
        if parent is not None:
            inside = [p for path, m in modules.items() for p, _ in m.named_modules(prefix=path)]
            self._objects += _steps(*parent, [p for p in inside if not p.startswith(leave_out)])
        self._numbers = [
            (f"{path}.eps", module, module.eps)
            for path, module in modules.items()
            if hasattr(module, "eps")
        ]
        now = self._now()
        self._contents = Contents(now)  # type: ignore[arg-type]
        self._turn = 0
        self._register()
        self._arm(now)

    @classmethod
    def joined(cls, parts: Sequence[Freshness]) -> Freshness:
        """Over everything that ``parts`` are over, asked by one call instead of one for each."""
        found = cls({})
        for part in parts:
            found._every = min(found._every, part._every)
            found._tensors += part._tensors
            found._objects += part._objects
            found._numbers += part._numbers
        found._contents = Contents.joined([part._contents for part in parts])
        # What they hold now is still to be compared.
        found._seen = found._views = None  # type: ignore[assignment]
        return found

    def _register(self) -> None:
        #: By which compilers, which take numbers for constants, know it.
        self.number = next(_numbers)
        _ALIVE[self.number] = self

    def __getstate__(self) -> dict[str, Any]:
        # Where tensors lie is true of this process and of these tensors only.
        return {key: value for key, value in vars(self).items() if key not in _PLACES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, **dict.fromkeys(_PLACES))
        self._register()

    def arm(self) -> None:
        """Take the places of the tensors down, if that is still to be done."""
        if self._views is None:
            self._look()

    def changed(self) -> str | None:
        """Path of the first tensor, module or number that is not what it was; None if all are."""
        if not (in_dispatch_mode() or torch.jit.is_tracing()):
            return self._changed()
        with _unseen():
            return self._changed()

    def _changed(self) -> str | None:
        seen = self._seen
        if seen is None or not seen.unmoved() or settings.get().strict:
            return self._look()
        self._turn = turn = (self._turn + 1) % TURNS
        if seen.look is not None and seen.look(turn, TURNS) >= 0:
            return self._look()
        every = self._every
        if (turn + self.number) % every == 0 and not seen.small_alike(turn // every, every):
            return self._look()
        return None

    def at_capture(self) -> str | None:
        """:meth:`changed`, comparing everything, while a tracer's tensors stand in the module."""
        with _unseen():
            return self._look()

    def asked(self) -> str:
        """:meth:`changed`, "" for None. Where a compiler captures the call, it is asked then, once,
        and everything is compared."""
        if torch.compiler.is_compiling():
            return _changed_at_capture(self.number)
        return self.changed() or ""

    def require(self) -> None:
        """Raise UnsupportedModelError, with the path and the fix, if anything changed."""
        if path := self.asked():
            raise UnsupportedModelError(
                f"{path} was written to or replaced since it was packed, and the packed copy would "
                "keep computing the old network. Call opentrans_kernels.restore(model), which "
                "brings back the modules with the weights they hold now, and accelerate again."
            )

    def digest(self) -> str:
        """Hash of what the tensors held when it was made: dtypes, shapes and checksums."""
        return self._contents.digest()

    def _now(self) -> list[torch.Tensor | None]:
        return [vars(owner)[kind].get(key) for _, owner, kind, key in self._tensors]

    def _look(self) -> str | None:
        """Compare everything, and take the new places down where it is the same."""
        self._seen = None  # until then every call comes here
        for name, owner, kind, key, value in self._objects:
            if vars(owner)[kind].get(key) is not value:
                return name
        for name, module, value in self._numbers:
            if module.eps != value:
                return name
        now = self._now()
        if any(tensor is not None and is_fake(tensor) for tensor in now):
            if self._views is None:
                return None
            # A tracer's, without bits, in the place of those that were there before.
            now = list(self._views)
            changed = self._contents.first_change(now)
            return None if changed < 0 else self._tensors[changed][0]
        alike = [self._as_recorded(i, tensor) for i, tensor in enumerate(now)]
        for (name, *_), tensor in zip(self._tensors, alike, strict=True):
            if tensor is None:
                return name
        changed = self._contents.first_change(alike)  # type: ignore[arg-type]
        if changed >= 0:
            return self._tensors[changed][0]
        if any(a is not b for a, b in zip(now, alike, strict=True)):
            self._contents = Contents(now)  # type: ignore[arg-type]
        self._arm(now)
        return None

    def _as_recorded(self, index: int, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """``tensor`` in the recorded dtype and layout; None if it is another one for certain."""
        dtype, shape, strides = self._contents.forms[index]
        if tensor is None or tensor.is_meta or tuple(tensor.shape) != shape:
            return None
        if tensor.numel() and not tensor.untyped_storage().nbytes():
            return None  # freed behind the parameter
        if tensor.dtype != dtype:
            # ``.half()`` and ``.double()`` give the same weights in another dtype, if it was those
            # that they converted.
            old = self._views[index] if self._views is not None else None
            same = old is not None and torch.equal(old.to(tensor.device, tensor.dtype), tensor)
            return old if same else None
        if tensor.stride() == strides:
            return tensor
        like = torch.empty_strided(shape, strides, dtype=dtype, device=tensor.device)
        return like.copy_(tensor.detach())

    def _arm(self, now: list[Any]) -> None:
        # Views keep what they show, also when a parameter's ``data`` is replaced.
        self._views = [tensor.detach() for tensor in now]
        held: list[tuple[list[torch.Tensor], Callable[[int, int], int] | None]] = []
        for small in (False, True):
            chosen = [i for i, tensor in enumerate(now) if (tensor.dim() < 2) == small]
            on_cpu = all(now[i].is_cpu for i in chosen)
            look = self._contents.hold(self._views, chosen) if on_cpu else None
            held.append(([now[i] for i in chosen], look))
        self._seen = _Seen(self._tensors, now, self._objects, self._numbers, *held)


class _Seen:
    """How its tensors stood when their bits were compared. Lists, for C to walk them."""

    def __init__(
        self,
        tensors: list[tuple[str, nn.Module, str, str]],
        now: list[torch.Tensor],
        objects: list[tuple[str, nn.Module, str, str, Any]],
        numbers: list[tuple[str, nn.Module, float]],
        large: tuple[list[torch.Tensor], Callable[[int, int], int] | None],
        small: tuple[list[torch.Tensor], Callable[[int, int], int] | None],
    ) -> None:
        places = [*tensors, *(place[:4] for place in objects)]
        self._holders = [vars(owner)[kind] for _, owner, kind, _ in places]
        self._keys = [key for *_, key in places]
        self._values = [*now, *(place[4] for place in objects)]
        self._large, self.look = large
        self._small, self._look_small = small
        self._addresses = [tensor.data_ptr() for tensor in self._large]
        self._small_addresses = [tensor.data_ptr() for tensor in self._small]
        # Inference tensors count no writes.
        self._counted = [tensor for tensor in now if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._counted]
        self._modules = [module for _, module, _ in numbers]
        self._numbers = [value for _, _, value in numbers]

    def unmoved(self) -> bool:
        """Whether the same objects stand at the same places, without a write PyTorch counted."""
        return (
            all(map(operator.is_, map(dict.get, self._holders, self._keys), self._values))
            and list(map(_VERSION, self._counted)) == self._versions
            and list(map(_ADDRESS, self._large)) == self._addresses
            and list(map(_EPS, self._modules)) == self._numbers
        )

    def small_alike(self, turn: int, every: int) -> bool:
        """Whether tensors of one dimension lie where they lay, and hold what is read in ``turn``.

        A part in ``TURNS / every`` is read, so that all of them were after ``TURNS`` calls.
        """
        if list(map(_ADDRESS, self._small)) != self._small_addresses:
            return False
        return self._look_small is None or self._look_small(turn, TURNS // every) < 0


_VERSION, _EPS = operator.attrgetter("_version"), operator.attrgetter("eps")
_ADDRESS = torch.Tensor.data_ptr


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Counters and tracers see the network only."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        with no_dispatch():
            yield
    finally:
        torch._C._set_tracing_state(tracing)


def freshness_of(nodes: Iterable[ConvNode], every: int = SMALL) -> Freshness:
    """Of convolutions and the batch norms behind them."""
    modules: dict[str, nn.Module] = {}
    for node in nodes:
        modules[node.name] = node.conv
        if node.bn is not None:
            modules[str(node.bn_name)] = node.bn
    return Freshness(modules, every=every)


def _entries(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, str, str, Any]]:
    """(path, module it stands in, "_parameters" or "_buffers", key, tensor or None)."""
    for inner, owner in module.named_modules(prefix=path):
        for kind in ("_parameters", "_buffers"):
            for key, tensor in vars(owner)[kind].items():
                if key not in _UNREAD:
                    yield f"{inner}.{key}".lstrip("."), owner, kind, key, tensor


def _steps(
    root_path: str, root: nn.Module, paths: Iterable[str]
) -> Iterator[tuple[str, nn.Module, str, str, Any]]:
    """The children of ``root`` on the way to ``paths``, as :func:`_entries` gives tensors."""
    done = set()
    for path in paths:
        owner, at = root, root_path
        for key in filter(None, path.removeprefix(root_path).split(".")):
            child, at = owner._modules[key], f"{at}.{key}".lstrip(".")
            if at not in done:
                done.add(at)
                yield at, owner, "_modules", key, child
            owner = child  # type: ignore[assignment]
