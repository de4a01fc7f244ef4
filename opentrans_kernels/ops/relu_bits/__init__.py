"""``relu_bits``: the pass behind a convolution, with one bit per element kept for backward.

``y = relu(scale * z + shift + residual)`` in place, one pass over memory; backward needs the bits
or ``y``, whichever is kept. The two registered ops write into their arguments and have no autograd
formula; the differentiable ops are built from them (``ops/folded_conv2d``). A bit is
``not (y <= 0)``, as PyTorch decides: the gradient passes at NaN. Backward selects before it
multiplies, so ``0 * inf`` stays 0.
"""

from __future__ import annotations

import torch

from ... import native
from ..library import LIBRARY, NAMESPACE, plane_stride, resolve
from . import reference

__all__ = ["bits_shape", "has_channels_last", "relu_bits_", "relu_bits_backward"]

LIBRARY.define(
    "relu_bits(Tensor(a!) z, Tensor? scale, Tensor? shift, Tensor? residual, bool bits, "
    "bool channels_last) -> Tensor"
)
LIBRARY.define(
    "relu_bits_backward(Tensor grad, Tensor? bits, Tensor? y, Tensor? scale, Tensor(a!)? out, "
    "Tensor(b!)? scaled, bool channels_last) -> ()"
)


def bits_shape(shape: torch.Size, channels_last: bool) -> tuple[int, int]:
    """(rows, bytes) of the bits of an activation ``[N, C, H, W]``."""
    n, c, h, w = shape
    return (n, -(-h * w * c // 8)) if channels_last else (n * c, -(-h * w // 8))


def has_channels_last(t: torch.Tensor) -> bool:
    """Whether ``[N, C, H, W]`` is laid out channels_last (ambiguous layouts count as planar)."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _fake_forward(z, scale, shift, residual, bits, channels_last):
    rows, length = bits_shape(z.shape, channels_last)
    return z.new_empty((rows if bits else 0, length), dtype=torch.uint8)


def _fake_backward(grad, bits, y, scale, out, scaled, channels_last):
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
        return resolve(op, t.device.type, "float32")
    return getattr(reference, op)  # other dtypes have one implementation


def relu_bits_(
    z: torch.Tensor,
    residual: torch.Tensor | None,
    channels_last: bool,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    bits: bool = True,
) -> torch.Tensor:
    """``z = relu(scale * z + shift + residual)`` in place; returns the bits for backward, or
    nothing. No autograd.

    Args:
        z: ``[N, C, H, W]``, any floating dtype; dense planes, or dense channels_last images.
        residual: the same shape and kind of layout.
        channels_last: which of the two layouts.
        scale, shift: ``[C]``, float32 for a float32 ``z``.

    Returns:
        uint8 ``bits_shape(z.shape, channels_last)``; bit ``e % 8`` of byte ``e // 8`` of a row.
    """
    if not z.numel():
        return z.new_empty(bits_shape(z.shape, channels_last), dtype=torch.uint8)
    if residual is not None:
        residual = dense_rows(residual, channels_last)
    return _kernel_of("relu_bits", z)(z, scale, shift, residual, bits, channels_last)


def relu_bits_backward(
    grad: torch.Tensor,
    bits: torch.Tensor | None,
    channels_last: bool,
    *,
    y: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    plain: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``grad`` where the bit is set (without bits: where ``not (y <= 0)``) and 0 elsewhere, in the
    layout of the activation; and ``scale`` times that. None for what is not asked for.

    Args:
        scale: ``[C]``, float32 for a float32 ``grad``. plain: return the first as well.
    """
    grad = dense_rows(grad, channels_last)
    out = _empty_as(grad, channels_last) if plain else None
    scaled = _empty_as(grad, channels_last) if scale is not None else None
    if grad.numel() and (plain or scale is not None):
        if y is not None:
            y = dense_rows(y, channels_last)
        _kernel_of("relu_bits_backward", grad)(grad, bits, y, scale, out, scaled, channels_last)
    return out, scaled


def _empty_as(grad: torch.Tensor, channels_last: bool) -> torch.Tensor:
    if grad.numel() and not channels_last and not grad.is_contiguous():
        return _whole_planes(grad)  # the sparse kernels read it without a copy
    return torch.empty_like(grad)


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
