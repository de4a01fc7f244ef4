"""Small vision transformers for tests: our own block form, and the three libraries' on request."""

from __future__ import annotations

import pytest
import torch
from torch import nn

SIDE, PATCH = 48, 8  # a map of 6x6 tokens


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT) * self.scale).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """[B, 3, H, W] -> tokens [B, prefix + H W / 64, width], any size; positions are sinusoids."""

    def __init__(self, width: int = 32, depth: int = 4, heads: int = 4, cls: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        if cls:
            self.cls_token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.proj(image)
        place = [torch.linspace(-1, 1, n).to(x) for n in x.shape[-2:]]
        x = x + (3 * place[0]).sin()[:, None] + (5 * place[1]).cos()
        x = x.flatten(2).transpose(1, 2)
        if hasattr(self, "cls_token"):
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


def vit(seed: int = 0, **options: object) -> Vit:
    torch.manual_seed(seed)
    return Vit(**options).eval()  # type: ignore[arg-type]


def images(*size: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *(size or (SIDE, SIDE)), generator=random)


def _timm() -> tuple[nn.Module, object]:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=32, depth=4, num_heads=4, num_classes=0,
        reg_tokens=2, init_values=0.5, dynamic_img_size=True, qk_norm=True,
    )  # fmt: skip
    return model, lambda m, x: m.forward_features(x)


def _open_clip(batch_first: bool = True) -> tuple[nn.Module, object]:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    vision = {"layers": 4, "width": 32, "patch_size": PATCH, "image_size": SIDE, "head_width": 8}
    text = {"layers": 2, "width": 16, "heads": 2, "context_length": 8, "vocab_size": 20}
    model = open_clip.model.CLIP(16, vision, text)
    if not batch_first:  # as towers of older versions are
        model.visual.transformer.batch_first = False
        for block in model.visual.transformer.resblocks:
            block.attn.batch_first = False
    last = {"indices": [3], "output_fmt": "NLC", "output_extra_tokens": True}

    def tokens(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        found = m.visual.forward_intermediates(x, **last)
        names = ("image_intermediates_prefix", "image_intermediates")
        return torch.cat([found[name][0] for name in names], 1)

    return model, tokens


def _transformers(kind: str) -> tuple[nn.Module, object]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        image_size=SIDE, patch_size=PATCH, attn_implementation="eager",
    )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(config)
    return model, lambda m, x: m(x).last_hidden_state


LIBRARIES = {
    "timm": _timm,
    "open_clip": _open_clip,
    "open_clip length first": lambda: _open_clip(batch_first=False),
    "transformers ViT": lambda: _transformers("ViT"),
    "transformers CLIP": lambda: _transformers("CLIPVision"),
    "transformers DINOv2": lambda: _transformers("Dinov2"),
    "transformers SigLIP": lambda: _transformers("SiglipVision"),
}


def library(name: str) -> tuple[nn.Module, object]:
    """(model, its tokens of images) of a library; skips with a reason where it is missing."""
    torch.manual_seed(0)
    model, tokens = LIBRARIES[name]()
    return model.eval(), tokens
