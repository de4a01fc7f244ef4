"""The torch library of the ops: schemas, fake kernels, autograd and autocast, written once per op.

Backends add implementations: the compiled extension for CPU, or the reference where the extension
is not loaded, so that exported programs run either way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from .. import native

__all__ = ["LIBRARY", "NAMESPACE", "define", "plane_padded", "plane_stride"]

NAMESPACE = "opentrans_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_LINE = 16  # floats per cache line


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
    return getattr(getattr(torch.ops, NAMESPACE), name).default
