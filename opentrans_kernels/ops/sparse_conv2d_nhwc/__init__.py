"""``sparse_conv2d_nhwc``: an unstructured sparse convolution for GPUs, without tensor cores.

    y = relu(conv(x, W) + bias + residual)

1x1 or 3x3, stride 1, zero padding k // 2; W holds float32 nonzeros only, whatever the activations'
dtype, and products are summed in float32. It pays where dense arithmetic has no tensor cores to
run on (strict float32) or few of them, and W is sparse enough. A product with a dropped zero is
not computed, so a NaN or Inf activation does not spread through it.

The input gradient is the operator itself with the reversed, transposed weight; weights get none.
"""

from __future__ import annotations

import torch

from ...errors import UnsupportedModelError
from ..library import once_differentiable
from ..nhwc import define_nhwc, empty_nhwc, nhwc
from .pack import SparsePack, pack
from .reference import decode
from .shapes import check

__all__ = ["SparsePack", "pack", "sparse_conv2d_nhwc"]


def _fake(x, entries, begin, slots, bias, residual, cin, kernel, chunk, relu):
    return empty_nhwc(x, *check(x, entries, begin, slots, bias, residual, cin, kernel, chunk))


def _setup(ctx, inputs, output) -> None:
    _, entries, begin, slots, bias, _, ctx.cin, ctx.kernel, ctx.chunk, relu = inputs
    ctx.save_for_backward(entries, begin, slots, bias, output if relu else None)


def _backward(ctx, grad):
    once_differentiable("sparse_conv2d_nhwc")
    entries, begin, slots, bias, y = ctx.saved_tensors
    if ctx.needs_input_grad[4]:
        raise UnsupportedModelError(
            "sparse_conv2d_nhwc: its parameters get no gradients. Detach the bias, or train with "
            "implicit_gemm_conv2d."
        )
    grad = nhwc(grad)
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, nhwc(y), 0)
    found = [None] * 10
    if ctx.needs_input_grad[0]:
        weight = decode(entries, begin, slots, ctx.cin, bias.shape[0], ctx.kernel, ctx.chunk)
        turned = pack(weight.flip(2, 3).transpose(0, 1), ctx.chunk).to(grad.device)
        zeros = torch.zeros(ctx.cin, dtype=bias.dtype, device=grad.device)
        found[0] = OP(
            grad, turned.entries, turned.begin, turned.slots, zeros, None, turned.cin,
            ctx.kernel, ctx.chunk, False,
        )  # fmt: skip
    if ctx.needs_input_grad[5]:
        found[5] = grad
    return tuple(found)


OP = define_nhwc(
    "sparse_conv2d_nhwc",
    "(Tensor x, Tensor entries, Tensor begin, Tensor slots, Tensor bias, Tensor? residual, "
    "int cin, int kernel, int chunk, bool relu) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)


def sparse_conv2d_nhwc(
    x: torch.Tensor,
    weight: SparsePack,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    relu: bool = False,
) -> torch.Tensor:
    """Convolve with a packed weight; once differentiable in ``x`` and ``residual``.

    Args:
        x: ``[N, Cin, H, W]`` float16, bfloat16 or float32; channels_last, else it is copied.
        weight: from :func:`pack`, on the device of ``x``. bias: float32 ``[Cout]``.
        residual: the output's shape, added before the ReLU. relu: clamp at zero, NaN stays NaN.

    Returns:
        ``[N, Cout, H, W]``, channels_last.

    Raises:
        BadArgument: shapes or dtypes that do not fit. KernelUnavailable: no kernel here.
    """
    return OP(
        x, weight.entries, weight.begin, weight.slots, bias, residual, weight.cin,
        weight.kernel, weight.chunk, relu,
    )  # fmt: skip
