"""The folded weight of a convolution with an eval-mode batch norm, or its scale and shift.

Folded copies of frozen weights are kept as long as the weight lives. Every forward holds them
against the bits of what they came from and folds again what was written to, by whatever means;
backward uses what its forward folded. They are found by the weight itself, so a compiled graph,
which knows the weight only, finds them too. On other devices than the CPU, where looking at the
bits would wait for the device, every forward folds anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...errors import PlanError
from ..contents import Source

__all__ = ["Affine", "Norm", "affine_of", "folded", "folded_bytes", "in_format"]

_FOLDED = WeakTensorKeyDictionary()  # weight -> {(dtype, channels_last): _Folded}
_AFFINE = WeakTensorKeyDictionary()  # weight -> {dtype: Affine}


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

    source: Source
    weight: torch.Tensor
    bias: torch.Tensor | None

    def nbytes(self) -> int:
        parts = (self.weight, self.bias)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


@dataclass
class Affine:
    """Scale and shift ``[C]`` of a norm in the dtype of the activations, and their source.

    divides: no scale is so small that a gradient divided by it loses its digits.
    """

    source: Source | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    divides: bool


def affine_of(
    weight: torch.Tensor, norm: Norm, dtype: torch.dtype, *, backward: bool = False
) -> Affine:
    """Scale and shift of the norm behind ``weight``; computed in float64 and rounded once.

    Those of a norm that does not train are kept until it is written to. One that trains is read
    anew, because it is written to in every step.
    """
    if any(t is not None and t.requires_grad for t in norm.tensors()):
        return _affine(norm, dtype, None)
    entries = _AFFINE.setdefault(weight, {})
    parts = (*norm.tensors(), norm.eps)
    entry = entries.get(dtype)
    if entry is None or not _current(entry.source, parts, backward):
        entry = entries[dtype] = _affine(norm, dtype, Source(*parts))
    return entry


def _current(
    source: Source | None, parts: tuple[torch.Tensor | float | None, ...], backward: bool
) -> bool:
    """Whether what was made from ``parts`` serves. Backward follows a forward that read them."""
    return source is not None and (source.unmoved(*parts) if backward else source.still(*parts))


def _affine(norm: Norm, dtype: torch.dtype, source: Source | None) -> Affine:
    scale = norm.scale()
    shift = norm.shift(scale)
    # Elsewhere than on the CPU the question would wait for the device.
    divides = scale is not None and scale.device.type == "cpu"
    return Affine(
        source,
        None if scale is None else scale.to(dtype),
        None if shift is None else shift.to(dtype),
        divides and bool(scale.abs().min() > 1e-12),  # type: ignore[union-attr]
    )


def in_format(t: torch.Tensor, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    """``t`` in ``dtype`` and in one of the two layouts."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return t.to(dtype).contiguous(memory_format=layout)


def folded(
    weight: torch.Tensor, norm: Norm, dtype: torch.dtype, channels_last: bool, *,
    backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Weight and bias, in ``dtype``, of the convolution that includes the norm.

    Folded in float64, rounded once, and kept for the next call.
    """
    entries = _FOLDED.setdefault(weight, {})
    parts = (weight, *norm.tensors(), norm.eps)
    entry = entries.get((dtype, channels_last))
    if entry is None or not _current(entry.source, parts, backward):
        scale = norm.scale()
        shift = norm.shift(scale)
        exact = weight.detach()
        if scale is not None:
            exact = exact.double() * scale.view(-1, 1, 1, 1)
        entry = _Folded(
            Source(*parts),
            in_format(exact, dtype, channels_last),
            None if shift is None else shift.to(dtype),
        )
        entries[dtype, channels_last] = entry
    return entry.weight, entry.bias


def folded_bytes(weight: torch.Tensor) -> int:
    """Bytes of the copies kept for a frozen weight."""
    return sum(entry.nbytes() for entry in _FOLDED.get(weight, {}).values())
