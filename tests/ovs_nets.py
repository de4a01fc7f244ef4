"""Small open-vocabulary parts for tests: a CLIP of a few thousand weights, and tiny features."""

from __future__ import annotations

from typing import Any

import torch

from opentrans import TextCache
from opentrans.ovs import Clip, TextClassifier
from opentrans.ovs.clip import build_clip

SHAPE: dict[str, Any] = {
    "embed_dim": 32,
    "vision": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "head_width": 64},
    "text": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
CLASSES = ("background", "red circle", "blue square")
CHANNELS = {"res2": 8, "res3": 12, "res4": 16, "res5": 20}


def small_clip(seed: int = 0) -> Clip:
    """Random weights: for mechanics, not for meaning."""
    import open_clip

    torch.manual_seed(seed)
    model = build_clip(SHAPE).float().eval().requires_grad_(False)
    return Clip(model, open_clip.SimpleTokenizer(context_length=16), SHAPE["embed_dim"], True)


def small_classifier(seed: int = 0, **options: Any) -> TextClassifier:
    clip = small_clip(seed)
    return TextClassifier(TextCache(clip.model, clip.tokenizer), **options)


def small_features(batch: int = 2, side: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Maps of ``CHANNELS`` at strides 4 to 32 of an image of ``side`` pixels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, channels, side // stride, side // stride, generator=generator)
        for (name, channels), stride in zip(CHANNELS.items(), (4, 8, 16, 32), strict=True)
    }
