"""The example: a tiny segmenter of coloured shapes, trained here in seconds, and pictures for it.

Everything about it is made up: shapes drawn on photographs, a network of width 16 that knows them
and nothing else. It shows how the command works, and that the pruned network runs accelerated.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.masks import atomic_write
from opentrans_kernels.synthetic import synthetic_masks

from ..images import pillow
from ..ovs.saved import Design, build_segmenter, save_segmenter
from ..ovs.segmenter import pixel_loss
from ..ovs.shapes import BACKGROUND, UNSEEN, draw_scene
from ..ovs.tiny import TINY_SHAPE, normalise
from .pictures import read_picture

__all__ = ["CLASSES", "train_example", "write_pictures"]

CLASSES = (BACKGROUND, *UNSEEN)
NOTE = "SYNTHETIC example: a toy trained for seconds on drawn shapes, no word on accuracy."
SIDE, SHOWN = 96, 384  # of the pictures it is trained on and shown on
STEPS, BATCH, RATE = 60, 6, 4e-3
PRUNED_AT, MASK = 0.4, "uniform:0.80"  # of the steps; of the weights, while the rest trains on
DESIGN = Design(
    clip=TINY_SHAPE,
    head="pixel",
    options={"shallow": ["res4", "res3", "res2"], "width": 48, "project": 24, "rates": [1, 2, 3]},
    templates=("a photo of a {}.",),
    size=SIDE,
    note=NOTE,
)
# Scenes of the pictures that are shown: never trained on.
SHOWN_SEED = 5_000_000


def train_example(
    path: Path,
    photos: Sequence[Path],
    *,
    steps: int = STEPS,
    on_step: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Train the toy and write it (``save_segmenter``). Same photographs and threads, same file.

    photos: backgrounds; without any they are drawn. on_step: (step, steps, text).
    """
    backgrounds = [_small(read_picture(file)) for file in photos]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_segmenter(DESIGN)
        encoder = model.classifier.cache.encoder
        tokens = model.classifier.cache.tokenizer(
            [DESIGN.templates[0].replace("{}", name) for name in CLASSES]
        )
        model.train().requires_grad_(True)
        text = [p.requires_grad_(True) for n, p in encoder.named_parameters() if "visual" not in n]
        own = [*model.parameters(), *text]
        optimizer = torch.optim.AdamW(own, lr=RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
        masks = None
        for step in range(steps):
            if step == round(PRUNED_AT * steps):
                masks = synthetic_masks(model.backbone.tower, MASK)
                masks.apply_(model.backbone.tower)
            scenes = [_scene(step * BATCH + i, backgrounds) for i in range(BATCH)]
            images = normalise(np.stack([image for image, _ in scenes]))
            labels = torch.from_numpy(np.stack([label for _, label in scenes]))
            # The text encoder learns along, so its embeddings must not come from the cache.
            words = F.normalize(encoder.encode_text(tokens), dim=1)
            found = F.normalize(model.head(model.backbone(images)), dim=1)
            logits = model.classifier.scale() * torch.einsum("bdhw,kd->bkhw", found, words)
            logits = F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False)
            loss = pixel_loss(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if masks is not None:
                masks.apply_(model.backbone.tower)
            if on_step is not None:
                on_step(step + 1, steps, f"loss {float(loss.detach()):.3f}")
    model.eval().requires_grad_(False)
    encoder.requires_grad_(False)
    return save_segmenter(path, model, DESIGN)


def write_pictures(folder: Path, photos: Sequence[Path], count: int = 4) -> list[Path]:
    """Draw ``count`` pictures into a folder; those that are there already are kept."""
    backgrounds = [_small(read_picture(file), SHOWN) for file in photos]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpenTransError(
            f"{folder} cannot be made ({error.strerror or error}). Name another folder: -o OUT."
        ) from error
    files = []
    for number in range(count):
        file = folder / f"shapes-{number + 1}.png"
        if not file.exists():
            image, _ = _scene(SHOWN_SEED + number, backgrounds, SHOWN, (2, 4))
            buffer = io.BytesIO()
            pillow().fromarray(image).save(buffer, format="png")
            atomic_write(file, buffer.getvalue())
        files.append(file)
    return files


def _scene(
    seed: int, backgrounds: Sequence[np.ndarray], size: int = SIDE, count: tuple[int, int] = (1, 3)
) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [size, size, 3], class numbers int64 [size, size]); drawn on a photograph if there
    are any, every other time while it trains."""
    scene = draw_scene(UNSEEN, size=size, count=count, seed=seed)
    labels = np.array([0, *(CLASSES.index(name) for name in scene.names)])[scene.objects]
    if not backgrounds or (size == SIDE and seed % 4 == 0):
        return scene.image, labels
    random = np.random.default_rng(seed)
    photo = backgrounds[int(random.integers(len(backgrounds)))]
    y, x = (int(random.integers(side - size + 1)) for side in photo.shape[:2])
    crop = photo[y : y + size, x : x + size]
    return np.where(scene.objects[..., None] > 0, scene.image, crop), labels


def _small(photo: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The photograph with a short side a little longer than a picture: crops show much of it."""
    scale = 1.3 * side / min(photo.shape[:2])
    size = round(photo.shape[1] * scale), round(photo.shape[0] * scale)
    image = pillow().fromarray(photo)
    return np.array(image.resize(size, pillow().Resampling.BILINEAR))
