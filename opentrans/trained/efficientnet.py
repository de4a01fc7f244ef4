"""EfficientNet-Lite0 (Tan and Le 2019, without squeeze and swish), trained on ImageNet."""

from __future__ import annotations

import os
import re

from torch import Tensor, nn

from opentrans_kernels.masks import read_state_dict

from .filling import fill, other_network

__all__ = ["EfficientNetLite", "load_efficientnet_lite0"]

WHAT = "EfficientNet-Lite0"
#: (channels, blocks, window, stride of the first, expansion) of every stage of Lite0.
STAGES = (
    (16, 1, 3, 1, 1),
    (24, 2, 3, 2, 6),
    (40, 2, 5, 2, 6),
    (80, 3, 3, 2, 6),
    (112, 3, 5, 1, 6),
    (192, 4, 5, 2, 6),
    (320, 1, 3, 1, 6),
)
EPS = 1e-3  # of its batch norms


class ConvNorm(nn.Sequential):
    """Convolution and batch norm, with ReLU6 unless it ends a block.

    A strided window looks one pixel further down and to the right than up and to the left, as
    TensorFlow's "same" does for maps of even sides.
    """

    def __init__(
        self, inputs: int, outputs: int, window: int, stride: int = 1, groups: int = 1,
        last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if stride > 1:
            before = (window - stride) // 2
            after = window - stride - before
            self.add_module("pad", nn.ZeroPad2d((before, after, before, after)))
        around = 0 if stride > 1 else window // 2
        conv = nn.Conv2d(inputs, outputs, window, stride, around, groups=groups, bias=False)
        self.add_module("conv", conv)
        self.add_module("bn", nn.BatchNorm2d(outputs, eps=EPS))
        if not last:
            self.add_module("act", nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """1x1 to more channels, depthwise, 1x1 to fewer; the input is added where shapes agree."""

    def __init__(self, inputs: int, outputs: int, window: int, stride: int, wider: int) -> None:
        super().__init__()
        inner = inputs * wider
        self.expand = ConvNorm(inputs, inner, 1) if wider > 1 else nn.Identity()
        self.depthwise = ConvNorm(inner, inner, window, stride, groups=inner)
        self.project = ConvNorm(inner, outputs, 1, last=True)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class EfficientNetLite(nn.Module):
    """Image classifier. ``forward(x)``: float32 [B, 3, H, W], RGB, ``(pixel - 127) / 128``, sides
    multiples of 32 (224 as it was trained); returns logits [B, classes].

    Args:
        stem, head: channels of the first and the last convolution.
        stages: as ``STAGES``.
        classes: of the last layer.
    """

    def __init__(
        self,
        stem: int = 32,
        stages: tuple[tuple[int, int, int, int, int], ...] = STAGES,
        head: int = 1280,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = ConvNorm(3, stem, 3, 2)
        blocks, inputs = [], stem
        for outputs, count, window, stride, wider in stages:
            for i in range(count):
                blocks.append(InvertedResidual(inputs, outputs, window, 1 if i else stride, wider))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(inputs, head, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Pooled vectors [B, head]."""
        return self.pool(self.head(self.blocks(self.stem(x)))).flatten(1)


#: Names in the file -> names here; of blocks below "_blocks.N.".
_TOP = {"_conv_stem": "stem.conv", "_bn0": "stem.bn", "_conv_head": "head.conv", "_bn1": "head.bn"}
_TOP |= {"_fc": "fc"}
_BLOCK = {"_expand_conv": "expand.conv", "_bn0": "expand.bn", "_depthwise_conv": "depthwise.conv"}
_BLOCK |= {"_bn1": "depthwise.bn", "_project_conv": "project.conv", "_bn2": "project.bn"}


def load_efficientnet_lite0(
    path: str | os.PathLike[str], model: EfficientNetLite | None = None
) -> EfficientNetLite:
    """The classifier with the weights of its ``.pth`` file, eval mode, no gradients.

    Args:
        model: another shape of the same network; by default the published one.

    Raises CheckpointError if the file is not of this network; nothing in it is executed.
    """
    model = EfficientNetLite() if model is None else model
    found = {}
    for name, tensor in read_state_dict(path).items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        part, _, leaf = name.rpartition(".")
        if block is not None and block[2] in _BLOCK:
            found[f"blocks.{int(block[1])}.{_BLOCK[block[2]]}.{block[3]}"] = tensor
        elif part in _TOP:
            found[f"{_TOP[part]}.{leaf}"] = tensor
        else:
            raise other_network(path, WHAT, f"has an entry {name}")
    fill(model, found, path, WHAT)
    return model
