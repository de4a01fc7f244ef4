"""The activations that the kernel of a convolution applies to its sums: the only list of them.

``csrc/otk.h`` has the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["NONE", "RELU", "Activation", "Kind", "activation_of"]


class Kind(IntEnum):
    """By number, as the ops take it."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    LEAKY_RELU = 3
    SILU = 4
    HARD_SWISH = 5
    GELU = 6
    GELU_TANH = 7
    QUICK_GELU = 8


@dataclass(frozen=True)
class Activation:
    """One of them. slope: of a leaky ReLU, below zero."""

    kind: int = Kind.NONE
    slope: float = 0.0

    def __post_init__(self) -> None:
        # A plain number: compilers take it for a constant of the op.
        object.__setattr__(self, "kind", int(self.kind))

    def __bool__(self) -> bool:
        return self.kind != Kind.NONE

    def __str__(self) -> str:
        name = _NAMES[Kind(self.kind)]
        return f"{name}({self.slope:g})" if self.kind == Kind.LEAKY_RELU else name

    def apply_(self, y: torch.Tensor) -> torch.Tensor:
        """By PyTorch, in place where it can."""
        if self.kind == Kind.RELU:
            return y.relu_()
        if self.kind == Kind.RELU6:
            return F.hardtanh_(y, 0.0, 6.0)
        if self.kind == Kind.LEAKY_RELU:
            return F.leaky_relu_(y, self.slope)
        if self.kind == Kind.SILU:
            return F.silu(y, inplace=True)
        if self.kind == Kind.HARD_SWISH:
            return F.hardswish(y, inplace=True)
        if self.kind in _APPROXIMATION:
            return F.gelu(y, approximate=_APPROXIMATION[self.kind])
        if self.kind == Kind.QUICK_GELU:
            return y.mul_(torch.sigmoid(_QUICK * y))
        return y

    def gradient(self, grad: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """``grad`` of the result as that of ``z``, what it was applied to."""
        aten = torch.ops.aten
        if self.kind == Kind.RELU:
            return torch.where(z <= 0, 0.0, grad)
        if self.kind == Kind.RELU6:
            return aten.hardtanh_backward(grad, z, 0.0, 6.0)
        if self.kind == Kind.LEAKY_RELU:
            return aten.leaky_relu_backward(grad, z, self.slope, False)
        if self.kind == Kind.SILU:
            return aten.silu_backward(grad, z)
        if self.kind == Kind.HARD_SWISH:
            return aten.hardswish_backward(grad, z)
        if self.kind in _APPROXIMATION:
            return aten.gelu_backward(grad, z, approximate=_APPROXIMATION[self.kind])
        if self.kind == Kind.QUICK_GELU:
            gate = torch.sigmoid(_QUICK * z)
            return grad * gate * (1 + _QUICK * z * (1 - gate))
        return grad


NONE = Activation()
RELU = Activation(Kind.RELU)
_NAMES = dict(zip(Kind, (
    "no activation", "ReLU", "ReLU6", "leaky ReLU", "SiLU", "hard-swish", "GELU", "GELU (tanh)",
    "quick GELU",
), strict=True))  # fmt: skip
#: CLIP's activation is x * sigmoid(1.702 x).
_QUICK = 1.702
_APPROXIMATION = {Kind.GELU: "none", Kind.GELU_TANH: "tanh"}
_PLAIN = {nn.ReLU: Kind.RELU, nn.SiLU: Kind.SILU, nn.Hardswish: Kind.HARD_SWISH}


def activation_of(module: nn.Module | None) -> Activation:
    """What ``module`` computes, by its exact class; ``NONE`` if it is not in the list."""
    own = type(module)
    if own in _PLAIN:
        return Activation(_PLAIN[own])
    if own is nn.LeakyReLU:
        return Activation(Kind.LEAKY_RELU, float(module.negative_slope))  # type: ignore[union-attr,arg-type]
    if own is nn.GELU:
        tanh = module.approximate == "tanh"  # type: ignore[union-attr]
        return Activation(Kind.GELU_TANH if tanh else Kind.GELU)
    if own in (nn.ReLU6, nn.Hardtanh):
        limits = (module.min_val, module.max_val)  # type: ignore[union-attr]
        return Activation(Kind.RELU6) if limits == (0, 6) else NONE
    return NONE
