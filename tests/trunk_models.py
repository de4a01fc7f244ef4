"""Models for the topology tests: OpenAI CLIP's names, a wrapper, a short torchvision ResNet."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

resnet = pytest.importorskip("torchvision.models.resnet")


class OpenAIBlock(nn.Module):
    """Attribute names of OpenAI's CLIP: relu1, relu2, relu3, avgpool, downsample of three parts."""

    def __init__(self, cin: int, width: int, stride: int = 1) -> None:
        super().__init__()
        for i, (a, b, k) in enumerate(
            ((cin, width, 1), (width, width, 3), (width, 4 * width, 1)), 1
        ):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, k, padding=k // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
            setattr(self, f"relu{i}", nn.ReLU(inplace=True))
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or cin != 4 * width:
            parts = [nn.AvgPool2d(stride), nn.Conv2d(cin, 4 * width, 1, bias=False)]
            names = OrderedDict(
                zip(("-1", "0", "1"), [*parts, nn.BatchNorm2d(4 * width)], strict=True)
            )
            self.downsample = nn.Sequential(names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        if self.downsample is not None:
            shortcut = self.downsample(x)
        out += shortcut
        return self.relu3(out)


class OpenAITower(nn.Module):
    def __init__(self, width: int = 8, block: type[nn.Module] = OpenAIBlock) -> None:
        super().__init__()
        for i, (a, b) in enumerate(
            ((3, width // 2), (width // 2, width // 2), (width // 2, width)), 1
        ):
            setattr(
                self,
                f"conv{i}",
                nn.Conv2d(a, b, 3, stride=2 if i == 1 else 1, padding=1, bias=False),
            )
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
            setattr(self, f"relu{i}", nn.ReLU(inplace=True))
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = nn.Sequential(block(width, width), block(4 * width, width))
        self.layer2 = nn.Sequential(block(4 * width, 2 * width, 2), block(8 * width, 2 * width))
        self.head = nn.Linear(8 * width * 7 * 7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.type(self.conv1.weight.dtype)
        for i in (1, 2, 3):
            x = getattr(self, f"relu{i}")(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = self.layer2(self.layer1(self.avgpool(x)))
        return self.head(x.flatten(1))


class Wrapper(nn.Module):
    """A CLIP-like model: an image tower among other things."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.text = nn.Linear(4, 4)
        self.visual = visual
        self.extra = nn.Conv2d(3, 4, 5, padding=2)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.visual(image) + self.text(tokens)


def randomise(model: nn.Module) -> nn.Module:
    gen = torch.Generator().manual_seed(1)
    for m in model.modules():
        if getattr(m, "running_mean", None) is not None:
            n = m.running_mean.numel()
            m.running_mean.data = torch.randn(n, generator=gen)
            m.running_var.data = torch.rand(n, generator=gen) + 0.5
            if getattr(m, "weight", None) is not None:
                m.weight.data = torch.randn(n, generator=gen)
                m.bias.data = torch.randn(n, generator=gen)
    return model.eval()


def small(**kwargs: object) -> nn.Module:
    block = kwargs.pop("block", resnet.Bottleneck)
    return resnet.ResNet(block, [1, 1, 1, 1], num_classes=2, **kwargs)
