"""Small vision transformers in plain PyTorch, and modules that look like their MLPs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

SIZE = (32, 32)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class Mlp(nn.Module):
    def __init__(self, width: int, wide: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(width, wide), nn.GELU() if act is None else act
        self.drop, self.fc2 = nn.Dropout(0.1), nn.Linear(wide, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, width: int, mlp: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """16 tokens of a 32x32 image."""

    def __init__(
        self, width: int = 32, depth: int = 2, mlp: Callable[[int, int], nn.Module] = Mlp
    ) -> None:
        super().__init__()
        self.image_size = SIZE
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.ModuleList(Block(width, mlp) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def vit(seed: int = 0, **options) -> Vit:
    torch.manual_seed(seed)
    return Vit(**options).eval()


def prune_(model: nn.Module, share: float = 0.9, names: tuple[str, ...] = ()) -> nn.Module:
    """Set the smallest weights of linear layers to zero, of all in blocks or those in ``names``."""
    for name, module in model.named_modules():
        chosen = name in names if names else name.startswith("blocks.")
        if isinstance(module, nn.Linear) and chosen:
            weight = module.weight.data
            limit = weight.abs().flatten().kthvalue(int(share * weight.numel())).values
            weight[weight.abs() <= limit] = 0
    return model


def sequential(width: int, wide: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, wide), nn.ReLU(), nn.Linear(wide, width))


class Gated(Mlp):
    """Two linear layers and an activation, and another expression."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x))) * 2


class Functional(nn.Module):
    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, wide), nn.Linear(wide, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class GELUActivation(nn.Module):
    """Has the name of one it is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.01 * F.gelu(x)
