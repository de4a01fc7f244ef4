"""A tensor whose numbers are computed when something asks for them.

For outputs that stand in a result, and that hardly a caller reads: the predictions of all decoder
layers but the last. Shape, dtype and device are known at once; the first operation computes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..errors import OpenTransError

__all__ = ["Deferred", "fingerprint", "once"]

# What is answered without the numbers.
_KNOWN = frozenset(
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")
) | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}


class Deferred(torch.Tensor):
    """Stands for the tensor that ``compute`` returns, which is called once, at first use.

    like: a tensor of the same shape, dtype and device.
    """

    _compute: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(cls, like: torch.Tensor, compute: Callable[[], torch.Tensor]) -> Deferred:
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device
        )
        made._compute = once(compute)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_computed(args), **_computed(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached from C++ that was handed the tensor without asking __torch_function__.
        return func(*_computed(args), **_computed(kwargs or {}))


def _computed(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value._compute()
    if type(value) in (list, tuple):
        return type(value)(_computed(one) for one in value)
    if type(value) is dict:
        return {key: _computed(one) for key, one in value.items()}
    return value


def once(compute: Callable[[], Any]) -> Callable[[], Any]:
    """``compute``, called at most once and as gradients are enabled now, not at that time."""
    found: list[Any] = []
    enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def call() -> Any:
        if not found:
            with torch.inference_mode(inference), torch.set_grad_enabled(enabled):
                found.append(compute())
        return found[0]

    return call


def fingerprint(tensors: list[torch.Tensor]) -> Hashable:
    """Of objects, storage and writes: equal as long as the tensors hold the same numbers.

    Inference tensors do not count their writes.
    """
    return tuple((id(t), t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)


def require_same(before: Hashable, tensors: list[torch.Tensor]) -> None:
    """Raise OpenTransError if ``tensors`` were written to since ``before``."""
    if fingerprint(tensors) != before:
        raise OpenTransError(
            "a prediction of an earlier decoder layer is read after weights or inputs were "
            "changed, so it can no longer be computed as it was. Read it right after the call "
            "(any operation on it will do), or call restore_heads(model) first."
        )
