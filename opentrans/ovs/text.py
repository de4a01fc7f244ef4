"""Class names as a classifier: cosine similarity with cached, prompt-ensembled text embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import OpenTransError

from ..distill import TextCache

__all__ = ["TEMPLATES", "TextClassifier"]

# Prompt ensemble: the class in a picture, in a scene, small and large.
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "there is a {} in the scene.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a cropped photo of the {}.",
)
START_SCALE = 14.3  # 1 / 0.07, as CLIP starts
HIGHEST_SCALE = 100.0  # as CLIP limits its own


class TextClassifier(nn.Module):
    """Logits of embeddings for any list of class names.

    The embeddings of a vocabulary come from a TextCache: its frozen encoder runs once per
    vocabulary, and every later call is a look-up. The encoder is not part of this module: it is
    neither trained, nor moved, nor saved with it.

    Args:
        cache: embeddings of prompts; see :class:`~opentrans.distill.TextCache`.
        templates: prompts with ``{}`` for the class; their unit embeddings are averaged.
        scale: what cosines are multiplied with at the start, exp(``log_scale``); learned, at most
            100.
        cached: False runs the encoder at every call, as the published code does; for measuring.
    """

    def __init__(
        self,
        cache: TextCache,
        *,
        templates: Sequence[str] = TEMPLATES,
        scale: float = START_SCALE,
        cached: bool = True,
    ) -> None:
        super().__init__()
        if not 0.0 < scale <= HIGHEST_SCALE:
            raise OpenTransError(
                f"scale={scale} multiplies cosines and must lie in (0, {HIGHEST_SCALE:g}]; CLIP "
                f"starts at {START_SCALE}."
            )
        self.cache = cache
        self.templates = tuple(templates)
        self.cached = cached
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def scale(self) -> torch.Tensor:
        """What cosines are multiplied with now, a tensor of one number."""
        return self.log_scale.exp().clamp(max=HIGHEST_SCALE)

    def weights(self, classes: Sequence[str]) -> torch.Tensor:
        """Unit-length text embeddings [K, D] of the classes, on the encoder's device.

        Raises OpenTransError if a parameter of the encoder trains, or a name occurs twice.
        """
        if len(set(classes)) != len(classes):
            twice = sorted({name for name in classes if list(classes).count(name) > 1})
            raise OpenTransError(
                f"the vocabulary names {twice[0]!r} more than once, so two classes could not be "
                "told apart. Merge them, or give each its own name."
            )
        if not self.cached:
            self.cache.clear()
        return self.cache.vocabulary(classes, self.templates)

    def forward(self, embeddings: torch.Tensor, classes: Sequence[str]) -> torch.Tensor:
        """Logits for each class.

        embeddings: [B, D, H, W] (a map) -> [B, K, H, W], or [..., D] -> [..., K]. Computed in
        float32 under autocast. Raises OpenTransError if D is not the text's.
        """
        words = self.weights(classes).to(embeddings.device)
        image = embeddings.dim() == 4
        channels = embeddings.shape[1 if image else -1]
        if channels != words.shape[1]:
            raise OpenTransError(
                f"embeddings have {channels} channels, the text encoder's {words.shape[1]}. Build "
                f"the head with embed_dim={words.shape[1]}."
            )
        with torch.autocast(embeddings.device.type, enabled=False):
            values = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            scale = self.scale()
            words = words.to(values.dtype)
            if image:
                unit = F.normalize(values, dim=1)
                return scale * F.conv2d(unit, words[:, :, None, None])
            return scale * (F.normalize(values, dim=-1) @ words.T)
