"""``folded_conv2d``: convolution, eval-mode batch norm, residual and ReLU as one differentiable op.

With ``s = gamma / sqrt(var + eps)``

    y = relu(s * (conv(x, W) + bias - mean) + beta + residual)

A frozen convolution runs with the weight ``s W``, folded once. What the op keeps for backward is
what backward needs, by reference: the parameters, ``x`` only if the weight or gamma trains, and for
the ReLU either one bit per element or, where something else stores it anyway, its output. With
``g`` the gradient behind the ReLU and ``G = wgrad(x, g)``:

    dx = dgrad(g, s W)    dW = s G    dresidual = g    dbeta = sum g
    dgamma = (sum over a row of W * G + (bias - mean) dbeta) / sqrt(var + eps)

The last line needs no activation beyond ``x``, because ``sum g conv(x, W) = sum W G``, and holds
for gamma = 0. Everything is opaque to ``torch.compile``: a compiled graph runs the same code.
"""

from __future__ import annotations

import torch

from ... import flops
from ..library import LIBRARY, NAMESPACE, in_dispatch_mode, once_differentiable
from ..relu_bits import bits_shape, has_channels_last, relu_bits_, relu_bits_backward
from .convolution import convolve, input_gradient
from .fold import Norm, affine_of, folded, folded_bytes, in_format

__all__ = ["folded_bytes", "folded_conv2d", "output_size"]

_NORM = "Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var"
_CONV = "float eps, int[] stride, int[] padding, int[] dilation, int groups"
LIBRARY.define(
    f"folded_conv2d(Tensor x, Tensor weight, {_NORM}, Tensor? residual, {_CONV}, bool frozen, "
    "bool relu, bool bits) -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"folded_conv2d_backward(Tensor grad, Tensor? x, Tensor weight, {_NORM}, Tensor? y, "
    f"Tensor? mask, int[] size, {_CONV}, bool frozen, bool channels_last, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_X, _WEIGHT, _BIAS, _GAMMA, _BETA, _RESIDUAL = range(6)  # positions in ``needs``


def output_size(size, weight, stride, padding, dilation) -> tuple[int, int]:
    """Height and width of the output; ``size`` is ``[..., H, W]``."""
    h, w = (
        (size[-2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i]
        + 1
        for i in range(2)
    )
    return h, w


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _without_autocast(t: torch.Tensor):
    return torch.autocast(t.device.type, enabled=False)


def _forward(
    x, weight, bias, gamma, beta, mean, var, residual, eps, stride, padding, dilation, groups,
    frozen, relu, bits,
):  # fmt: skip
    channels_last = has_channels_last(x)
    norm = Norm(bias, gamma, beta, mean, var, eps)
    conv = (stride, padding, dilation, groups, channels_last)
    scale = shift = None
    with _without_autocast(x):
        if frozen:
            main, shift = folded(weight, norm, x.dtype, channels_last)
        else:
            main = in_format(weight.detach(), x.dtype, channels_last)
            affine = affine_of(weight, norm, x.dtype)
            scale, shift = affine.scale, affine.shift
        # Behind a ReLU the pass over the result that applies it adds the shift for nothing.
        late = relu or scale is not None
        y = convolve(x, main, None if late else shift, *conv)
        y = y.contiguous(memory_format=_layout(channels_last))
    if relu:
        mask = relu_bits_(y, residual, channels_last, scale=scale, shift=shift, bits=bits)
        return y, mask if bits else x.new_empty(0, dtype=torch.uint8)
    if late:
        _affine_(y, scale, shift)
    if residual is not None:
        y.add_(residual)
    return y, x.new_empty(0, dtype=torch.uint8)


def _affine_(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> None:
    """``y = scale y + shift`` in place: a pass over activations is cheaper than one over a large
    weight, which would have to be scaled anew in every step.
    """
    scale = scale.view(1, -1, 1, 1)
    if shift is None:
        y.mul_(scale)
    else:
        torch.addcmul(shift.view(1, -1, 1, 1), y, scale, out=y)


def _fake(
    x, weight, bias, gamma, beta, mean, var, residual, eps, stride, padding, dilation, groups,
    frozen, relu, bits,
):  # fmt: skip
    channels_last = has_channels_last(x)
    shape = (x.shape[0], weight.shape[0], *output_size(x.shape, weight, stride, padding, dilation))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(channels_last))
    mask = bits_shape(y.shape, channels_last) if relu and bits else (0,)
    return y, x.new_empty(mask, dtype=torch.uint8)


def _backward(
    grad, x, weight, bias, gamma, beta, mean, var, y, mask, size, eps, stride, padding, dilation,
    groups, frozen, channels_last, needs,
):  # fmt: skip
    norm = Norm(bias, gamma, beta, mean, var, eps)
    out = [grad.new_empty(0)] * 6
    layout = _layout(channels_last)
    affine = None if frozen else affine_of(weight, norm, grad.dtype, backward=True)
    scale = None if affine is None else affine.scale
    wants_weight = x is not None and (needs[_WEIGHT] or needs[_GAMMA])
    # Without the scale gamma's gradient divides by nothing; with it no pass over the weight's
    # gradient is needed.
    raw = wants_weight and needs[_GAMMA] and not (affine is not None and affine.divides)
    wants_plain = needs[_RESIDUAL] or needs[_GAMMA] or needs[_BETA] or needs[_BIAS]
    if mask is not None or y is not None:
        plain, scaled = relu_bits_backward(
            grad, mask, channels_last, y=y, scale=scale, plain=wants_plain or scale is None
        )
        if needs[_RESIDUAL]:
            out[_RESIDUAL] = plain
    else:
        plain = grad.contiguous(memory_format=layout)
        scaled = None if scale is None else plain * scale.view(1, -1, 1, 1)
    scaled = plain if scaled is None else scaled.contiguous(memory_format=layout)
    total = _channel_sums(plain) if needs[_GAMMA] or needs[_BETA] or needs[_BIAS] else None
    conv = (list(stride), list(padding), list(dilation))
    with _without_autocast(grad):
        if frozen:
            main = folded(weight, norm, grad.dtype, channels_last, backward=True)[0]
        else:
            main = in_format(weight.detach(), grad.dtype, channels_last)
        if needs[_X]:
            dx = input_gradient(scaled, main, size, *conv, groups, channels_last)
            out[_X] = dx.contiguous(memory_format=layout)
        if wants_weight:
            found = torch.ops.aten.convolution_backward(
                plain if raw or frozen else scaled, x, main, None, *conv, False, [0, 0], groups,
                (False, True, False),
            )[1].to(weight.dtype)  # fmt: skip
            if needs[_GAMMA]:
                exact = None if raw or frozen else norm.scale()
                out[_GAMMA] = _gamma_gradient(found, total, weight, norm, exact)
            if needs[_WEIGHT]:
                if raw and scale is not None:
                    found = found * norm.scale().to(found.dtype).view(-1, 1, 1, 1)
                out[_WEIGHT] = found
        if needs[_BETA]:
            out[_BETA] = total.to(weight.dtype)
        if needs[_BIAS]:
            exact = norm.scale()
            out[_BIAS] = (total if exact is None else total * exact).to(weight.dtype)
    return tuple(out)


def _channel_sums(grad: torch.Tensor) -> torch.Tensor:
    """float64 ``[C]``; within an image in the dtype of ``grad``, at least float32."""
    dtype = grad.dtype if grad.dtype == torch.float64 else torch.float32
    return grad.sum((2, 3), dtype=dtype).double().sum(0)


def _gamma_gradient(found, total, weight, norm: Norm, scale: torch.Tensor | None) -> torch.Tensor:
    """``found``: the weight's gradient, times ``scale`` if given; ``total``: sums of the gradient.
    The two terms may nearly cancel: float64.
    """
    pair = found, weight.detach()
    if all(has_channels_last(t) for t in pair):  # as they lie, without a copy
        pair = tuple(t.permute(0, 2, 3, 1) for t in pair)
    rows = torch.linalg.vecdot(*(t.flatten(1) for t in pair)).double()
    if scale is not None:
        rows = rows / scale
    offset = norm.mean.double() if norm.bias is None else norm.mean.double() - norm.bias.double()
    return ((rows - offset * total) * norm.rstd()).to(weight.dtype)


def _backward_fake(
    grad, x, weight, bias, gamma, beta, mean, var, y, mask, size, eps, stride, padding, dilation,
    groups, frozen, channels_last, needs,
):  # fmt: skip
    layout = _layout(channels_last)
    out = [grad.new_empty(0) for _ in range(6)]
    if needs[_X]:
        out[_X] = torch.empty(
            tuple(size), dtype=grad.dtype, device=grad.device, memory_format=layout
        )
    for position, tensor in ((_WEIGHT, weight), (_BIAS, bias), (_GAMMA, gamma), (_BETA, beta)):
        if needs[position] and tensor is not None:
            out[position] = torch.empty_like(tensor)
    if needs[_RESIDUAL] and (mask is not None or y is not None):
        out[_RESIDUAL] = torch.empty_like(grad, memory_format=layout)
    return tuple(out)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, gamma, beta, mean, var, residual = inputs[:8]
    ctx.conv, (ctx.frozen, relu, bits) = inputs[8:13], inputs[13:]
    ctx.needs = list(ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 4, 7))
    ctx.size, ctx.channels_last = list(x.shape), has_channels_last(x)
    y, mask = output
    needs_x = ctx.needs[_WEIGHT] or ctx.needs[_GAMMA]
    ctx.save_for_backward(
        x if needs_x else None, weight, bias, gamma, beta, mean, var,
        y if relu and not bits else None, mask if relu and bits else None,
    )  # fmt: skip
    ctx.mark_non_differentiable(mask)


def _autograd(ctx, grad, _):
    return _gradients(ctx, grad, torch.ops.opentrans_kernels.folded_conv2d_backward)


def _gradients(ctx, grad, backward):
    once_differentiable("folded_conv2d")
    x, weight, bias, gamma, beta, mean, var, y, mask = ctx.saved_tensors
    found = backward(
        grad, x, weight, bias, gamma, beta, mean, var, y, mask, ctx.size, *ctx.conv, ctx.frozen,
        ctx.channels_last, ctx.needs,
    )  # fmt: skip
    residual = grad if mask is None and y is None else found[_RESIDUAL]
    dx, dweight, dbias, dgamma, dbeta, dresidual = (
        value if needed else None
        for value, needed in zip((*found[:5], residual), ctx.needs, strict=True)
    )
    return dx, dweight, dbias, dgamma, dbeta, None, None, dresidual, *[None] * 8


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, whose boxing of 16 arguments costs 0.1 ms per call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad, _):
        return _gradients(ctx, grad, _backward)


def _somebody_watches(x: torch.Tensor) -> bool:
    """Whether a compiler, a counter of operations or a kind of tensor wants to see the op."""
    tools = torch.compiler.is_compiling() or torch.jit.is_tracing() or in_dispatch_mode()
    return tools or type(x) is not torch.Tensor


for _name, _kernel, _shape in (
    ("folded_conv2d", _forward, _fake),
    ("folded_conv2d_backward", _backward, _backward_fake),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shape, lib=LIBRARY)
    flops.register_when_counting(getattr(torch.ops.opentrans_kernels, _name).default)
torch.library.register_autograd(
    f"{NAMESPACE}::folded_conv2d", _autograd, setup_context=_setup, lib=LIBRARY
)


def folded_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: Norm,
    residual: torch.Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    relu: bool = False,
    bits: bool = True,
) -> torch.Tensor:
    """``act(norm(conv(x)) + residual)``; once differentiable in every floating tensor but the
    statistics.

    Args:
        x: ``[N, Cin, H, W]``, floating; contiguous or channels_last, which the result follows.
        weight: ``[Cout, Cin / groups, kh, kw]``. If it does not require grad it counts as frozen:
            its folded copy is kept, in ``x.dtype``, until the weight is written to.
        norm: bias and batch norm, in eval mode.
        residual: the output's shape, added before the activation.
        relu: apply a ReLU. bits: keep one bit per element for it; False: keep its output.

    Raises:
        UnsupportedModelError: in backward, if a second derivative is asked for.
    """
    inputs = (x, weight, norm.bias, norm.gamma, norm.beta, residual)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    arguments = (
        x, weight, norm.bias, norm.gamma, norm.beta, norm.mean, norm.var, residual, norm.eps,
        list(stride), list(padding), list(dilation), groups, not weight.requires_grad, relu,
        bits and recorded,
    )  # fmt: skip
    if _somebody_watches(x):
        return torch.ops.opentrans_kernels.folded_conv2d(*arguments)[0]
    return (_Eager.apply if recorded else _forward)(*arguments)[0]
