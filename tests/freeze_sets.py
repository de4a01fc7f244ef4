"""Frozen sets of the CLIP RN50 that published figures refer to."""

from __future__ import annotations

from freeze_cases import PUBLISHED_1X1
from torch import nn

from opentrans_kernels.masks.names import conv_modules


def threes(model: nn.Module) -> list[str]:
    """Every 3x3 convolution."""
    return [n for n, conv in conv_modules(model).items() if conv.kernel_size == (3, 3)]


def published_27(model: nn.Module) -> list[str]:
    """The frozen list kept in the released code: 18 of 19 3x3, nine 1x1."""
    return [*(name for name in threes(model) if name != "layer4.1.conv2"), *PUBLISHED_1X1]


def stem_to_layer2(model: nn.Module) -> list[str]:
    """A prefix of about half of the layers."""
    return [n for n in conv_modules(model) if not n.startswith(("layer3", "layer4"))]
