"""Ops of the GPU path: channels_last activations, half precision too, kernels chosen by dispatch.

Activations are ``[N, C, H, W]`` in ``channels_last`` memory, weights lie as the kernels read them
(inputs before outputs), biases stay in float32. Under autocast activations and weights are cast to
its dtype and biases are not. Where a second K segment, a residual or a gather is absent, ``None``
is passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from .. import dispatch, flops
from ..errors import KernelUnavailable
from .arguments import BadArgument
from .library import LIBRARY, NAMESPACE

__all__ = [
    "LEAST_CAPABILITY",
    "LIMIT",
    "accumulator",
    "check_capability",
    "define_nhwc",
    "empty_nhwc",
    "expect",
    "nhwc",
    "why_too_old",
]

LEAST_CAPABILITY = (8, 0)
#: Pixels and rows of weights are counted in 32 bits inside the kernels, addresses in 64.
LIMIT = 2**31 - 1
_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_LOW = (torch.float16, torch.bfloat16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32, for float64 float64."""
    return torch.float32 if dtype in _LOW else dtype


def empty_nhwc(like: torch.Tensor, n: int, c: int, h: int, w: int) -> torch.Tensor:
    """An uninitialised channels_last ``[n, c, h, w]``."""
    return torch.empty(
        (n, c, h, w), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if it is channels_last, else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def why_too_old(capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability cannot run the Triton kernels; None if it can."""
    if capability >= LEAST_CAPABILITY:
        return None
    least, found = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
    return (
        f"the Triton kernels need compute capability >= {least} (Ampere), this GPU has {found}, "
        "where Triton uses no tensor cores. Let cuDNN serve: accelerate(..., device='cuda') does "
        "so by itself"
    )


@cache
def _capability_problem(index: int) -> str | None:
    return why_too_old(torch.cuda.get_device_capability(index))


def check_capability(op: str, x: torch.Tensor) -> None:
    """Raise KernelUnavailable where ``x`` lies on a GPU that is too old."""
    if x.is_cuda and (problem := _capability_problem(x.get_device())) is not None:
        raise KernelUnavailable(f"{op}: {problem}.")


def expect(op: str, name: str, tensor: torch.Tensor, shape: Sequence[int], dtype) -> None:
    """Raise BadArgument unless a tensor has this shape and dtype."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise BadArgument(
            f"{op}: {name} must be {dtype} {list(shape)}, got {tensor.dtype} "
            f"{list(tensor.shape)}. Pack the weights for this input, in its dtype."
        )


def _serve(op: str) -> Callable[..., Any]:
    def run(x: torch.Tensor, *rest: Any) -> Any:
        name = str(x.dtype).removeprefix("torch.")
        return dispatch.resolve(op, x.device.type, name).function()(x, *rest)

    return run


def _autocast(call: Callable[..., Any], device: str, kept: tuple[int, ...]) -> Callable[..., Any]:
    """``call`` with floating tensors in autocast's dtype, but for the arguments ``kept``."""

    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)

        def cast(position: int, value: Any) -> Any:
            fits = isinstance(value, torch.Tensor) and value.is_floating_point()
            if not fits or position in kept or value.dtype == torch.float64:
                return value
            return value.to(dtype)

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEYS[device])):
            return call(*(cast(i, value) for i, value in enumerate(args)))

    return run


def define_nhwc(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``opentrans_kernels::name``, served by the rows of the dispatch table.

    Args:
        schema: arguments and results; tensors called ``bias...`` keep their dtype under autocast.
        fake: shapes and strides of the result. backward, setup_context: the autograd formula.
    """
    LIBRARY.define(f"{name}{schema}")
    qualified = f"{NAMESPACE}::{name}"
    LIBRARY.impl(name, _serve(name), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=LIBRARY
        )
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    kept = tuple(i for i, a in enumerate(op._schema.arguments) if a.name.startswith("bias"))
    for device, key in _KEYS.items():
        LIBRARY.impl(name, _autocast(op, device, kept), str(key).rpartition(".")[2])
    if name in flops.FORMULAS:
        flops.register_when_counting(op)
    return op
