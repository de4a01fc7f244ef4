"""A dilated convolution tap by tap, each over the pixels where it reads the map and not padding.

At a rate near the size of a map, as in the pyramids of DeepLab, most taps read padding at most
places: at 18 on 16 x 16 pixels all but the middle one do everywhere. A dense convolution multiplies
these zeros as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..finite import count_non_finite
from ..ops.library import in_dispatch_mode
from ..topology.blocks import unusual_window
from .packed import DENSEST, Copied, weight_of

__all__ = ["Taps", "trimmed"]

#: Largest share of the products that are left for which this is done: their pixels are copied.
_SHARE = 0.6
_NARROWEST = 32  # channels, so that a tap is a product worth its copy

Range = tuple[int, int]


def trimmed(path: str, conv: nn.Conv2d) -> Taps | None:
    """Its taps, if there are maps that they serve and packing would not serve more, else None."""
    weight = weight_of(conv)
    if weight is None or min(conv.dilation) < 2 or conv.stride != (1, 1) or conv.groups != 1:
        return None
    if min(weight.shape[:2]) < _NARROWEST or unusual_window(conv) is not None:
        return None
    if int(torch.count_nonzero(weight)) <= DENSEST * weight.numel() or count_non_finite(weight):
        return None
    taps = Taps(path, conv)
    return taps if taps.share(taps.small, taps.small + 1) <= _SHARE else None


def _inside(size: int, tap: int, conv: Taps) -> tuple[Range, Range]:
    """(output, input) pixels of a side for which a tap reads the map."""
    shift = tap * conv.dilation - conv.padding
    first = max(0, -shift)
    last = max(first, min(conv.out_side(size), size - shift))
    return (first, last), (first + shift, last + shift)


class Taps(Copied):
    """The weight of a dilated convolution of stride 1, a matrix per tap."""

    def __init__(self, path: str, conv: nn.Conv2d) -> None:
        super().__init__(path, conv)
        self.conv = conv
        #: [kernel, kernel, cin, cout]; made for the first map that is small enough.
        self.weight: torch.Tensor | None = None
        self.kernel, self.cout = conv.kernel_size[0], conv.out_channels
        self.dilation, self.padding = conv.dilation[0], int(conv.padding[0])
        reach = self.dilation * (self.kernel - 1)
        #: A side at which taps read padding; large enough for an output.
        self.small = max(reach // 2 + 2, reach - 2 * self.padding + 1)

    def out_side(self, size: int) -> int:
        """Pixels of a side of the output."""
        return size + 2 * self.padding - self.dilation * (self.kernel - 1)

    def share(self, height: int, width: int) -> float:
        """Of the products of a dense convolution of such a map, those that read no padding."""
        shares = 1.0
        for size in (height, width):
            reads = (_inside(size, tap, self)[0] for tap in range(self.kernel))
            shares *= sum(last - first for first, last in reads)
            shares /= max(1, self.kernel * self.out_side(size))
        return shares

    def serves(self, x: torch.Tensor) -> bool:
        # A trace would keep the taps of this size for every other, and a captured graph or a mode's
        # fake tensors leave nothing to keep the matrices in.
        seen = torch.compiler.is_compiling() or in_dispatch_mode()
        if torch.jit.is_tracing() or (seen and self.weight is None):
            return False
        height, width = x.shape[-2:]
        sides = self.out_side(height), self.out_side(width)
        # Errors, which the convolution words.
        if min(sides) < 1 or x.shape[1] != self.conv.in_channels:
            return False
        if self.conv.weight.dtype != x.dtype or self.share(height, width) > _SHARE:
            return False
        return super().serves(x) and (self.weight is not None or not self.fresh.at_capture())

    def forget(self) -> None:
        """Make the matrices anew when they are needed: there may never be a small map."""
        self.weight = None

    def matrices(self) -> torch.Tensor:
        """``weight``, made if need be from the dense one, which is what it was (``serves``)."""
        if self.weight is None:
            self.weight = self.conv.weight.detach().permute(2, 3, 1, 0).contiguous()
        return self.weight

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.matrices()
        height, width = x.shape[2:]
        # Channels last: what a tap reads are then whole rows of pixels, copied at memory's speed.
        pixels = x.permute(0, 2, 3, 1).contiguous()
        out = x.new_zeros(len(x), self.out_side(height), self.out_side(width), self.cout)
        if self.conv.bias is not None:
            out += self.conv.bias
        for tap, (rows, columns), (above, left) in self._taps(height, width):
            part = pixels[:, slice(*above), slice(*left)].flatten(0, 2)
            to = out[:, slice(*rows), slice(*columns)]
            to += (part @ weight[tap]).view(to.shape)
        return out.permute(0, 3, 1, 2)

    def _taps(
        self, height: int, width: int
    ) -> Iterator[tuple[tuple[int, int], tuple[Range, Range], tuple[Range, Range]]]:
        """(tap, output rows and columns, input rows and columns) of those that read anything."""
        for ky in range(self.kernel):
            rows, above = _inside(height, ky, self)
            for kx in range(self.kernel):
                columns, left = _inside(width, kx, self)
                if rows[0] < rows[1] and columns[0] < columns[1]:
                    yield (ky, kx), (rows, columns), (above, left)
