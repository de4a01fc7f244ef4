"""``add_relu``: ``relu(z + residual)`` that keeps one bit per element, or its output, for backward.

For activations that no fold reaches, such as those of a batch norm with batch statistics.
"""

from __future__ import annotations

import torch

from ..library import LIBRARY, NAMESPACE, once_differentiable
from . import bits_shape, has_channels_last, relu_bits_, relu_bits_backward

__all__ = ["add_relu"]

LIBRARY.define("add_relu(Tensor z, Tensor? residual, bool bits) -> (Tensor, Tensor)")
LIBRARY.define(
    "add_relu_backward(Tensor grad, Tensor? y, Tensor? mask, bool channels_last) -> Tensor"
)


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _forward(z, residual, bits):
    channels_last = has_channels_last(z)
    y = torch.empty_like(z, memory_format=_layout(channels_last)).copy_(z)
    mask = relu_bits_(y, residual, channels_last, bits=bits)
    return y, mask if bits else z.new_empty(0, dtype=torch.uint8)


def _fake(z, residual, bits):
    channels_last = has_channels_last(z)
    mask = bits_shape(z.shape, channels_last) if bits else (0,)
    y = torch.empty_like(z, memory_format=_layout(channels_last))
    return y, z.new_empty(mask, dtype=torch.uint8)


def _backward(grad, y, mask, channels_last):
    selected, _ = relu_bits_backward(grad, mask, channels_last, y=y)
    return selected.contiguous(memory_format=_layout(channels_last))


def _backward_fake(grad, y, mask, channels_last):
    return torch.empty_like(grad, memory_format=_layout(channels_last))


def _setup(ctx, inputs, output) -> None:
    z, _, bits = inputs
    y, mask = output
    ctx.channels_last, ctx.has_residual = has_channels_last(z), inputs[1] is not None
    ctx.save_for_backward(None if bits else y, mask if bits else None)
    ctx.mark_non_differentiable(mask)


def _autograd(ctx, grad, _):
    once_differentiable("add_relu")
    grad = torch.ops.opentrans_kernels.add_relu_backward(
        grad, *ctx.saved_tensors, ctx.channels_last
    )
    return grad, grad if ctx.has_residual else None, None


for _name, _kernel, _shape in (
    ("add_relu", _forward, _fake),
    ("add_relu_backward", _backward, _backward_fake),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shape, lib=LIBRARY)
torch.library.register_autograd(
    f"{NAMESPACE}::add_relu", _autograd, setup_context=_setup, lib=LIBRARY
)


def add_relu(
    z: torch.Tensor, residual: torch.Tensor | None = None, bits: bool = True
) -> torch.Tensor:
    """``relu(z + residual)``, ``[N, C, H, W]`` of any floating dtype; once differentiable.

    bits: keep one bit per element; False: keep the output, which costs nothing where another
        operation stores it anyway.
    """
    recorded = torch.is_grad_enabled() and (
        z.requires_grad or (residual is not None and residual.requires_grad)
    )
    return torch.ops.opentrans_kernels.add_relu(z, residual, bits and recorded)[0]
