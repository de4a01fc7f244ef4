"""Linear layers of heads: bias and activation inside the product, or packed where most are zero.

PyTorch's own linear copies the bias into the whole result before it multiplies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.sparse_linear import sparse_linear
from .packed import Packed, packed
from .parts import Found, HeadPart, prove

__all__ = ["FusedLinear", "PackedLinear", "find_below", "has_kernel", "linear", "packed_part"]

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


class PackedLinear(FusedLinear):
    """``nn.Linear`` of which most weights are zero."""

    how = "most weights are zero: packed"

    def __init__(self, original: nn.Linear, packed: Packed) -> None:
        super().__init__(original)
        self.__dict__["opentrans_packed"] = packed

    def fast(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.opentrans_packed
        return sparse_linear(x, packed.weight) if packed.serves(x) else super().fast(x)


def packed_part(path: str, layer: nn.Linear) -> Found | None:
    """A linear layer, packed; None if it is not sparse enough for that."""
    if (found := packed(path, layer)) is None:
        return None
    return _proved(path, layer, functools.partial(PackedLinear, packed=found))


def _proved(path: str, layer: nn.Linear, kind: Callable[[nn.Linear], HeadPart]) -> Found:
    return prove(
        path, KIND, layer, kind,
        lambda dtype: ((torch.randn(
            3, 5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype),), {}),
    )  # fmt: skip


def find_below(name: str, module: nn.Module) -> Iterator[Found]:
    """The linear layers that are children of ``module``."""
    for key, child in module._modules.items():
        if type(child) is not nn.Linear:
            continue
        path = f"{name}.{key}".lstrip(".")
        if (found := packed_part(path, child)) is not None:
            yield found
        elif has_kernel() and child.bias is not None:
            yield _proved(path, child, FusedLinear)
