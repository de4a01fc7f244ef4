"""Weightless copies of modules and the expression they compute, both on the meta device.

No data is copied, no hook of the model runs, nothing on the model changes; a trace of one residual
block takes about a millisecond.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.topology.nodes import original


def _memoise(module: nn.Module, memo: dict[int, Any]) -> None:
    """Prepare ``copy.deepcopy``: tensors become meta tensors, hooks vanish, replacements are
    undone.
    """
    for sub in module.modules():
        tensors = [*sub._parameters.values(), *sub._buffers.values(), *vars(sub).values()]
        for value in tensors:
            if isinstance(value, torch.Tensor) and id(value) not in memo:
                empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
                is_parameter = isinstance(value, nn.Parameter)
                memo[id(value)] = nn.Parameter(empty, False) if is_parameter else empty
        for name, value in vars(sub).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
    for sub in module.modules():
        inner = original(sub)
        if inner is not sub and id(sub) not in memo:
            _memoise(inner, memo)
            memo[id(sub)] = copy.deepcopy(inner, memo)


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in eval mode whose tensors have shapes but no data.

    Raises UnsupportedModelError when the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    try:
        _memoise(module, memo)
        twin = copy.deepcopy(module, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be copied for shape tracing ({error}). Remove "
            "attributes that do not support copy.deepcopy, or pass the ResNet tower itself instead "
            "of its wrapper."
        ) from error
    for sub in twin.modules():
        if "forward" in vars(sub) and hasattr(sub, "opentrans_original"):
            del sub.forward
    return twin.eval()


def _grown(size: int, window: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1


def _result_shape(name: str, args: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Shape of what a frequent operator gives, None where its rule is not known here."""
    x = args[0] if args and isinstance(args[0], torch.Tensor) else None
    if x is None:
        return None
    if name == "aten::relu" or name == "aten::native_batch_norm":
        return tuple(x.shape)
    if name == "aten::add":
        other = args[1]
        same = isinstance(other, torch.Tensor) and other.shape == x.shape
        return tuple(x.shape) if same and other.dtype == x.dtype else None
    if x.ndim != 4:
        return None
    if name == "aten::convolution":
        weight, _, stride, padding, dilation, transposed, _, groups = args[1:9]
        if transposed or weight.shape[1] * groups != x.shape[1]:
            return None
        windows: Any = zip(weight.shape[2:], stride, padding, dilation, strict=True)
        channels = weight.shape[0]
    elif name == "aten::avg_pool2d" and len(args) <= 3:
        windows = ((k, s, 0) for k, s in zip(args[1], args[2] or args[1], strict=True))
        channels = x.shape[1]
    else:
        return None
    height, width = (_grown(n, *w) for n, w in zip(x.shape[2:], windows, strict=True))
    return (x.shape[0], channels, height, width) if min(height, width) > 0 else None


def call_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)`` of meta tensors.

    torch's own shape rules are Python that loads its compiler first, seconds in a process that has
    no other use for it; those of a ResNet's operators are stated here. Whatever they do not cover,
    errors included, is torch's.
    """
    name = func._schema.name
    in_place = name.endswith("_") and not name.endswith("__")
    shape = None if kwargs else _result_shape(name.removesuffix("_") if in_place else name, args)
    if shape is None:
        return func(*args, **kwargs)
    if in_place:
        return args[0]
    result = args[0].new_empty(shape)
    if name == "aten::native_batch_norm":
        return result, args[0].new_empty(0), args[0].new_empty(0)
    return result


class ShapesOnly(TorchDispatchMode):
    """Runs a module on meta tensors by :func:`call_on_meta`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch would load its compiler, seconds, to keep it out of here; nothing compiles this.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return call_on_meta(func, args, kwargs or {})


class ExpressionRecorder(ShapesOnly):
    """Gives every tensor an integer that stands for the expression that computed it.

    Two tensors get the same integer exactly when they come from the same operations on the same
    leaves; in-place and out-of-place forms count as the same, additions commute. The table may be
    shared between two runs to compare them.
    """

    def __init__(self, table: dict[Any, int]) -> None:
        super().__init__()
        self._table = table
        self._of: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # keeps ids from being reused

    def expression(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._of:
            self._set(tensor, ("leaf", id(tensor)))
        return self._of[id(tensor)]

    def _set(self, tensor: torch.Tensor, key: Any) -> None:
        self._alive.append(tensor)
        self._of[id(tensor)] = self._table.setdefault(key, len(self._table))

    def _freeze(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return ("t", self.expression(value))
        if isinstance(value, (list, tuple)):
            return tuple(self._freeze(v) for v in value)
        if isinstance(value, dict):
            return tuple(sorted((k, self._freeze(v)) for k, v in value.items()))
        return repr(value)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.endswith("_") and not name.endswith("__"):
            name = name[:-1]
        frozen = self._freeze(args)
        if name == "aten::add" and len(args) == 2:
            frozen = tuple(sorted(frozen, key=repr))
        key = (name, frozen, self._freeze(kwargs))
        result = call_on_meta(func, args, kwargs)
        outputs = result if isinstance(result, (list, tuple)) else (result,)
        for position, output in enumerate(outputs):
            if isinstance(output, torch.Tensor):
                self._set(output, (key, position))
        return result


def same_expression(
    run: Callable[[torch.Tensor], torch.Tensor],
    claim: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
) -> bool:
    """True if ``run(x)`` and ``claim(x)`` compute the same expression of ``x`` and the same
    parameters.

    Each gets its own view of the input, so that an in-place operation of one cannot reach the
    other.
    """
    table: dict[Any, int] = {}
    results = []
    for function in (run, claim):
        start = x.clone()
        recorder = ExpressionRecorder(table)
        recorder._set(start, "input")
        with torch.no_grad(), recorder:
            out = function(start)
        if not isinstance(out, torch.Tensor):
            return False
        results.append(recorder.expression(out))
    return results[0] == results[1]
