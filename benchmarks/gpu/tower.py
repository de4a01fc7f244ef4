"""A CLIP ResNet-50 trunk in plain PyTorch, for machines without open_clip; synthetic weights.

Structure and module names are CLIP's: three 3x3 in the stem, average pools instead of strides, in
the main path and in front of the shortcut's convolution. Weights are normal with lognormal factors
per row and column, so that a magnitude mask spreads unevenly; nothing is trained.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

__all__ = ["Tower", "build_tower", "eager_trunk"]

LAYERS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """1x1, 3x3, average pool, 1x1; shortcut with pool and 1x1 where shapes change."""

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        for i, (a, b, k) in enumerate(
            ((cin, width, 1), (width, width, 3), (width, 4 * width, 1)), 1
        ):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, k, padding=k // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
            setattr(self, f"act{i}", nn.ReLU(inplace=True))
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample: nn.Module | None = None
        if stride > 1 or cin != 4 * width:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(cin, 4 * width, 1, bias=False)),
                        ("1", nn.BatchNorm2d(4 * width)),
                    ]
                )
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.avgpool(self.act2(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.act3(y)


class Tower(nn.Module):
    """Stem and four stages; ``forward`` returns the last stage's output."""

    def __init__(self, layers: tuple[int, ...] = LAYERS, width: int = 64) -> None:
        super().__init__()
        shapes = ((3, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 1))
        for i, (a, b, stride) in enumerate(shapes, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
            setattr(self, f"act{i}", nn.ReLU(inplace=True))
        self.avgpool = nn.AvgPool2d(2)
        cin = width
        for i, depth in enumerate(layers):
            inner = width * 2**i
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(cin, inner, 2 if i and not j else 1))
                cin = 4 * inner
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        for i in (1, 2, 3):
            x = getattr(self, f"act{i}")(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        return self.avgpool(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))


def eager_trunk(net: Tower, x: torch.Tensor) -> list[torch.Tensor]:
    """[stem output, output of every stage]."""
    found = [net.stem(x)]
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        found.append(stage(found[-1]))
    return found


def build_tower(seed: int = 0, **options: Any) -> Tower:
    """A tower on the CPU, float32, eval mode; batch norms hold statistics of one noise image."""
    net = Tower(**options).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            cout, cin, *_ = module.weight.shape
            factors = torch.exp(0.5 * normal(cout, 1, 1, 1)) * torch.exp(0.5 * normal(1, cin, 1, 1))
            fan_in = module.weight[0].numel()
            module.weight.copy_(normal(*module.weight.shape) / fan_in**0.5 * factors)
        elif isinstance(module, nn.BatchNorm2d):
            scale = 0.4 if name.endswith("bn3") and name.startswith("layer") else 0.8
            module.weight.copy_(scale * torch.exp(0.3 * normal(module.num_features)))
            module.bias.copy_(0.25 * normal(module.num_features))

    def take(bn: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        var, mean = torch.var_mean(given[0], dim=(0, 2, 3), correction=0)
        bn.running_var.copy_(var + 0.05 * var.mean() + 1e-6)
        bn.running_mean.copy_(mean)

    handles = [
        m.register_forward_pre_hook(take) for m in net.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        net(normal(1, 3, 128, 128))
    for handle in handles:
        handle.remove()
    return net
