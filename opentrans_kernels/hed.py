"""Holistically-nested edge detection: VGG-16 with a map from every block (Xie and Tu, ICCV 2015).

A dense-prediction network of thirteen 3x3 convolutions, small enough to prune, train and look at on
a CPU. Written from the paper; ``opentrans.trained`` fills it with published weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["MEAN_RGB", "Hed"]

#: Of the images it was trained on, per channel, values from 0 to 255.
MEAN_RGB = (122.67892, 116.66877, 104.00699)
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Hed(nn.Module):
    """Edge logits of an image, at the image's own size.

    ``forward(x)``: float32 [B, 3, H, W], RGB from 0 to 255 minus ``MEAN_RGB``, any H and W from 1;
    returns logits [B, 1, H, W] of the fused map (``sigmoid`` gives the probability of an edge).
    ``maps(x)`` returns the five side maps before it, too. A block starts with a 2x2 max-pool that
    keeps the last odd row and column; a side map is brought to the image's size by bilinear
    interpolation between pixel centres.

    Args:
        blocks: output channels of the convolutions of every block.
    """

    def __init__(self, blocks: tuple[tuple[int, ...], ...] = BLOCKS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.sides = nn.ModuleList()
        channels = 3
        for number, widths in enumerate(blocks):
            layers: list[nn.Module] = []
            if number > 0:
                layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            self.blocks.append(nn.Sequential(*layers))
            self.sides.append(nn.Conv2d(channels, 1, 1))
        self.fuse = nn.Conv2d(len(blocks), 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.maps(x)[-1]

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Logits of the side maps and, last, of the fused one, each [B, 1, H, W]."""
        size = x.shape[-2:]
        found = []
        for number, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            x = block(x)
            logits = side(x)
            if number > 0:
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            found.append(logits)
        return [*found, self.fuse(torch.cat(found, 1))]
