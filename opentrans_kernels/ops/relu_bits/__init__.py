"""``relu_bits``: ReLU that keeps one bit per element for backward instead of its output.

The two registered ops write into their arguments and have no autograd formula; the differentiable
ops are built from them (``ops/folded_conv2d``). A bit is ``not (y <= 0)``, as PyTorch decides: the
gradient passes at NaN. Backward selects and never multiplies, so ``0 * inf`` stays 0.
"""

from __future__ import annotations

import torch

from ... import dispatch, native
from ..library import LIBRARY, NAMESPACE, plane_stride
from . import reference

__all__ = ["bits_shape", "has_channels_last", "relu_bits_", "relu_bits_backward"]

LIBRARY.define("relu_bits(Tensor(a!) z, Tensor? residual, bool channels_last) -> Tensor")
LIBRARY.define(
    "relu_bits_backward(Tensor grad, Tensor bits, Tensor(a!) out, bool channels_last) -> ()"
)


def bits_shape(shape: torch.Size, channels_last: bool) -> tuple[int, int]:
    """(rows, bytes) of the bits of an activation ``[N, C, H, W]``."""
    n, c, h, w = shape
    return (n, -(-h * w * c // 8)) if channels_last else (n * c, -(-h * w // 8))


def has_channels_last(t: torch.Tensor) -> bool:
    """Whether ``[N, C, H, W]`` is laid out channels_last (ambiguous layouts count as planar)."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _fake_forward(z, residual, channels_last):
    return z.new_empty(bits_shape(z.shape, channels_last), dtype=torch.uint8)


def _fake_backward(grad, bits, out, channels_last):
    return None


for _name, _fake, _kernel in (
    ("relu_bits", _fake_forward, reference.relu_bits),
    ("relu_bits_backward", _fake_backward, reference.relu_bits_backward),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
    if not native.load():
        LIBRARY.impl(_name, _kernel, "CPU")
OP = torch.ops.opentrans_kernels.relu_bits.default
BACKWARD = torch.ops.opentrans_kernels.relu_bits_backward.default


def _kernel_of(op: str, t: torch.Tensor):
    if t.dtype == torch.float32:
        return dispatch.resolve(op, t.device.type, "float32").function()
    return getattr(reference, op)  # other dtypes have one implementation


def relu_bits_(z: torch.Tensor, residual: torch.Tensor | None, channels_last: bool) -> torch.Tensor:
    """``z = relu(z + residual)`` in place; returns the bits for backward. No autograd.

    Args:
        z: ``[N, C, H, W]``, any floating dtype; dense planes, or dense channels_last images.
        residual: the same shape and kind of layout.
        channels_last: which of the two layouts.

    Returns:
        uint8 ``bits_shape(z.shape, channels_last)``; bit ``e % 8`` of byte ``e // 8`` of a row.
    """
    if not z.numel():
        return z.new_empty(bits_shape(z.shape, channels_last), dtype=torch.uint8)
    if residual is not None:
        residual = dense_rows(residual, channels_last)
    return _kernel_of("relu_bits", z)(z, residual, channels_last)


def relu_bits_backward(grad: torch.Tensor, bits: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """``grad`` where the bit is set and 0 elsewhere, in the layout of the activation."""
    if not grad.numel():
        return torch.empty_like(grad)
    grad = dense_rows(grad, channels_last)
    if not channels_last and not grad.is_contiguous():
        out = _whole_planes(grad)  # the sparse kernels read it without a copy
    else:
        out = torch.empty_like(grad)
    _kernel_of("relu_bits_backward", grad)(grad, bits, out, channels_last)
    return out


def _whole_planes(like: torch.Tensor) -> torch.Tensor:
    """As ``plane_padded``, with the padding of the last plane in the storage too."""
    n, c, h, w = like.shape
    plane = plane_stride(h * w)
    return like.new_empty(n * c * plane).as_strided((n, c, h, w), (c * plane, plane, w, 1))


def dense_rows(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """``t``, or a copy whose planes (or channels_last images) are dense."""
    if channels_last:
        return t.contiguous(memory_format=torch.channels_last)
    dense = t.shape[3] <= 1 or t.stride(3) == 1
    dense = dense and (t.shape[2] <= 1 or t.stride(2) == t.shape[3])
    return t if dense else t.contiguous()
