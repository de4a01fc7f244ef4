"""Every replaced part against the masked dense part, at its own output.

The bound is twice the error that the dense part itself makes in float32, both against the same part
in float64 on the same input. At the end of a network a wrong layer may drown in what follows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import OpenTransError, UnsupportedModelError
from ..plan.build import Builder, Built, dense_call
from ..plan.choose import Choice
from ..plan.layers import LinearUnit, require_own_weight
from ..plan.models import refresh_pruned
from ..plan.reading import PLANAR
from ..plan.subject import PlanSubject, Unit

__all__ = ["PartError", "check_parts", "same_pool"]

#: No error below a few roundings of the largest output is a defect.
FLOOR = 8 * torch.finfo(torch.float32).eps
#: Pixels of a side to check at: every pixel is the same arithmetic, and float64 is slow.
_SIDE = 20
#: Tokens to check at, likewise.
_TOKENS = 50


@dataclass(frozen=True)
class PartError:
    """Errors of one part against float64, relative to its largest output.

    error: as replaced; dense_error: of the masked dense part in float32.
    """

    name: str
    error: float
    dense_error: float

    @property
    def bound(self) -> float:
        if not math.isfinite(self.dense_error):
            return math.inf  # the dense layer overflows on noise; nothing can be said
        return max(2 * self.dense_error, FLOOR)

    @property
    def exact(self) -> bool:
        return self.error <= self.bound  # NaN is not

    def __str__(self) -> str:
        return f"{self.name}: {self.error:.1e} against float64, the dense layer's own: " + (
            f"{self.dense_error:.1e}"
        )


def check_parts(
    subject: PlanSubject, choices: Mapping[str, Choice], builder: Builder
) -> tuple[dict[str, Choice], list[PartError]]:
    """The choices whose replacements are exact, and the errors of those.

    A part that is not falls back to the dense arithmetic with the mask applied, or stays as it is.

    Raises UnsupportedModelError, naming the part, where its mask must be applied and no form does.
    """
    checked: dict[str, Choice] = {}
    errors: list[PartError] = []
    for unit in subject.units:
        choice = choices[unit.name]
        checked[unit.name] = choice
        if choice.built is None:
            continue
        reference = _reference(subject, unit)
        if isinstance(reference, str):
            checked[unit.name] = _kept(unit, choice, reference)
            continue
        found = reference.error(choice.built)
        if not found.exact and choice.kind in PLANAR and unit.must_mask:
            built = builder.build(unit, "compact")
            builder.release()
            reason = f"compact: as {choice.kind} it differs from the masked dense layer ({found})"
            choice, found = Choice("compact", reason, built, choice.ms), reference.error(built)
        if found.exact:
            errors.append(found)
        else:
            choice = _kept(unit, choice, f"a replacement would differ ({found})")
        checked[unit.name] = choice
    return checked, errors


def same_pool(original: nn.Module, new: nn.Module, channels: int) -> bool:
    """Whether a pool's replacement gives the original's output to rounding."""
    window = original.kernel_size
    side = _SIDE + 1 + (window if isinstance(window, int) else max(window))
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, found = original(x), new(x)
    return want.shape == found.shape and bool((found - want).abs().max() <= FLOOR * x.abs().max())


def _kept(unit: Unit | LinearUnit, choice: Choice, why: str) -> Choice:
    if unit.must_mask:
        raise UnsupportedModelError(
            f"{unit.name} cannot be replaced: {why}. Its module computes something else than its "
            "tensors say, or its numbers cancel; and its mask is not in the weights, so it cannot "
            "stay as it is either. Nothing was changed. Leave this mask out, or multiply it into "
            "the weights first (MaskSet.apply_)."
        )
    return Choice("dense", f"dense: {why}", None, choice.ms)


def _reference(subject: PlanSubject, unit: Unit | LinearUnit) -> _Reference | str:
    """What to compare with, or why there is nothing."""
    try:
        return _Reference(subject, unit)
    except OpenTransError:
        raise
    except Exception as error:  # code of the model's own modules
        return f"it cannot be run in float64 to be checked ({type(error).__name__}: {error})"


class _Reference:
    """The masked dense unit on one input, in float64 and in float32."""

    def __init__(self, subject: PlanSubject, unit: Unit | LinearUnit) -> None:
        self.unit = unit
        call = dense_call(unit)
        self.x = _input(subject, unit)
        for layer in unit.layers if unit.must_mask else ():
            if layer.name in subject.masks:
                require_own_weight(layer)
        tensors = _tensors(call)
        for path, mask in _masks(subject, unit).items():
            tensors[path] = tensors[path].detach() * mask
        with torch.no_grad():
            try:
                self.exact = _run(call, {k: _wide(t) for k, t in tensors.items()}, self.x.double())
            finally:
                refresh_pruned(call)  # or the weight in float64 would stay behind
            self.scale = max(float(self.exact.abs().max()), torch.finfo(torch.float32).tiny)
            self.own = self._worst(_run(call, tensors, self.x.clone()))

    def error(self, built: Built) -> PartError:
        with torch.no_grad():
            found = built.call(self.x.clone())
        return PartError(self.unit.name, self._worst(found), self.own)

    def _worst(self, found: torch.Tensor) -> float:
        if found.shape != self.exact.shape:
            return float("nan")
        return float((found.double() - self.exact).abs().max()) / self.scale


def _run(module: nn.Module, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(module, tensors, (x,), tie_weights=False)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every path of theirs, but each module once."""
    return {
        f"{path}.{key}".lstrip("."): tensor
        for path, part in module.named_modules()
        for key, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    }


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def _masks(subject: PlanSubject, unit: Unit | LinearUnit) -> dict[str, torch.Tensor]:
    """Name of a weight inside the dense unit -> mask, where it is not in the weight."""
    if not unit.must_mask:
        return {}
    return {
        layer.below: subject.masks[layer.name]
        for layer in unit.layers
        if layer.name in subject.masks
    }


def _input(subject: PlanSubject, unit: Unit | LinearUnit) -> torch.Tensor:
    """One image's worth of what may reach the unit, at most a small piece of it."""
    if isinstance(unit, LinearUnit):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, _TOKENS, unit.layers[0].cin, generator=generator)
    conv = unit.convs[0].conv
    least = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    shape = subject.shapes.get(unit.convs[0].name)
    whole = (_SIDE, _SIDE) if shape is None else (shape.h_in, shape.w_in)
    height, width = (
        max(min(side, _SIDE + edge), edge) for side, edge in zip(whole, least, strict=True)
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, conv.in_channels, height, width, generator=generator)
    return x if unit.role == "stem" else x.relu_()
