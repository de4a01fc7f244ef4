"""How masks at full size follow from small ones, so that they are made late, or never."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ops.mask_scores import mask_scores
from ..ops.mask_scores.reference import resized

__all__ = ["Pair", "Recipe", "crop_of"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """Masks ``source`` [N, Q, h, w] resized, cut, resized again, and put through a sigmoid.

    source: contiguous. images: whether the result has the dimension of images, which is 1
    otherwise. Methods that add a step return None where the result would be no such recipe.
    """

    source: torch.Tensor
    size: Pair | None = None
    crop: Pair | None = None
    resize: Pair | None = None
    sigmoid: bool = False
    images: bool = True

    @property
    def pixels(self) -> Pair:
        """Height and width of the result."""
        height, width = self.resize or self.crop or self.size or self.source.shape[2:]
        return height, width

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (*self.source.shape[:2], *self.pixels)
        return shape if self.images else shape[1:]

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of the tensor this stands for: dense, but for what is cut from a larger one."""
        height, width = self.pixels
        if self.crop and not (self.resize or self.sigmoid):
            height, width = self.size or self.source.shape[2:]
        strides = (self.source.shape[1] * height * width, height * width, width, 1)
        return strides if self.images else strides[1:]

    def _steps(self) -> tuple[Sequence[int], ...]:
        return tuple(step or () for step in (self.size, self.crop, self.resize))

    def tensor(self) -> torch.Tensor:
        """The result, by the same operations of torch that were asked for."""
        full = resized(self.source, *self._steps())
        if self.sigmoid:
            own = self.resize or (self.size and not self.crop)  # neither the source nor a view
            full = full.sigmoid_() if own else full.sigmoid()
        return full if self.images else full[0]

    def scores(self, classes: torch.Tensor) -> torch.Tensor:
        """[N, K, H, W] for classes [N, Q, K]; the recipe ends with a sigmoid."""
        size, crop, resize = (step or None for step in self._steps())
        return mask_scores(self.source, classes, size=size, crop=crop, resize=resize)

    def resized(self, size: Pair) -> Recipe | None:
        if not self.images or self.sigmoid or self.resize or min(size) < 1:
            return None
        if self.size is None and self.crop is None:
            return replace(self, size=size)
        return replace(self, resize=size)

    def cut(self, size: Pair) -> Recipe | None:
        height, width = (min(a, b) for a, b in zip(size, self.pixels, strict=True))
        if self.sigmoid or self.resize or min(height, width) < 1:
            return None
        return replace(self, crop=(height, width))

    def squashed(self) -> Recipe | None:
        return None if self.sigmoid else replace(self, sigmoid=True)

    def image(self, index: int) -> Recipe | None:
        count = self.source.shape[0]
        if not self.images or not -count <= index < count:
            return None
        index %= count
        return replace(self, source=self.source[index : index + 1], images=False)

    def as_batch(self) -> Recipe | None:
        return None if self.images else replace(self, images=True)

    def queries(self, index: torch.Tensor) -> Recipe | None:
        """Some queries: a mask of them, or numbers."""
        if self.images or index.dim() != 1 or index.device != self.source.device:
            return None
        if index.dtype == torch.bool:
            if len(index) != self.source.shape[1]:
                return None
        elif index.dtype != torch.int64:
            return None
        return replace(self, source=self.source[:, index])


def crop_of(index: Any, dims: int) -> Pair | None:
    """(height, width) of ``[..., :height, :width]``; None for anything else."""
    if not isinstance(index, tuple):
        return None
    if index[:1] == (Ellipsis,):
        index = (slice(None),) * (dims - len(index) + 1) + index[1:]
    if len(index) != dims or any(step != slice(None) for step in index[:-2]):
        return None
    stops = []
    for step in index[-2:]:
        if not isinstance(step, slice) or step.start not in (None, 0) or step.step not in (None, 1):
            return None
        try:
            stops.append(operator.index(1 << 40 if step.stop is None else step.stop))
        except TypeError:
            return None
    return (stops[0], stops[1]) if min(stops) > 0 else None
