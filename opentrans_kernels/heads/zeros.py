"""Layers of a head that no larger part computes, with their weights in another form.

Anywhere in a head: layers most of whose weights are zero. Convolutions with a window and 1x1
convolutions give planes, linear layers tokens. Dilated convolutions, whose taps read padding where
the map is small. Beside deformable encoders: 3x3 convolutions, dense ones by Winograd's method.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..nn import Replacement
from ..topology.blocks import unusual_window
from ..topology.naming import naming_of_root
from .linear import packed_part
from .packed import DENSEST, Copied, Transformed, packed, transformable, weight_of
from .parts import Found, HeadPart, prove
from .pointwise import beside_encoders
from .taps import trimmed

__all__ = ["CopiedConv", "PackedConv", "TrimmedConv", "WinogradConv", "find", "find_smooth"]

KIND = "convolution"


class CopiedConv(HeadPart):
    """A convolution, and its ``norm`` and ``activation`` where it has them (detectron2)."""

    what = KIND

    def __init__(self, original: nn.Conv2d, copied: Copied) -> None:
        super().__init__(original)
        self.__dict__["opentrans_copied"] = copied

    def fast(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or not x.numel() or not self.opentrans_copied.serves(x):
            return self.as_it_was(x)
        out = self.opentrans_copied.convolve(x)
        norm, activation = self._modules.get("norm"), getattr(self, "activation", None)
        out = out if norm is None else norm(out)
        return out if activation is None else activation(out)


class PackedConv(CopiedConv):
    how = "most weights are zero: packed"


class WinogradConv(CopiedConv):
    how = "16 products for 36 (Winograd)"


class TrimmedConv(CopiedConv):
    how = "on small maps without the taps that read padding"


def find_smooth(model: nn.Module) -> Iterator[Found]:
    """Dense 3x3 convolutions beside deformable encoders: those of a feature pyramid."""
    for name, conv in beside_encoders(model).items():
        if transformable(conv):
            kind = functools.partial(WinogradConv, copied=Transformed(name, conv))
            yield prove(name, KIND, conv, kind, lambda dtype, c=conv: _noise(c, dtype))


def find(model: nn.Module) -> Iterator[Found]:
    """Every linear layer and convolution outside of what was replaced, if it is sparse enough."""
    done: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(path) for path in done):
            continue
        if isinstance(module, Replacement) or naming_of_root(module) is not None:
            done.append(f"{name}." if name else "")  # what is in it is no part of a head
        elif type(module) is nn.Linear:
            if name and (found := packed_part(name, module)) is not None:
                yield found
        elif isinstance(module, nn.Conv2d) and name:
            yield from _conv(name, module)


def _conv(name: str, conv: nn.Conv2d) -> Iterator[Found]:
    if (why := unusual_window(conv)) is not None:
        weight = weight_of(conv)
        if weight is not None and int(torch.count_nonzero(weight)) <= DENSEST * weight.numel():
            yield Found(name, KIND, None, f"most of its weights are zero, but it {why}: dense")
    elif (found := packed(name, conv)) is not None:
        kind = functools.partial(PackedConv, copied=found)
        yield prove(name, KIND, conv, kind, lambda dtype: _noise(conv, dtype))
    elif (taps := trimmed(name, conv)) is not None:
        kind = functools.partial(TrimmedConv, copied=taps)
        proved = prove(name, KIND, conv, kind, lambda dtype: _noise(conv, dtype, taps.small))
        taps.forget()
        yield proved


def _noise(
    conv: nn.Conv2d, dtype: torch.dtype, side: int = 0
) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
    made = torch.Generator().manual_seed(0)
    # Not square, and no smaller than a map that every form but one serves.
    height, width = (side, side + 1) if side else (conv.kernel_size[0] + more for more in (8, 11))
    return (torch.randn(2, conv.in_channels, height, width, generator=made).to(dtype),), {}
