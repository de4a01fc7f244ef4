"""DeepLabV3 with the decoder of its second version, giving embeddings instead of class scores.

Chen et al., arXiv 1706.05587 (atrous pyramid) and 1802.02611 (decoder). The pyramid is
torchvision's. In detectron2 models the head is detectron2's own; this one needs torch and
torchvision only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import optional_module

__all__ = ["DeepLabHead"]


class DeepLabHead(nn.Module):
    """Features of a ResNet -> embeddings of pixels.

    Args:
        channels: feature name -> channels, of at least the features used.
        embed_dim: channels of the embeddings.
        deep: feature under the atrous pyramid. shallow: features joined in the decoder, coarse to
            fine; () is plain DeepLabV3, whose map has the stride of ``deep``.
        width: channels of pyramid and decoder. project: channels a shallow feature is reduced to.
        rates: dilations of the pyramid.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        embed_dim: int,
        *,
        deep: str = "res5",
        shallow: Sequence[str] = ("res2",),
        width: int = 256,
        project: int = 48,
        rates: Sequence[int] = (6, 12, 18),
    ) -> None:
        super().__init__()
        missing = [name for name in (deep, *shallow) if name not in channels]
        if missing:
            raise OpenTransError(
                f"the backbone gives {', '.join(channels)}, not {missing[0]!r}. Name features it "
                "gives, or add it to the backbone's output."
            )
        self.deep, self.shallow = deep, tuple(shallow)
        self.pyramid = _pyramid()(channels[deep], list(rates), width)
        self.project = nn.ModuleDict(
            {name: _conv(channels[name], project, 1) for name in self.shallow}
        )
        self.fuse = nn.ModuleDict(
            {
                name: nn.Sequential(_conv(width + project, width, 3), _conv(width, width, 3))
                for name in self.shallow
            }
        )
        self.embed = nn.Conv2d(width, embed_dim, 1)

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Features [B, C, h, w] by name -> embeddings [B, embed_dim, H/s, W/s] at the stride of
        the finest feature used."""
        x = self.pyramid(features[self.deep])
        for name in self.shallow:
            fine = self.project[name](features[name])
            x = F.interpolate(x, size=fine.shape[-2:], mode="bilinear", align_corners=False)
            x = self.fuse[name](torch.cat([fine, x], dim=1))
        return self.embed(x)


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _pyramid() -> Any:
    name = "torchvision.models.segmentation.deeplabv3"
    return optional_module(name, "the DeepLab head uses torchvision").ASPP
