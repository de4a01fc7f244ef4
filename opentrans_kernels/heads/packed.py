"""Layers of a head whose weights are kept in another form beside the dense weight, which stays:
packed where most are zero, transformed for Winograd's method.

Such a copy serves inference in float32 on the CPU. When the weight is not what it was any more,
the layer computes densely with what it is now, and says so once.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..activations import NONE, Activation
from ..finite import count_non_finite
from ..freshness import Freshness
from ..ops.sparse_conv2d import sparse_conv2d
from ..ops.winograd_conv2d import winograd_conv2d
from ..pack import SparseWeight
from ..pack.winograd import transform_weight
from ..topology.blocks import unusual_window, winograd_window
from ..topology.fold import scale_shift

__all__ = [
    "DENSEST",
    "SMALLEST",
    "Copied",
    "Packed",
    "Transformed",
    "packed",
    "transformable",
    "weight_of",
]

#: Largest share of nonzero weights that is packed. A 1x1 wins up to 0.7 and more, which depends on
#: the machine and on the size; here nothing is timed.
DENSEST = 0.4
#: Pixels of a map from which Winograd's method is worth it: below them it lost up to 14 % with the
#: fewest channels.
SMALLEST = 144
#: Weights of a layer that is worth it.
_FEWEST = 1024
_NARROWEST = 32  # channels from which Winograd's transforms cost little beside the products

_log = logging.getLogger(__name__)


class Copied(ABC):
    """A form of a layer's weight, and whether it still is that weight.

    further: path -> module whose tensors are in it as well.
    """

    def __init__(
        self, path: str, layer: nn.Module, further: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.told = False
        self.fresh = Freshness({path: _Tensors(layer), **(further or {})})

    @abstractmethod
    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of ``[N, cin, H, W]``."""

    def serves(self, x: torch.Tensor) -> bool:
        """Whether the copy may be used for ``x``."""
        if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
            return False
        changed = self.fresh.asked()
        if changed and not self.told:
            self.told = True
            _log.warning(
                "%s was written to or replaced since it was packed: the layer runs densely with "
                "what it holds now. Call restore_heads(model) and accelerate_heads(model) to pack "
                "it again.", changed,
            )  # fmt: skip
        return not changed


class Packed(Copied):
    """The packed weight of a linear layer or a convolution."""

    def __init__(self, path: str, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__(path, layer)
        weight, stride, padding, dilation = layer.weight.detach(), 1, 0, 1
        if isinstance(layer, nn.Conv2d):
            stride, padding = layer.stride[0], int(layer.padding[0])
            dilation = layer.dilation[0]
        else:
            weight = weight[:, :, None, None]
        self.weight = SparseWeight.from_dense(weight, layer.bias, stride, padding, dilation)

    @property
    def density(self) -> float:
        return self.weight.density

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        return sparse_conv2d(x, self.weight)


class Transformed(Copied):
    """The weight of a 3x3 convolution of stride 1 in the domain of Winograd's F(2x2, 3x3).

    norm: (path, batch norm behind it), which goes into the weight.
    """

    def __init__(
        self, path: str, conv: nn.Conv2d, norm: tuple[str, nn.Module] | None = None
    ) -> None:
        super().__init__(path, conv, dict([norm] if norm else []))
        weight = conv.weight.detach()
        bias = None if conv.bias is None else conv.bias.detach().clone()
        if norm is not None:
            scale, shift = scale_shift(norm[1], "batch norm")
            weight = weight.double() * scale.view(-1, 1, 1, 1)
            bias = (shift if bias is None else shift + bias.double() * scale).float()
        self.weight, self.bias = transform_weight(weight), bias
        self.cout, self.padding = conv.out_channels, int(conv.padding[0])

    def serves(self, x: torch.Tensor) -> bool:
        return x.shape[-2] * x.shape[-1] >= SMALLEST and super().serves(x)

    def convolve(self, x: torch.Tensor, activation: Activation = NONE) -> torch.Tensor:
        return winograd_conv2d(
            x, self.weight, self.bias, cout=self.cout, padding=self.padding, activation=activation
        )


def weight_of(layer: nn.Module) -> torch.Tensor | None:
    """The layer's own weight, if it has one that a copy can be made of: float32 on the CPU."""
    weight = layer._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.device.type != "cpu":
        return None
    return weight if weight.dtype == torch.float32 else None


class _Tensors(nn.Module):
    """Weight and bias of a layer, in its own dictionaries, without its children."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers = layer._parameters, layer._buffers


def transformable(conv: nn.Conv2d) -> bool:
    """Whether :class:`Transformed` serves it, and packing what is not zero would not serve more."""
    weight = weight_of(conv)
    if weight is None or not winograd_window(conv) or min(weight.shape[:2]) < _NARROWEST:
        return False
    dense = int(torch.count_nonzero(weight)) > DENSEST * weight.numel()
    return dense and not count_non_finite(weight)


def packed(path: str, layer: nn.Module) -> Packed | None:
    """The packed form of a layer that has one and is sparse enough for it, otherwise None."""
    weight = weight_of(layer)
    if weight is None or weight.numel() < _FEWEST or not _expressible(layer):
        return None
    if int(torch.count_nonzero(weight.detach())) > DENSEST * weight.numel():
        return None
    return None if count_non_finite(weight) else Packed(path, layer)


def _expressible(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return unusual_window(layer) is None
    return isinstance(layer, nn.Linear)
