"""Small residual networks, random masks and the masked dense oracle for the compaction tests."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.compact import compact_trunk, forward_reference
from opentrans_kernels.topology import Trunk

MASK_KINDS = ("random", "rows", "columns", "both", "empty", "full")


class Block(nn.Module):
    """A bottleneck (clip: strides are average pools) or, without ``inner2``, a basic block."""

    def __init__(self, cin: int, widths: tuple[int, ...], stride: int, style: str) -> None:
        super().__init__()
        clip = style == "clip"
        step = 1 if clip else stride
        bottleneck = len(widths) == 3
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        before = cin
        for i, (k, width) in enumerate(zip(kernels, widths, strict=True), 1):
            strided = i == (2 if bottleneck else 1)
            conv = nn.Conv2d(before, width, k, step if strided else 1, k // 2, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(width))
            before = width
        self.relu = nn.ReLU(inplace=True)
        if clip:
            self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or cin != before:
            conv = nn.Conv2d(cin, before, 1, step, bias=False)
            pool = [nn.AvgPool2d(stride)] if clip else []
            self.downsample = nn.Sequential(*pool, conv, nn.BatchNorm2d(before))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if hasattr(self, "conv3"):
            y = self.relu(y)
            if hasattr(self, "avgpool"):
                y = self.avgpool(y)
            y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        y += shortcut
        return self.relu(y)


class Net(nn.Module):
    """Three stem convolutions and two stages; the second one halves the resolution."""

    def __init__(self, style: str, basic: bool) -> None:
        super().__init__()
        for i, (a, b) in enumerate(((3, 4), (4, 5), (5, 6)), 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, 3, 1, 1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
            setattr(self, f"act{i}", nn.ReLU(inplace=True))
        narrow, wide = ((5, 8), (6, 9)) if basic else ((5, 4, 8), (6, 5, 9))
        self.layer1 = nn.Sequential(*(Block(c, narrow, 1, style) for c in (6, 8, 8)))
        self.layer2 = nn.Sequential(Block(8, wide, 2, style), Block(9, wide, 1, style))

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        for i in (1, 2, 3):
            x = getattr(self, f"act{i}")(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(self.layer1(self.stem(x)))


def randomise(model: nn.Module, seed: int) -> torch.Generator:
    gen = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=gen) / fan_in**0.5
        elif isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            module.weight.data = torch.randn(n, generator=gen)  # both signs
            module.bias.data = torch.randn(n, generator=gen)
            module.running_mean = torch.randn(n, generator=gen)
            module.running_var = torch.rand(n, generator=gen) + 0.2
    model.double().eval()
    return gen


def random_mask(shape: torch.Size, kind: str, gen: torch.Generator) -> torch.Tensor:
    mask = torch.rand(shape, generator=gen) < 0.4
    if kind in ("rows", "both"):
        mask[torch.rand(shape[0], generator=gen) < 0.5] = False
    if kind in ("columns", "both"):
        mask[:, torch.rand(shape[1], generator=gen) < 0.5] = False
    return torch.full(shape, kind == "full") if kind in ("empty", "full") else mask


def random_masks(
    model: nn.Module, kinds: Callable[[str], str], gen: torch.Generator
) -> dict[str, torch.Tensor]:
    return {
        name: random_mask(m.weight.shape, kinds(name), gen)
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }


def masked(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Module:
    twin = copy.deepcopy(model)
    for name, mask in masks.items():
        twin.get_submodule(name).weight.data *= mask
    return twin


def run_compact(trunk: Trunk, masks: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    compact = compact_trunk(trunk, masks)
    for conv in compact.stem.values():
        x = F.relu(F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding))
    for node in trunk.blocks:
        x = forward_reference(compact.blocks[node.name], x)
    return x
