"""Pixels of photographs, whole and as random crops by step number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opentrans.images import Passes, pillow, square
from opentrans_kernels.errors import OpenTransError

from .photographs import Photograph, upright

__all__ = ["Crops", "pixels"]

LEAST_SCALE = 0.25  # of the image's shorter side, of a random crop


def pixels(photo: Photograph, longest: int = 480) -> Tensor:
    """uint8 RGB [3, H, W] of a photograph, its longer side at most ``longest`` pixels.

    Smaller ones stay as they are. Raises OpenTransError if the file cannot be read.
    """
    if longest < 1:
        raise OpenTransError(f"longest={longest} must be a whole number from 1.")
    image = upright(photo.path)
    image.thumbnail((longest, longest), pillow().Resampling.LANCZOS)
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


class Crops:
    """Random square crops of photographs, the same for the same step number in any process.

    Every photograph comes once per pass. A crop's side is 0.25 to 1 of the photograph's shorter
    side, scaled to ``size``; half of the crops are mirrored. Photographs stay in memory once read.

    Args:
        photos: from :func:`photographs` or :func:`folder_photographs`.
        size: side in pixels of the crops returned.
        batch: crops per batch; photographs repeat if there are fewer.
        seed: of order and crops.

    Raises OpenTransError if there is no photograph, or a size or batch below 1.
    """

    def __init__(self, photos: Sequence[Photograph], size: int, batch: int, seed: int = 0) -> None:
        if size < 1 or batch < 1:
            raise OpenTransError(f"size={size} and batch={batch} must be whole numbers from 1.")
        if not photos:
            raise OpenTransError("there is no photograph to cut crops from. Give at least one.")
        self.photos, self.size, self.batch_size, self.seed = list(photos), size, batch, seed
        self._passes = Passes(len(self.photos), seed)
        self._read: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.photos)

    def batch(self, step: int) -> Tensor:
        """Batch number ``step``: uint8 RGB [batch, 3, size, size].

        Raises OpenTransError naming a file that cannot be read.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        crops = [self._crop(step * self.batch_size + i, generator) for i in range(self.batch_size)]
        return torch.stack(crops).permute(0, 3, 1, 2).contiguous()

    def _crop(self, number: int, generator: torch.Generator) -> Tensor:
        index = self._passes[number]
        if index not in self._read:
            self._read[index] = upright(self.photos[index].path)
        image = self._read[index]
        scale, left, top, flip = torch.rand(4, generator=generator).tolist()
        side = min(image.size) * (LEAST_SCALE + (1 - LEAST_SCALE) * scale)
        return square(image, side, left, top, flip < 0.5, self.size)
