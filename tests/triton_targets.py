"""Functions that tests call in the interpreter's process (``triton_tools.Interpreter``)."""

from __future__ import annotations

import sys
from typing import Any

import torch


def tridiagonalise(matrices: dict[int, torch.Tensor], by_columns: bool) -> Any:
    """With ``by_columns`` every matrix takes the path of large ones, in small blocks."""
    from opentrans_kernels.spectrum.cuda import tridiagonal

    before = tridiagonal.SMALL, tridiagonal._ROWS, tridiagonal._WIDTH
    if by_columns:
        tridiagonal.SMALL, tridiagonal._ROWS, tridiagonal._WIDTH = 0, 4, 16
    try:
        return tridiagonal.tridiagonalise(matrices)
    finally:
        tridiagonal.SMALL, tridiagonal._ROWS, tridiagonal._WIDTH = before


def eigenvalues(weights: dict[str, torch.Tensor], solver: str) -> list[torch.Tensor]:
    """The whole path from weights to eigenvalues, on the CPU device, kernels interpreted."""
    from opentrans_kernels.spectrum.cuda import eigenvalues
    from opentrans_kernels.spectrum.layers import select

    found = eigenvalues(select(weights), device="cpu", solver=solver)
    return [spectrum.values for spectrum in found]


def poisoned_conv(*arguments: Any) -> torch.Tensor:
    """The Triton convolution into an output full of NaN."""
    from opentrans_kernels.ops.implicit_gemm_conv2d import triton as kernels

    return _poisoned(kernels, kernels.implicit_gemm_conv2d, *arguments)


def _poisoned(module: Any, function: Any, *arguments: Any) -> Any:
    before = module.empty_nhwc

    def empty(like: torch.Tensor, *size: int) -> torch.Tensor:
        return before(like, *size).fill_(float("nan"))

    module.empty_nhwc = empty
    try:
        return function(*arguments)
    finally:
        module.empty_nhwc = before


def poisoned_chain(*arguments: Any) -> Any:
    """The Triton chain into outputs full of NaN."""
    from opentrans_kernels.ops.bottleneck_chain import triton as kernels

    return _poisoned(kernels, kernels.bottleneck_chain, *arguments)


def poisoned_stem(*arguments: Any) -> Any:
    """The Triton stem into an output full of NaN."""
    from opentrans_kernels.ops.fused_stem import triton as kernels

    return _poisoned(kernels, kernels.fused_stem, *arguments)


def deform_gradients(grad: torch.Tensor, *saved: Any) -> Any:
    """The gradient formula of ``ms_deform_attn`` on the Triton kernel."""
    from types import SimpleNamespace

    from opentrans_kernels.ops import ms_deform_attn  # noqa: F401  (loads the package)
    from opentrans_kernels.ops.ms_deform_attn import triton as kernels

    package = sys.modules["opentrans_kernels.ops.ms_deform_attn"]
    before, package.kernel_for = package.kernel_for, lambda op, value: getattr(kernels, op)
    try:
        with torch.no_grad():
            return package._backward(SimpleNamespace(saved_tensors=saved), grad)
    finally:
        package.kernel_for = before


def guarded_deform(value: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled, and the gradient of value, where NaN lies before and behind value."""
    from opentrans_kernels.ops.ms_deform_attn import triton as kernels

    held = value.new_full((value.shape[0], value.shape[1] + 64, *value.shape[2:]), float("nan"))
    held[:, 32:-32] = value
    out = kernels.ms_deform_attn(held[:, 32:-32], *arguments)
    grads = kernels.ms_deform_attn_backward(torch.ones_like(out), value, *arguments)
    return out, grads[0]
