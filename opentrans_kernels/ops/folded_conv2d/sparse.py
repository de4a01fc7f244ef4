"""``sparse_folded_conv2d``: as ``folded_conv2d``, on the sparse kernels in all three passes.

The dense weight stays the parameter. Its live values are gathered, scaled by the norm and kept
until what they came from is written to: forward looks at the bits of a weight that stays as it is,
and gathers again, without looking, while it keeps changing. The gradient has the dense shape and is
zero outside the mask. The input gradient is the forward kernel on the mirrored pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ... import flops
from ...pack import packed_indices, transposed_structure, version_of
from ..arguments import BadArgument, conv_size, packed_header
from ..contents import Source
from ..library import LIBRARY, NAMESPACE, kernel_for, once_differentiable, plane_padded
from ..relu_bits import bits_shape, relu_bits_, relu_bits_backward
from .fold import Norm

__all__ = ["packed_bytes", "sparse_folded_conv2d"]

_NORM = "Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, float eps"
_CONV = "int stride, int padding, bool sparse_wgrad, int nnz"
LIBRARY.define(
    f"sparse_folded_conv2d(Tensor x, Tensor weight, Tensor structure, {_NORM}, Tensor? residual, "
    f"{_CONV}, bool relu, bool bits) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "sparse_folded_conv2d_backward(Tensor grad, Tensor? x, Tensor weight, Tensor structure, "
    f"{_NORM}, Tensor? y, Tensor? mask, int[] size, {_CONV}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_X, _WEIGHT, _BIAS, _GAMMA, _BETA, _RESIDUAL = range(6)  # positions in ``needs``


@dataclass(frozen=True)
class _Pattern:
    """Where the live weights are. index: into the dense weight; rows: output channel of each.

    mirrored, order: the structure of the input gradient and the order of the values in it.
    """

    version: int
    index: torch.Tensor
    rows: torch.Tensor
    mirrored: torch.Tensor
    order: torch.Tensor


@dataclass
class _Packed:
    """Folded values in both orders, and what they were made from."""

    source: Source
    values: torch.Tensor
    bias: torch.Tensor | None
    mirrored: torch.Tensor | None = None


_PATTERNS = WeakTensorKeyDictionary()  # structure -> _Pattern
_PACKED = WeakTensorKeyDictionary()  # weight -> _Packed


def _pattern(structure: torch.Tensor) -> _Pattern:
    found, version = _PATTERNS.get(structure), version_of(structure)
    if found is None or found.version != version:
        header = packed_header("sparse_folded_conv2d", structure)
        index = packed_indices(structure)
        rows = torch.div(index, header.cin * header.kernel**2, rounding_mode="floor")
        mirrored = transposed_structure(structure)
        found = _PATTERNS[structure] = _Pattern(version, index, rows, *mirrored)
    return found


def _packed(
    weight: torch.Tensor, structure: torch.Tensor, norm: Norm, *, backward: bool = False
) -> _Packed:
    parts = (structure, weight, *norm.tensors(), norm.eps)
    entry = _PACKED.get(weight)
    if entry is not None and (
        entry.source.unmoved(*parts) if backward else entry.source.still(*parts)
    ):
        return entry
    cin, cout, kernel = packed_header("sparse_folded_conv2d", structure)[:3]
    if weight.shape != (cout, cin, kernel, kernel):
        raise BadArgument(
            f"sparse_folded_conv2d: the weight is {list(weight.shape)}, but the structure was made "
            f"of a mask {[cout, cin, kernel, kernel]}."
        )
    pattern = _pattern(structure)
    scale = norm.scale()
    shift = norm.shift(scale)
    values = weight.detach().flatten().take(pattern.index)
    if scale is not None:
        # A frozen layer's norm is folded in float64 and rounded once, as elsewhere.
        values = (values.double() * scale.take(pattern.rows)).float()
    # Of a weight that trains no bits are summed up only to find them changed in the next step.
    kept = entry is None or torch.equal(values, entry.values)
    entry = _PACKED[weight] = _Packed(
        Source(*parts, kept=kept), values, None if shift is None else shift.float()
    )
    return entry


def packed_bytes(weight: torch.Tensor, structure: torch.Tensor) -> int:
    """Bytes kept for a layer: pattern and values, both ways."""
    tensors: list[torch.Tensor | None] = [structure]
    if (pattern := _PATTERNS.get(structure)) is not None:
        tensors += [pattern.index, pattern.rows, pattern.mirrored, pattern.order]
    if (packed := _PACKED.get(weight)) is not None:
        tensors += [packed.values, packed.bias, packed.mirrored]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _convolve(x, structure, values, bias, residual, cout, kernel, stride, padding, relu):
    return kernel_for("sparse_conv2d", x)(
        x, structure, values, bias, residual, cout, kernel, stride, padding, relu
    )


def _forward(
    x, weight, structure, bias, gamma, beta, mean, var, eps, residual, stride, padding,
    sparse_wgrad, nnz, relu, bits,
):  # fmt: skip
    packed = _packed(weight, structure, Norm(bias, gamma, beta, mean, var, eps))
    cout, _, kernel, _ = weight.shape
    y = _convolve(
        x, structure, packed.values, packed.bias, residual, cout, kernel, stride, padding,
        relu and not bits,
    )  # fmt: skip
    if relu and bits:
        return y, relu_bits_(y, None, False)
    return y, x.new_empty(0, dtype=torch.uint8)


def _fake(
    x, weight, structure, bias, gamma, beta, mean, var, eps, residual, stride, padding,
    sparse_wgrad, nnz, relu, bits,
):  # fmt: skip
    size = conv_size(x.shape, weight.shape[2], stride, padding)
    y = plane_padded(x, x.shape[0], weight.shape[0], *size)
    mask = bits_shape(y.shape, False) if relu and bits else (0,)
    return y, x.new_empty(mask, dtype=torch.uint8)


def _input_gradient(grad, weight, structure, packed, size, stride, padding):
    kernel = weight.shape[2]
    inner = kernel - 1 - padding
    if stride != 1 or inner < 0:
        return torch.ops.opentrans_kernels.sparse_conv2d_dgrad(
            grad, structure, packed.values, size[1], size[2], size[3], stride, padding
        )
    pattern = _pattern(structure)
    if packed.mirrored is None:
        packed.mirrored = packed.values.take(pattern.order)
    return _convolve(
        grad, pattern.mirrored, packed.mirrored, None, None, size[1], kernel, 1, inner, False
    )


def _value_gradients(x, grad, weight, structure, packed, stride, padding, sparse):
    """Gradient of the live values without the norm's scale, in packed order."""
    if sparse:
        kernel = kernel_for("sparse_conv2d_wgrad", x)
        return kernel(x, grad, structure, packed.values)
    dense = torch.ops.aten.convolution_backward(
        grad, x, weight.detach(), None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1,
        (False, True, False),
    )[1]  # fmt: skip
    return dense.flatten().take(_pattern(structure).index)


def _backward(
    grad, x, weight, structure, bias, gamma, beta, mean, var, eps, y, mask, size, stride, padding,
    sparse_wgrad, nnz, needs,
):  # fmt: skip
    norm = Norm(bias, gamma, beta, mean, var, eps)
    packed = _packed(weight, structure, norm, backward=True)
    out = [grad.new_empty(0)] * 6
    if mask is not None or y is not None:
        grad = out[_RESIDUAL] = relu_bits_backward(grad, mask, False, y=y)[0]
    if needs[_X]:
        out[_X] = _input_gradient(grad, weight, structure, packed, size, stride, padding)
    pattern = _pattern(structure)
    scale = norm.scale()
    if x is not None and (needs[_WEIGHT] or needs[_GAMMA]):
        raw = _value_gradients(x, grad, weight, structure, packed, stride, padding, sparse_wgrad)
        if needs[_GAMMA]:
            live = weight.detach().flatten().take(pattern.index)
            rows = torch.zeros(weight.shape[0], dtype=torch.float64)
            rows.index_add_(0, pattern.rows, (raw * live).double())
            offset = mean.double() if bias is None else mean.double() - bias.double()
            rows -= offset * grad.sum((0, 2, 3), dtype=torch.float64)
            out[_GAMMA] = (rows * norm.rstd()).to(weight.dtype)
        if needs[_WEIGHT]:
            if scale is not None:
                raw = raw * scale.float().take(pattern.rows)
            dense = torch.zeros(weight.numel(), dtype=weight.dtype)
            out[_WEIGHT] = dense.put_(pattern.index, raw).view(weight.shape)
    if needs[_BETA] or needs[_BIAS]:
        total = grad.sum((0, 2, 3))
        if needs[_BETA]:
            out[_BETA] = total
        if needs[_BIAS]:
            out[_BIAS] = total.clone() if scale is None else total * scale.to(total.dtype)
    return tuple(out)


def _backward_fake(
    grad, x, weight, structure, bias, gamma, beta, mean, var, eps, y, mask, size, stride, padding,
    sparse_wgrad, nnz, needs,
):  # fmt: skip
    out = [grad.new_empty(0) for _ in range(6)]
    if needs[_X]:
        out[_X] = plane_padded(grad, *size)
    for position, tensor in ((_WEIGHT, weight), (_BIAS, bias), (_GAMMA, gamma), (_BETA, beta)):
        if needs[position] and tensor is not None:
            out[position] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    if mask is not None or y is not None:
        out[_RESIDUAL] = torch.empty_like(grad)
    return tuple(out)


def _setup(ctx, inputs, output) -> None:
    x, weight, structure, bias, gamma, beta, mean, var, ctx.eps, _ = inputs[:10]
    ctx.conv, (relu, bits) = inputs[10:14], inputs[14:]
    ctx.needs = list(ctx.needs_input_grad[i] for i in (0, 1, 3, 4, 5, 9))
    ctx.size = list(x.shape)
    y, mask = output
    ctx.save_for_backward(
        x if ctx.needs[_WEIGHT] or ctx.needs[_GAMMA] else None, weight, structure, bias, gamma,
        beta, mean, var, y if relu and not bits else None, mask if relu and bits else None,
    )  # fmt: skip
    ctx.mark_non_differentiable(mask)


def _autograd(ctx, grad, _):
    once_differentiable("sparse_folded_conv2d")
    x, weight, structure, bias, gamma, beta, mean, var, y, mask = ctx.saved_tensors
    found = torch.ops.opentrans_kernels.sparse_folded_conv2d_backward(
        grad, x, weight, structure, bias, gamma, beta, mean, var, ctx.eps, y, mask, ctx.size,
        *ctx.conv, ctx.needs,
    )  # fmt: skip
    residual = grad if mask is None and y is None else found[_RESIDUAL]
    dx, dweight, dbias, dgamma, dbeta, dresidual = (
        value if needed else None
        for value, needed in zip((*found[:5], residual), ctx.needs, strict=True)
    )
    return dx, dweight, None, dbias, dgamma, dbeta, None, None, None, dresidual, *[None] * 6


for _name, _kernel, _shape in (
    ("sparse_folded_conv2d", _forward, _fake),
    ("sparse_folded_conv2d_backward", _backward, _backward_fake),
):
    LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shape, lib=LIBRARY)
    flops.register_when_counting(getattr(torch.ops.opentrans_kernels, _name).default)
torch.library.register_autograd(
    f"{NAMESPACE}::sparse_folded_conv2d", _autograd, setup_context=_setup, lib=LIBRARY
)


def sparse_folded_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    structure: torch.Tensor,
    norm: Norm,
    residual: torch.Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    relu: bool = False,
    bits: bool = True,
    sparse_wgrad: bool = True,
    nnz: int = 0,
) -> torch.Tensor:
    """``act(norm(conv(x, mask * weight)) + residual)``, float32 on the CPU.

    Args:
        x: ``[N, Cin, H, W]``, any strides.
        weight: dense ``[Cout, Cin, k, k]``; what lies outside the pattern is not read.
        structure: of the mask, from ``SparseWeight.from_dense(mask)``; stride and padding are its
            own and repeated here.
        sparse_wgrad: compute the weight gradient at live weights only; False: densely, and gather.
        nnz: live weights, for FLOP counters; they see shapes only.
        norm, residual, relu, bits: as for ``folded_conv2d``.

    Returns:
        ``[N, Cout, H', W']`` with dense rows and padded planes.
    """
    inputs = (x, weight, norm.bias, norm.gamma, norm.beta, residual)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return torch.ops.opentrans_kernels.sparse_folded_conv2d(
        x, weight, structure, norm.bias, norm.gamma, norm.beta, norm.mean, norm.var, norm.eps,
        residual, stride, padding, sparse_wgrad, nnz, relu, bits and recorded,
    )[0]  # fmt: skip
