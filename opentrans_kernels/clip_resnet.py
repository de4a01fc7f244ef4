"""CLIP's ResNet (Radford et al. 2021) as a plain module, with the names that open_clip gives it.

A command that needs the network's shapes, or a network for synthetic weights, would otherwise wait
for open_clip and all it imports, several times as long as it works. Names, order and shapes of all
tensors are those of open_clip's ``ModifiedResNet``, so state dicts fit both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import OpenTransError

__all__ = ["ARCHS", "Arch", "AttentionPool2d", "Bottleneck", "ModifiedResNet", "arch_of"]

HEAD_WIDTH = 64
STRIDE = 32  # of the whole trunk


@dataclass(frozen=True)
class Arch:
    """blocks per stage, channels behind the stem, of the embedding, and side in pixels."""

    layers: tuple[int, int, int, int]
    width: int
    output_dim: int
    image_size: int


#: The published towers. Their "-quickgelu" twins differ in the text encoder only.
ARCHS = {
    "RN50": Arch((3, 4, 6, 3), 64, 1024, 224),
    "RN101": Arch((3, 4, 23, 3), 64, 512, 224),
    "RN50x4": Arch((4, 6, 10, 6), 80, 640, 288),
    "RN50x16": Arch((6, 8, 18, 8), 96, 768, 384),
    "RN50x64": Arch((3, 15, 36, 10), 128, 1024, 448),
}


def arch_of(name: str) -> Arch:
    """The tower of a name. Raises OpenTransError for one that is no CLIP ResNet."""
    found = ARCHS.get(name.removesuffix("-quickgelu"))
    if found is None:
        raise OpenTransError(
            f"{name!r} is not a CLIP ResNet that was published. Use one of: {', '.join(ARCHS)}."
        )
    return found


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with batch norms; a stride is an average pool behind the 3x3."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, pool: int = 1) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if pool > 1 or inputs != outputs:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(pool))
            self.downsample.add_module("0", nn.Conv2d(inputs, outputs, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [N, Cin, H, W] -> [N, 4 * planes, H / pool, W / pool]."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.avgpool(self.act2(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.act3(y)


class AttentionPool2d(nn.Module):
    """Multi-head attention of the mean over all positions: one embedding per image."""

    def __init__(self, side: int, width: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(side * side + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)
        self.num_heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [N, width, side, side] -> [N, output_dim]."""
        tokens = x.flatten(2).permute(2, 0, 1)
        tokens = torch.cat([tokens.mean(0, keepdim=True), tokens])
        tokens = tokens + self.positional_embedding[:, None].to(tokens.dtype)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (projection.weight for projection in projections)
        pooled, _ = F.multi_head_attention_forward(
            tokens, tokens, tokens, tokens.shape[-1], self.num_heads,
            in_proj_weight=None, in_proj_bias=torch.cat([p.bias for p in projections]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=self.c_proj.weight, out_proj_bias=self.c_proj.bias,
            training=self.training, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=q, k_proj_weight=k, v_proj_weight=v,
        )  # fmt: skip
        return pooled[0]


class ModifiedResNet(nn.Module):
    """Three stem convolutions, four stages, attention pool.

    ``image_size`` (pixels, a multiple of 32) fixes the map that the attention pool accepts.
    Weights are PyTorch's random initialisation; build under ``torch.device("meta")`` to fill them
    otherwise.
    """

    def __init__(
        self, layers: tuple[int, ...], output_dim: int, image_size: int = 224, width: int = 64
    ) -> None:
        super().__init__()
        self.output_dim, self.image_size = output_dim, image_size
        half = width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.act3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        inputs = width
        for stage, count in enumerate(layers):
            planes = width << stage
            blocks = []
            for index in range(count):
                blocks.append(Bottleneck(inputs, planes, 2 if stage and not index else 1))
                inputs = planes * Bottleneck.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool2d(
            image_size // STRIDE, inputs, inputs // HEAD_WIDTH, output_dim
        )

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """x: [N, 3, H, W] -> [N, width, H / 4, W / 4]."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.avgpool(self.act3(self.bn3(self.conv3(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [N, 3, image_size, image_size] -> [N, output_dim]."""
        x = self.stem(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.attnpool(x)
