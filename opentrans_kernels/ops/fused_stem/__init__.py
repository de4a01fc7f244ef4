"""``fused_stem``: the first two convolutions of a CLIP ResNet's stem in one launch.

    y = relu(conv3x3(relu(conv3x3_stride2(x, W1) + b1), W2) + b2)

The stem's third convolution with its pool is ``implicit_gemm_conv2d(..., pool=2)``.
"""

from __future__ import annotations

import torch

from ..library import once_differentiable
from ..nhwc import define_nhwc, empty_nhwc
from . import reference
from .shapes import check

__all__ = ["fused_stem"]


def _fake(x, weight1, bias1, weight2, bias2, tf32, config=()):
    return empty_nhwc(x, *check(x, weight1, bias1, weight2, bias2, config))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx, grad):
    """Runs both convolutions again, one by one, and differentiates those."""
    once_differentiable("fused_stem")
    leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
    with torch.enable_grad():
        y = reference.fused_stem(*leaves, False)
    return *torch.autograd.grad(y, leaves, grad), None, None


OP = define_nhwc(
    "fused_stem",
    "(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, bool tf32, "
    "int[] config=[]) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)


def fused_stem(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    *,
    tf32: bool = False,
    config: tuple[int, ...] = (),
) -> torch.Tensor:
    """The module's formula; once differentiable in every tensor.

    Args:
        x: ``[N, 3, H, W]``, channels_last, else it is copied.
        weight1, weight2: ``[9, 3, C1]`` and ``[9, C1, C2]`` from ``pack_weight``, in ``x.dtype``,
            at most 64 wide; biases float32.
        config: (pixels, warps, stages) of the Triton tile; empty: the default.

    Returns:
        ``[N, C2, ceil(H / 2), ceil(W / 2)]``, channels_last.

    Raises:
        BadArgument: shapes or dtypes that do not fit. KernelUnavailable: no kernel here.
    """
    return OP(x, weight1, bias1, weight2, bias2, tf32, list(config))
