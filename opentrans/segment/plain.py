"""Segmenters of ``opentrans.ovs`` from one file, without detectron2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..ovs.saved import load_segmenter
from ..ovs.segmenter import PixelSegmenter
from ..ovs.text_store import load_vocabulary
from ..ovs.tiny import normalise
from .recipe import Recipe

__all__ = ["Loaded", "load_plain"]

STRIDE = 32  # of the deepest feature; pictures are padded to multiples
LONGEST = 4  # times the short side, of a picture that is stretched out


@dataclass(frozen=True)
class Loaded:
    """A model as the rest of this package uses it.

    model: in eval mode. scores: resized RGB pixels uint8 [h, w, 3] -> [K, h', w'], at that size or
    a smaller one. size, longest: sides in pixels the short side is brought to, and the long side
    must not exceed. name, note: what it is, and what must be said about it. mask: the
    config's own.
    """

    model: nn.Module
    scores: Callable[[np.ndarray], torch.Tensor]
    size: int
    longest: int
    name: str
    note: str = ""
    mask: str | None = None


def load_plain(recipe: Recipe) -> Loaded:
    """The segmenter of a file. Raises CheckpointError for another file or a damaged one."""
    model, design = load_segmenter(recipe.weights)
    classes = recipe.classes
    load_vocabulary(model.classifier, classes, recipe.text_cache)
    pixels_are_named = isinstance(model, PixelSegmenter)

    def scores(pixels: np.ndarray) -> torch.Tensor:
        height, width = pixels.shape[:2]
        image = F.pad(normalise(pixels[None]), (0, -width % STRIDE, 0, -height % STRIDE))
        found = model(image, classes)[0, :, :height, :width]
        return found.softmax(0) if pixels_are_named else found

    size = recipe.size or design.size
    return Loaded(model, scores, size, LONGEST * size, type(model).__name__, design.note)
