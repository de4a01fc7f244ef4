"""The network that every tool prunes, and what is kept of the files they write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Norms are many and read nowhere; one stands for all.
_LEFT_OUT = re.compile(r"\.bn\d\.|downsample\.1\.")


class Block(nn.Module):
    """A basic block with torchvision's names."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = None
        if stride > 1:
            shortcut = nn.Conv2d(cin, cout, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(cout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Net(nn.Module):
    """A ResNet of two stages, small enough that its files can be looked at."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(width, width, 1))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2))
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def structure(content: Any) -> Any:
    """Names, shapes and dtypes; "01" marks tensors of zeros and ones."""
    if isinstance(content, torch.Tensor):
        flags = " 01" if bool(((content == 0) | (content == 1)).all()) else ""
        return f"{str(content.dtype)[6:]} {'x'.join(map(str, content.shape)) or '-'}{flags}"
    if isinstance(content, Mapping):
        kept = {k: v for k, v in content.items() if not _LEFT_OUT.search(f"{k}.")}
        return {str(k): structure(v) for k, v in kept.items() if _holds_tensors(v)}
    return None


def _holds_tensors(content: Any) -> bool:
    if isinstance(content, Mapping):
        return any(_holds_tensors(value) for value in content.values())
    return isinstance(content, torch.Tensor) or content is None


class Writer:
    """Saves files and what their networks compute with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, name: str, content: Any, truth: Mapping[str, torch.Tensor]) -> None:
        torch.save(content, self.folder / name)
        self.structure(name, content)
        self.truth(name, truth)

    def structure(self, name: str, content: Any) -> None:
        """For content that cannot be read again without building the tool's objects."""
        (self.folder / f"{name}.structure").write_text(json.dumps(structure(content)))

    def truth(self, name: str, weights: Mapping[str, torch.Tensor]) -> None:
        plain = {key: weight.detach().clone() for key, weight in weights.items()}
        torch.save(plain, self.folder / f"{name}.truth")
