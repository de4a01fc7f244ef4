"""The folded weight of a convolution with an eval-mode batch norm, and its input gradient.

Folded copies of frozen weights are kept as long as the weight lives and made again when the version
counter of a tensor they came from has moved (``load_state_dict``, an optimizer step). They are
found by the weight itself, so a compiled graph, which knows the weight only, finds them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ...errors import PlanError

__all__ = ["Norm", "folded", "folded_bytes", "in_format", "input_gradient", "source_of"]

_FOLDED = WeakTensorKeyDictionary()  # weight -> {(dtype, channels_last): _Folded}


@dataclass(frozen=True)
class Norm:
    """The tensors of an eval-mode batch norm, each None if it has none, and the bias before it."""

    bias: torch.Tensor | None
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    mean: torch.Tensor | None
    var: torch.Tensor | None
    eps: float

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.bias, self.gamma, self.beta, self.mean, self.var

    def rstd(self) -> torch.Tensor:
        """float64 ``[C]``: 1 / sqrt(var + eps)."""
        if self.var is None:
            raise PlanError(
                "a gradient of gamma was asked for, but the convolution has no batch norm. Pass "
                "mean and var, or gamma=None."
            )
        return (self.var.detach().double() + self.eps).rsqrt()

    def scale(self) -> torch.Tensor | None:
        """float64 ``[C]`` that multiplies the convolution; None without a norm."""
        if self.var is None:
            return None
        rstd = self.rstd()
        return rstd if self.gamma is None else rstd * self.gamma.detach().double()

    def shift(self, scale: torch.Tensor | None) -> torch.Tensor | None:
        """float64 ``[C]`` that is added; None if nothing is."""
        bias = None if self.bias is None else self.bias.detach().double()
        if scale is None or self.mean is None:
            return bias
        shift = -self.mean.detach().double() if bias is None else bias - self.mean.detach().double()
        shift = shift * scale
        return shift if self.beta is None else shift + self.beta.detach().double()


@dataclass
class _Folded:
    """Folded tensors, and what they were made from."""

    source: tuple[Any, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None

    def nbytes(self) -> int:
        parts = (self.weight, self.bias)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def source_of(weight: torch.Tensor, norm: Norm) -> tuple[Any, ...]:
    """Changes whenever a tensor is written to, replaced or moved."""
    parts = []
    for t in (weight, *norm.tensors()):
        if t is not None:
            # Inference tensors have no counter, and cannot be written to outside inference mode.
            parts.append((t.data_ptr(), -1 if t.is_inference() else t._version, t.device))
    return (*parts, norm.eps)


def in_format(t: torch.Tensor, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    """``t`` in ``dtype`` and in one of the two layouts."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return t.to(dtype).contiguous(memory_format=layout)


def folded(
    weight: torch.Tensor, norm: Norm, dtype: torch.dtype, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias, in ``dtype``, of the convolution that includes the norm.

    Folded in float64, rounded once, and kept for the next call.
    """
    entries = _FOLDED.setdefault(weight, {})
    source = source_of(weight, norm)
    entry = entries.get((dtype, channels_last))
    if entry is None or entry.source != source:
        scale = norm.scale()
        shift = norm.shift(scale)
        exact = weight.detach()
        if scale is not None:
            exact = exact.double() * scale.view(-1, 1, 1, 1)
        entry = _Folded(
            source,
            in_format(exact, dtype, channels_last),
            None if shift is None else shift.to(dtype),
        )
        entries[dtype, channels_last] = entry
    return entry.weight, entry.bias


def folded_bytes(weight: torch.Tensor) -> int:
    """Bytes of the copies kept for a frozen weight."""
    return sum(entry.nbytes() for entry in _FOLDED.get(weight, {}).values())


def input_gradient(
    grad: torch.Tensor,
    weight: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> torch.Tensor:
    """Gradient ``size`` = [N, Cin, H, W] of a convolution's input, which is not read."""
    kernel = weight.shape[2:]
    pointwise = (*kernel, *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1)
    if pointwise and channels_last:
        return F.conv2d(grad, weight.transpose(0, 1))
    if pointwise and grad.numel():
        # The transposed matrix as it lies: no copy of the weight, which is large where planes are
        # small.
        matrix = weight.flatten(1).t()
        return torch.matmul(matrix, grad.contiguous().flatten(2)).view(tuple(size))
    # The rows and columns behind the last window.
    rest = [
        size[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i]
                       + dilation[i] * (kernel[i] - 1) + 1)
        for i in range(2)
    ]  # fmt: skip
    return F.conv_transpose2d(grad, weight, None, stride, padding, rest, groups, dilation)
