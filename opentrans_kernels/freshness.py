"""Nobody computes with copies of weights that are no longer the weights.

What was packed or folded from parameters and buffers keeps a :class:`Watch` over them. Asked at
every call, it compares, of every tensor, which object stands in the module, where it lies, its
version counter, and the bits of one block in :data:`TURNS`, another one each time: writes PyTorch
counts and tensors that were replaced are noticed at once, whatever else wrote (``tensor.data``,
numpy, another process) within ``TURNS`` calls, and at once where it wrote to a whole tensor. Where
something looks different, all bits are compared: the same weights at another place are no change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from . import settings
from .errors import UnsupportedModelError
from .ops.contents import Contents
from .topology import ConvNode

__all__ = ["TURNS", "Watch", "watch_over"]

#: Calls after which every bit was looked at.
TURNS = 128
# Counts training batches; no inference reads it.
_UNREAD = ("num_batches_tracked",)
# What is taken down anew where a watch was copied or loaded.
_PLACES = ("_places", "_seen", "_uncounted", "_views", "_memory")


class Watch:
    """The tensors that something was derived from, and whether they are still what they were.

    Args:
        modules: path for messages -> module; all parameters and buffers in it, and its ``eps``.
        parent: (path, module) that holds them; replacing one of them is noticed as well.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], parent: tuple[str, nn.Module] | None = None
    ) -> None:
        self._tensors: list[tuple[str, nn.Module, str, str]] = []
        # Places that must stay as they are: children of the parent, and tensors that are missing.
        self._objects: list[tuple[str, nn.Module, str, str, Any]] = []
        for path, module in modules.items():
            for name, owner, kind, key, tensor in _entries(path, module):
                if tensor is None:
                    self._objects.append((name, owner, kind, key, None))
                else:
                    self._tensors.append((name, owner, kind, key))
        if parent is not None:
            self._objects += _steps(*parent, modules)
        self._numbers = [
            (f"{path}.eps", module, module.eps)
            for path, module in modules.items()
            if hasattr(module, "eps")
        ]
        now = self._now()
        self._contents = Contents(now)  # type: ignore[arg-type]
        self._turn = 0
        self._arm(now)

    def __getstate__(self) -> dict[str, Any]:
        # Where tensors lie is true of this process and of these tensors only.
        return {key: value for key, value in vars(self).items() if key not in _PLACES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, **dict.fromkeys(_PLACES))

    def arm(self) -> None:
        """Take the places of the tensors down, if that is still to be done."""
        if self._views is None:
            self._look()

    def changed(self) -> str | None:
        """Path of the first tensor, module or number that is not what it was; None if all are."""
        if self._seen is None:
            return self._look()
        for holder, key, value in self._places:
            if holder.get(key) is not value:
                return self._look()
        for holder, key, tensor, version, address in self._seen:
            now = holder.get(key)
            if now is not tensor or now._version != version or now.data_ptr() != address:
                return self._look()
        for holder, key, tensor, address in self._uncounted:
            now = holder.get(key)
            if now is not tensor or now.data_ptr() != address:
                return self._look()
        for _, module, value in self._numbers:
            if module.eps != value:
                return self._look()
        if settings.get().strict:
            return self._look()
        self._turn = turn = (self._turn + 1) % TURNS
        if self._memory and self._contents.first_rewritten(self._memory, turn, TURNS) >= 0:
            return self._look()
        return None

    def require(self) -> None:
        """Raise UnsupportedModelError, with the path and the fix, if :meth:`changed`."""
        if (path := self.changed()) is not None:
            raise UnsupportedModelError(
                f"{path} was written to or replaced since it was packed, and the packed copy would "
                "keep computing the old network. Call opentrans_kernels.restore(model), which "
                "brings back the modules with the weights they hold now, and accelerate again."
            )

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
            return None  # a tracer's: it has no bits, and what is traced is not computed
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
        self._places = [(vars(o)[kind], key, value) for _, o, kind, key, value in self._objects]
        # Views keep what they show, also when a parameter's ``data`` is replaced.
        self._views = [tensor.detach() for tensor in now]
        on_cpu = all(tensor.device.type == "cpu" for tensor in now)
        self._memory = Contents.views(self._views) if on_cpu else []
        self._seen, self._uncounted = [], []
        for (_, owner, kind, key), tensor in zip(self._tensors, now, strict=True):
            holder, address = vars(owner)[kind], tensor.data_ptr()
            if tensor.is_inference():  # counts no writes
                self._uncounted.append((holder, key, tensor, address))
            else:
                self._seen.append((holder, key, tensor, tensor._version, address))


def watch_over(nodes: Iterable[ConvNode], parent: tuple[str, nn.Module] | None = None) -> Watch:
    """A watch over convolutions and the batch norms behind them."""
    modules: dict[str, nn.Module] = {}
    for node in nodes:
        modules[node.name] = node.conv
        if node.bn is not None:
            modules[str(node.bn_name)] = node.bn
    return Watch(modules, parent)


def _entries(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, str, str, Any]]:
    """(path, module it stands in, "_parameters" or "_buffers", key, tensor or None)."""
    for inner, owner in module.named_modules(prefix=path):
        for kind in ("_parameters", "_buffers"):
            for key, tensor in vars(owner)[kind].items():
                if key not in _UNREAD:
                    yield f"{inner}.{key}", owner, kind, key, tensor


def _steps(
    root_path: str, root: nn.Module, paths: Iterable[str]
) -> Iterator[tuple[str, nn.Module, str, str, Any]]:
    """The children of ``root`` on the way to ``paths``, as :func:`_entries` gives tensors."""
    done = set()
    for path in paths:
        owner, at = root, root_path
        for key in path.removeprefix(f"{root_path}.").split("."):
            child, at = owner._modules[key], f"{at}.{key}"
            if at not in done:
                done.add(at)
                yield at, owner, "_modules", key, child
            owner = child  # type: ignore[assignment]
