"""A CLIP small enough to train here: contrastive, on captioned shapes, in about a minute.

It stands where CLIP's published weights stand in a real run. It has seen the classes of
``shapes.SEEN`` and the background, as captions of whole images; the held-out pairs of colour and
shape are in none of its images and captions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import optional_module

from ..images import CLIP_MEAN, CLIP_STD
from .clip import COMES_FROM, build_clip, save_clip
from .shapes import BACKGROUND, SEEN, draw_scene
from .text import TEMPLATES

__all__ = ["TINY_SHAPE", "normalise", "train_tiny_clip"]

# Width 16 instead of 64, one block per stage: 0.7 million weights in convolutions.
TINY_SHAPE: dict[str, Any] = {
    "embed_dim": 64,
    "vision": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "head_width": 64},
    "text": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
RADIUS = (0.22, 0.42)  # of the objects, as a share of the side: a close-up
POOL = 4096  # images drawn at most; further steps see them again, mirrored or not
HIGHEST_SCALE = 30.0  # of the logits; a few classes need no sharper ones


def train_tiny_clip(
    path: str | os.PathLike[str],
    *,
    steps: int = 300,
    batch: int = 64,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Path:
    """Train a CLIP of ``TINY_SHAPE`` and write it to ``path`` (safetensors, see ``load_clip``).

    Every image shows one object or none; the loss is the cross-entropy of its caption among those
    of all seen classes, under a template that changes from step to step. on_step: (step, loss).
    """
    if steps < 1 or batch < 2:
        raise OpenTransError(f"steps={steps} must be 1 or more, batch={batch} 2 or more.")
    open_clip = optional_module("open_clip", COMES_FROM)
    captions = (BACKGROUND, *SEEN)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_clip(TINY_SHAPE).train()
        tokenizer = open_clip.SimpleTokenizer(context_length=TINY_SHAPE["text"]["context_length"])
        optimizer = torch.optim.AdamW(_groups(model), lr=2e-3)
        # At least two steps: the schedule divides by the length of its ramps.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
        drawn: dict[int, tuple[np.ndarray, int]] = {}
        for step in range(steps):
            numbers = [(step * batch + i) % POOL for i in range(batch)]
            for n in numbers:
                drawn.setdefault(n, _picture(n, captions, seed))
            images = normalise(np.stack([drawn[n][0] for n in numbers]))
            target = torch.tensor([drawn[n][1] for n in numbers])
            if step % 2:
                images = images.flip(3)
            template = TEMPLATES[step % len(TEMPLATES)]
            text = model.encode_text(tokenizer([template.replace("{}", c) for c in captions]))
            scale = model.logit_scale.exp().clamp(max=HIGHEST_SCALE)
            image = F.normalize(model.encode_image(images), dim=1)
            loss = F.cross_entropy(scale * image @ F.normalize(text, dim=1).T, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step + 1, float(loss.detach()))
    return save_clip(path, model, TINY_SHAPE)


def normalise(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3], RGB -> float32 [n, 3, H, W], as CLIP expects."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return ((pixels - mean) / std).contiguous()


def _picture(number: int, captions: tuple[str, ...], seed: int) -> tuple[np.ndarray, int]:
    """A close-up of caption ``number % len(captions)``, and the number of its caption."""
    which = number % len(captions)
    scene = draw_scene(
        captions[1:] if which == 0 else [captions[which]],
        size=TINY_SHAPE["vision"]["image_size"],
        count=(0, 0) if which == 0 else (1, 1),
        radius=RADIUS,
        seed=1_000_000_007 + seed * POOL + number,
    )
    return scene.image, captions.index(scene.names[0]) if scene.names else 0


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for norms, biases and the scale."""
    own = list(model.parameters())
    return [
        {"params": [p for p in own if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in own if p.dim() <= 1], "weight_decay": 0.0},
    ]
