"""A recipe becomes a model that segments: loaded, masked, accelerated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from opentrans_kernels.heads import accelerate_heads
from opentrans_kernels.heads.parts import head_parts

from ..d2.attachment import attach
from ..images import pillow
from .labels import labels_of
from .plain import STRIDE, Loaded, load_plain
from .recipe import Recipe

__all__ = ["Segmenter", "build", "describe", "network_size"]


@dataclass
class Segmenter:
    """A built model.

    name: of the architecture. notes: what must be said about the results. report: what was masked
    and accelerated, as text.
    """

    recipe: Recipe
    loaded: Loaded
    notes: list[str] = field(default_factory=list)
    report: str = ""

    @property
    def name(self) -> str:
        return self.loaded.name

    def labels(self, pixels: np.ndarray) -> np.ndarray:
        """RGB uint8 [H, W, 3] -> a label per pixel, uint8 or uint16 [H, W].

        Raises OpenTransError for scores that are not finite.
        """
        height, width = pixels.shape[:2]
        size = network_size(height, width, self.loaded.size, self.loaded.longest)
        resized = pixels
        if size != (height, width):
            image = pillow().fromarray(pixels)
            resized = np.array(image.resize((size[1], size[0]), pillow().Resampling.BILINEAR))
        with torch.inference_mode():
            scores = self.loaded.scores(resized)
            return labels_of(scores.float().cpu(), (height, width), least=self.recipe.least)


def network_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """(height, width) a picture is brought to: its short side to ``short``, unless the long one
    would exceed ``longest``; at least one pixel."""
    scale = min(short / min(height, width), longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def build(recipe: Recipe) -> Segmenter:
    """Load, mask and accelerate.

    Raises OpenTransError of the kind that fits: a file that cannot be used, a package that is
    missing, a mask of another tower, a model that cannot take the classes.
    """
    torch.set_num_threads(recipe.threads)
    loaded = _load(recipe)
    model = loaded.model.eval()
    mask = recipe.mask if recipe.mask is not None else loaded.mask
    notes = [loaded.note] if loaded.note else []
    if not recipe.accelerate and mask is None:
        return Segmenter(recipe, loaded, notes, f"{loaded.name}, runs densely, no mask applied")
    size = _padded(loaded.size), _padded(loaded.size * 4 // 3)
    with torch.no_grad():
        done = attach(
            model,
            mask,
            accelerate="auto" if recipe.accelerate else False,
            input_size=size,
            threads=recipe.threads,
        )
        lines = [f"{loaded.name}: {done}"]
        if recipe.accelerate and not head_parts(model):
            lines.append(str(accelerate_heads(model)))
    if done.masks is not None and done.masks.source.synthetic:
        notes.append(f"SYNTHETIC mask {mask}: what is shown is not what a trained mask would give")
    return Segmenter(recipe, loaded, notes, "\n".join(lines))


def _load(recipe: Recipe) -> Loaded:
    if recipe.config is None:
        return load_plain(recipe)
    from .detectron import load_detectron

    return load_detectron(recipe)


def _padded(side: int) -> int:
    return -(-side // STRIDE) * STRIDE


def describe(segmenter: Segmenter) -> dict[str, Any]:
    """Plain values about a built model, as workers report them."""
    return {"name": segmenter.name, "notes": segmenter.notes, "report": segmenter.report}
