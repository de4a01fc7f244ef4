"""The torch library of the ops: schemas, fake kernels, autograd and autocast, written once per op.

Backends add implementations: the compiled extension for CPU, or the reference where the extension
is not loaded, so that exported programs run either way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .. import dispatch, flops, native
from ..errors import OpenTransError, UnsupportedModelError

__all__ = [
    "LIBRARY",
    "NAMESPACE",
    "define",
    "in_dispatch_mode",
    "in_float32",
    "kernel_for",
    "once_differentiable",
    "past_autograd",
    "plane_padded",
    "plane_stride",
    "release_memory",
    "require_backward_alone",
    "resolve",
    "schemas",
    "scratch_bytes",
]

NAMESPACE = "opentrans_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_LINE = 16  # floats per cache line
_NAMES = {torch.float32: "float32", torch.float64: "float64"}
_HALF = (torch.bfloat16, torch.float16)
_BelowAutograd = torch._C._AutoDispatchBelowAutograd

# Implemented by the extension; without it none of these may be called.
LIBRARY.define("scratch_bytes() -> int")
LIBRARY.define("release_memory() -> ()")
LIBRARY.define("record_units(int threads, bool units) -> ()")
LIBRARY.define("recorded_units(Tensor like) -> Tensor")
LIBRARY.define("deal_in_ranges(bool on) -> ()")
LIBRARY.define("empty_region_seconds(int repeats) -> float")


def scratch_bytes() -> int:
    """Bytes the compiled kernels hold: outputs in use or kept for reuse, and scratch of threads.

    0 without the compiled extension, whose outputs torch's own allocator holds.
    """
    return torch.ops.opentrans_kernels.scratch_bytes() if native.load() else 0


def release_memory() -> None:
    """Return the memory of freed outputs to the system; the next calls allocate it again.

    Nothing to do without the compiled extension.
    """
    if native.load():
        torch.ops.opentrans_kernels.release_memory()


def schemas() -> list[str]:
    """The schema of every operator, for a process that loads the compiled kernels without Python.

    Such a process defines them in the namespace ``opentrans_kernels`` before it loads the library;
    see ``docs/deploy.md``.
    """
    names = torch._C._dispatch_get_all_op_names()
    own = sorted(name for name in names if name.startswith(f"{NAMESPACE}::"))
    return [str(torch._C._get_schema(*name.partition(".")[::2])) for name in own]


def require_backward_alone(otherwise: str) -> None:
    """Raise UnsupportedModelError inside a derivative that the ops would give as zero.

    They have the ordinary backward; torch takes any other derivative of an op for zero, without a
    word. ``torch.func.vmap`` is none. ``otherwise``: what to do instead, for the message.
    """
    if torch.compiler.is_compiling():
        return
    mode = None
    if forward_ad._current_level >= 0:
        mode = "a forward-mode derivative (torch.autograd.forward_ad)"
    else:
        layers = torch._C._functorch.get_interpreter_stack() or ()
        if any(layer.key() in (TransformType.Grad, TransformType.Jvp) for layer in layers):
            mode = "a derivative of torch.func (grad, jvp, ...)"
    if mode is not None:
        raise UnsupportedModelError(
            f"{mode} is asked for, and the sparse kernels have the ordinary backward only. Use "
            f"x.requires_grad_() and backward(). {otherwise}"
        )


def kernel_for(op: str, x: torch.Tensor) -> Callable[..., Any]:
    """The kernel that serves ``op`` for the activations ``x``.

    Half-precision activations are computed in float32 under autocast.

    Raises:
        KernelUnavailable: none does; the message says how to convert ``x``.
        UnsupportedModelError: see :func:`require_backward_alone`.
    """
    require_backward_alone(f"{op} has no other.")
    device = x.device.type
    dtype = _NAMES.get(x.dtype)
    if dtype is None:
        autocast = x.dtype in _HALF and _autocast_enabled(device)
        dtype = "float32" if autocast else str(x.dtype).removeprefix("torch.")
    return resolve(op, device, dtype)


def resolve(op: str, device: str, dtype: str) -> Callable[..., Any]:
    """The kernel of :func:`dispatch.resolve`, which a compiler can trace as the very first call."""
    if torch.compiler.is_compiling():
        _settle(op, device, dtype)
    return dispatch.resolve(op, device, dtype).function()


def _settle(op: str, device: str, dtype: str) -> None:
    """Run, while a compiler traces, what it cannot: reading the environment, logging a fallback.

    What is traced afterwards finds both done, and has guards on the settings.
    """
    with contextlib.suppress(OpenTransError):  # raised again by the call that is traced
        dispatch.resolve(op, device, dtype)


# As torch.compiler.assume_constant_result does, which would import the compiler, and triton.
_settle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _autocast_enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def in_dispatch_mode() -> bool:
    """Whether a ``TorchDispatchMode`` is active: a counter, a tracer, a checkpoint policy."""
    return _get_current_dispatch_mode() is not None


def past_autograd(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, called below autograd where gradients are off.

    Its formula is a function in Python that does no more then than going on below autograd, but
    takes 30 microseconds to say so when the caches hold something else.
    """

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*args)
        with _BelowAutograd():
            return op(*args)

    return run


def in_float32(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Let a reference kernel ignore autocast, which would round its convolutions to half."""

    @functools.wraps(kernel)
    def run(x: torch.Tensor, *rest: Any) -> Any:
        if not _autocast_enabled(x.device.type):
            return kernel(x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return kernel(*(
                a.float() if isinstance(a, torch.Tensor) and a.dtype in _HALF else a
                for a in (x, *rest)
            ))  # fmt: skip

    return run


def once_differentiable(op: str) -> None:
    """Raise UnsupportedModelError if the backward that calls this is itself being recorded."""
    if torch.is_grad_enabled():
        raise UnsupportedModelError(
            f"{op}: a gradient of the gradient was asked for (create_graph=True), and what it "
            "needs is not kept. Use create_graph=False, or put the original modules back with "
            "opentrans.restore_skipped(model)."
        )


def plane_stride(pixels: int) -> int:
    """Floats between two planes of a tensor the kernels allocate (``otk::plane_stride``)."""
    lines = (pixels + _LINE - 1) // _LINE
    return (lines + 1 - lines % 2) * _LINE


def plane_padded(like: torch.Tensor, n: int, c: int, h: int, w: int) -> torch.Tensor:
    """An uninitialised ``[n, c, h, w]`` in the kernels' layout: dense rows, padded planes.

    Rows and columns are contiguous, so ``flatten(2)`` is a view; planes are ``plane_stride(h * w)``
    apart. On fake tensors this states the layout of the compiled kernels' results.
    """
    plane = plane_stride(h * w)
    return like.new_empty_strided((n, c, h, w), (c * plane, plane, w, 1))


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    fallback: str,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    compiled: bool = True,
) -> Callable[..., Any]:
    """Define ``opentrans_kernels::name`` and return its callable.

    Args:
        schema: arguments and results, as in ``torch.library``.
        fake: shapes and strides of the result.
        fallback: ``module:function`` that serves CPU tensors if the extension is not loaded.
        backward, setup_context: the autograd formula, if the op has one.
        compiled: whether the extension implements it; if not, ``fallback`` always serves.
    """
    LIBRARY.define(f"{name}{schema}")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=LIBRARY
        )
    # The kernels compute in float32: autocast hands them float32 instead of failing.
    torch.library.register_autocast(qualified, "cpu", torch.float32, lib=LIBRARY)
    if not (compiled and native.load()):
        module, function = fallback.split(":")
        kernel = getattr(importlib.import_module(module), function)
        LIBRARY.impl(name, kernel, "CPU")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if name in flops.FORMULAS:
        flops.register_when_counting(op)
    return op
