"""``sparse_mlp``: two packed linear layers with an activation between them, as one op.

``out = act(x W1^T + b1) W2^T + b2 + residual``. The wide tensor between the layers exists for one
group of tokens at a time, in cache. Inference only: differentiate through two
:func:`sparse_linear` instead. Results are those of the two, bit for bit.
"""

from __future__ import annotations

import torch

from ...activations import NONE, Activation
from ...errors import UnsupportedModelError
from ...pack import SparseWeight
from ..arguments import tokens
from ..library import define, kernel_for

__all__ = ["sparse_mlp"]

_NAME = "sparse_mlp"


def _fake(
    x, structure1, values1, bias1, structure2, values2, bias2, residual, cout, activation=0,
    slope=0.0,
):  # fmt: skip
    return x.new_empty((*tokens(_NAME, x)[:-1], cout))


def _backward(ctx, grad):
    raise UnsupportedModelError(
        "sparse_mlp is an inference kernel without gradients. Run it under torch.no_grad(), or "
        "chain sparse_linear calls, which are differentiable."
    )


OP = define(
    _NAME,
    "(Tensor x, Tensor structure1, Tensor values1, Tensor? bias1, Tensor structure2, "
    "Tensor values2, Tensor? bias2, Tensor? residual, int cout, int activation=0, "
    "float slope=0.0) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:sparse_mlp",
    backward=_backward,
)


def sparse_mlp(
    x: torch.Tensor,
    first: SparseWeight,
    second: SparseWeight,
    activation: Activation = NONE,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply two packed linear layers; see :func:`sparse_linear` for their form.

    Args:
        x: ``[..., in]``. residual: ``[..., out]``, added last.
        activation: between the layers.

    Returns:
        ``[..., out]``, contiguous.

    Raises:
        KernelUnavailable: no kernel for this device and dtype.
        UnsupportedModelError: a gradient was asked for.
        RuntimeError: shapes or dtypes that do not fit, or a packed convolution with a window.
    """
    return kernel_for(_NAME, x)(
        x, first.structure, first.values, first.bias, second.structure, second.values, second.bias,
        residual, second.cout, activation.kind, activation.slope,
    )  # fmt: skip
