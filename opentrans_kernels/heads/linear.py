"""Linear layers around deformable attention: bias and activation inside the product.

PyTorch's own linear copies the bias into the whole result before it multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .parts import Found, HeadPart, prove

__all__ = ["FusedLinear", "find_below", "has_kernel", "linear"]

KIND = "linear layer"


def has_kernel() -> bool:
    """Whether this torch has oneDNN's product with bias and activation."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool = False
) -> torch.Tensor:
    """``F.linear``, with a ReLU if asked for, on the parameters as they are now."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()  # which fuses it itself
    if plain or x.numel() == 0 or not torch.backends.mkldnn.enabled:
        out = F.linear(x, weight, bias)
        return out.relu() if relu else out
    act = "relu" if relu else "none"
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, act, [], "")


class FusedLinear(HeadPart):
    """``nn.Linear`` by oneDNN."""

    what, how = KIND, "bias inside the product"

    def fast(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def find_below(name: str, module: nn.Module) -> Iterator[Found]:
    """The linear layers that are children of ``module``."""
    if not has_kernel():
        return
    for key, child in module._modules.items():
        if type(child) is nn.Linear and child.bias is not None:
            yield prove(
                f"{name}.{key}".lstrip("."), KIND, child, FusedLinear,
                lambda dtype, width=child.in_features: ((torch.randn(
                    3, 5, width, generator=torch.Generator().manual_seed(0)).to(dtype),), {}),
            )  # fmt: skip
