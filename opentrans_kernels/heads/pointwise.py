"""1x1 convolutions around a deformable encoder, as products whose result is channels_last.

What follows them (flattening to tokens, group norm, interpolation, a 3x3 convolution, the product
with queries) reads pixels with their channels side by side, or is as fast either way. A planar
input is not copied first: the product reads it transposed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..ops.sparse_linear import sparse_linear
from .deform import is_deformable
from .linear import has_kernel, linear
from .packed import packed
from .parts import Found, HeadPart, prove

__all__ = ["PointwiseConv", "beside_encoders", "find"]

KIND = "1x1 convolution"
_CONTAINERS = (nn.Sequential, nn.ModuleList)


class PointwiseConv(HeadPart):
    """A 1x1 convolution, and its ``norm`` and ``activation`` where it has them (detectron2)."""

    what, how = KIND, "a product, channels_last, input not copied"

    def __init__(self, original: nn.Conv2d, path: str = "") -> None:
        super().__init__(original)
        self.__dict__["opentrans_packed"] = packed(path, original)
        if self.opentrans_packed is not None:
            self.__dict__["how"] = "most weights are zero: packed, channels_last"

    def fast(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or torch.is_grad_enabled() or not x.numel():
            return self.as_it_was(x)
        n, _, h, w = x.shape
        if self.opentrans_packed is not None and self.opentrans_packed.serves(x):
            tokens = x.permute(0, 2, 3, 1)
            out = sparse_linear(tokens, self.opentrans_packed.weight)
        elif x.is_contiguous(memory_format=torch.channels_last):
            weight = self.weight.view(self.weight.shape[:2])
            out = linear(x.permute(0, 2, 3, 1), weight, self.bias)
        else:
            weight = self.weight.view(self.weight.shape[:2]).t()
            images = [_product(image.flatten(1).t(), weight, self.bias) for image in x]
            out = (images[0] if n == 1 else torch.stack(images)).view(n, h, w, -1)
        out = out.permute(0, 3, 1, 2)
        norm, activation = self._modules.get("norm"), getattr(self, "activation", None)
        if norm is not None:
            out = norm(out)
        return out if activation is None else activation(out)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def beside_encoders(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Convolutions beside deformable encoders: in the first module above that has a 1x1."""
    found: dict[str, nn.Conv2d] = {}
    for name, module in model.named_modules():
        if not is_deformable(module):
            continue
        while name:
            name = name.rpartition(".")[0]
            convs = dict(_convs(name, model.get_submodule(name)))
            if any(conv.kernel_size == (1, 1) for conv in convs.values()):
                found |= convs
                break
    return found


def find(model: nn.Module) -> Iterator[Found]:
    """1x1 convolutions beside a deformable encoder."""
    for path, conv in beside_encoders(model).items() if has_kernel() else ():
        if _is_pointwise(conv):
            yield prove(
                path, KIND, conv, functools.partial(PointwiseConv, path=path),
                lambda dtype, c=conv: _noise(c, dtype),
            )  # fmt: skip


def _convs(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Convolutions that are children of ``module``, or in lists and sequences among them."""
    for key, child in module._modules.items():
        path = f"{name}.{key}".lstrip(".")
        if isinstance(child, nn.Conv2d):
            yield path, child
        elif type(child) in _CONTAINERS:
            yield from _convs(path, child)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    plain = conv.stride == (1, 1) and conv.padding in ((0, 0), "valid") and conv.groups == 1
    return plain and conv.kernel_size == (1, 1)


def _noise(conv: nn.Conv2d, dtype: torch.dtype) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
    made = torch.Generator().manual_seed(0)
    return (torch.randn(2, conv.in_channels, 5, 7, generator=made).to(dtype),), {}
