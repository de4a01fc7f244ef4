"""Layers anywhere in a head most of whose weights are zero, that no larger part computes.

Convolutions with a window and 1x1 convolutions give planes, linear layers tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..nn import Replacement
from ..ops.sparse_conv2d import sparse_conv2d
from ..topology.blocks import unusual_window
from ..topology.naming import naming_of_root
from .linear import packed_part
from .packed import DENSEST, Packed, packed
from .parts import Found, HeadPart, prove

__all__ = ["PackedConv", "find"]

KIND = "convolution"


class PackedConv(HeadPart):
    """A convolution, and its ``norm`` and ``activation`` where it has them (detectron2)."""

    what, how = KIND, "most weights are zero: packed"

    def __init__(self, original: nn.Conv2d, packed: Packed) -> None:
        super().__init__(original)
        self.__dict__["opentrans_packed"] = packed

    def fast(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or not x.numel() or not self.opentrans_packed.serves(x):
            return self.as_it_was(x)
        out = sparse_conv2d(x, self.opentrans_packed.weight)
        norm, activation = self._modules.get("norm"), getattr(self, "activation", None)
        out = out if norm is None else norm(out)
        return out if activation is None else activation(out)


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
    weight = conv._parameters.get("weight")
    if (why := unusual_window(conv)) is not None:
        if weight is not None and int(torch.count_nonzero(weight)) <= DENSEST * weight.numel():
            yield Found(name, KIND, None, f"most of its weights are zero, but it {why}: dense")
    elif (found := packed(name, conv)) is not None:
        kind = functools.partial(PackedConv, packed=found)
        yield prove(name, KIND, conv, kind, lambda dtype: _noise(conv, dtype))


def _noise(conv: nn.Conv2d, dtype: torch.dtype) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
    made = torch.Generator().manual_seed(0)
    side = conv.kernel_size[0]
    return (torch.randn(2, conv.in_channels, side + 4, side + 6, generator=made).to(dtype),), {}
