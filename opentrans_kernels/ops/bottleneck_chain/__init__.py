"""``bottleneck_chain``: the tail of one bottleneck and the head of the next, in one launch.

    u = relu(conv3x3(x, W2) + b2)
    y = relu(conv1x1(u, W3) + b3 + residual)          the block's output
    v = relu(conv1x1(y, W1) + b1)                     conv1 of the next block

``u`` never leaves the chip and ``y`` is written but not read back: 10 instead of 16 times the inner
width's bytes per pixel. ``u`` and ``y`` are rounded to the activations' dtype before the next
product, as in a dense network.
"""

from __future__ import annotations

import torch

from ..implicit_gemm_conv2d import implicit_gemm_conv2d
from ..nhwc import define_nhwc, empty_nhwc
from .shapes import check

__all__ = ["bottleneck_chain"]


def _fake(x, weight2, bias2, weight3, bias3, residual, weight1, bias1, tf32, config=()):
    out, after = check(x, weight2, bias2, weight3, bias3, residual, weight1, bias1, config)
    return empty_nhwc(x, *out), empty_nhwc(x, *after)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.tf32 = inputs[:9]
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y, grad_after):
    """Runs the three convolutions again, one by one, and differentiates those."""
    leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
    x, weight2, bias2, weight3, bias3, residual, weight1, bias1 = leaves
    with torch.enable_grad():
        u = implicit_gemm_conv2d(x, weight2, bias2, relu=True, tf32=ctx.tf32)
        y = implicit_gemm_conv2d(u, weight3, bias3, None, residual, relu=True, tf32=ctx.tf32)
        v = implicit_gemm_conv2d(y, weight1, bias1, relu=True, tf32=ctx.tf32)
    with torch.no_grad():
        found = torch.autograd.grad((y, v), leaves, (grad_y, grad_after))
    return *found, None, None


OP = define_nhwc(
    "bottleneck_chain",
    "(Tensor x, Tensor weight2, Tensor bias2, Tensor weight3, Tensor bias3, Tensor residual, "
    "Tensor weight1, Tensor bias1, bool tf32, int[] config=[]) -> (Tensor, Tensor)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)


def bottleneck_chain(
    x: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    weight3: torch.Tensor,
    bias3: torch.Tensor,
    residual: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    *,
    tf32: bool = False,
    config: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """The module's formulas; once differentiable in every floating tensor.

    Args:
        x: ``[N, C, H, W]``, conv1's output; float16 or bfloat16 on CUDA, any in the reference.
        weight2, weight3, weight1: ``[9, C, C2]``, ``[1, C2, C3]``, ``[1, C3, C1]`` from
            ``pack_weight``, in ``x.dtype``; biases float32. On CUDA C is a multiple of 16, C3 of
            64, and C2 and C1 at most 256.
        residual: ``[N, C3, H, W]``.
        config: (pixels, chunk, K, warps, stages) of the Triton tile; empty: chosen by shape.

    Returns:
        y ``[N, C3, H, W]`` and v ``[N, C1, H, W]``, channels_last.

    Raises:
        BadArgument: shapes or dtypes that do not fit. KernelUnavailable: no kernel here.
    """
    return OP(
        x, weight2, bias2, weight3, bias3, residual, weight1, bias1, tf32, list(config)
    )  # fmt: skip
