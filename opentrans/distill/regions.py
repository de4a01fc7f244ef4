"""Image regions: masks in image order, where to get them without labels, pooling under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from opentrans_kernels.errors import OpenTransError

__all__ = ["Regions", "pool_regions"]


@dataclass(frozen=True)
class Regions:
    """The regions of a batch of images.

    masks: [N, H, W], bool or floating (0 to 1), one per region, all at one resolution; those of
    image 0 first, then those of image 1, and so on. It need not be the images' resolution, only
    their aspect. counts: number of regions of each image, zeros included.

    Raises OpenTransError if the two disagree or a mask covers no pixel.
    """

    masks: torch.Tensor
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.masks.dim() != 3 or sum(self.counts) != len(self.masks):
            raise OpenTransError(
                f"regions: masks of shape {tuple(self.masks.shape)} for counts "
                f"{list(self.counts)}. Pass masks [N, height, width] and, per image, how many of "
                "the N belong to it."
            )
        if not (self.masks.dtype == torch.bool or self.masks.is_floating_point()):
            raise OpenTransError(
                f"regions: masks are {self.masks.dtype}. Pass bool masks, or floats from 0 to 1; "
                "a map of class numbers goes through Regions.from_labels."
            )
        covered = self.masks.flatten(1).sum(dim=1)
        if not bool((covered > 0).all()):
            empty = torch.nonzero(~(covered > 0)).flatten().tolist()
            raise OpenTransError(
                f"regions: {len(empty)} of {len(self.masks)} masks cover no pixel (first: number "
                f"{empty[0]}), so they have no embedding. Drop them, with their text and counts."
            )

    def __len__(self) -> int:
        return len(self.masks)

    @classmethod
    def from_masks(cls, per_image: Sequence[torch.Tensor]) -> Regions:
        """From one [n, H, W] tensor per image (n may be 0)."""
        if not per_image:
            raise OpenTransError("regions: no image. Pass one [n, H, W] tensor per image.")
        return cls(torch.cat(list(per_image)), tuple(len(masks) for masks in per_image))

    @classmethod
    def from_boxes(cls, per_image: Sequence[torch.Tensor], size: tuple[int, int]) -> Regions:
        """From one [n, 4] tensor of boxes (x0, y0, x1, y1) per image, x1 and y1 exclusive.

        size: (height, width) that the boxes refer to, in pixels.
        """
        device = per_image[0].device if per_image else None
        ys = torch.arange(size[0], device=device).view(1, -1, 1)
        xs = torch.arange(size[1], device=device).view(1, 1, -1)
        masks = []
        for boxes in per_image:
            x0, y0, x1, y1 = (edge.view(-1, 1, 1) for edge in boxes.view(-1, 4).unbind(1))
            masks.append((xs >= x0) & (xs < x1) & (ys >= y0) & (ys < y1))
        return cls.from_masks(masks)

    @classmethod
    def from_labels(
        cls, labels: torch.Tensor, *, ignore: int = 255
    ) -> tuple[Regions, torch.Tensor]:
        """One region per class that occurs in an image, and the class numbers [N].

        labels: [B, H, W] class numbers; pixels of class ``ignore`` belong to no region.
        """
        masks, classes = [], []
        for image in labels:
            found = image.unique()
            found = found[found != ignore]
            masks.append(image.unsqueeze(0) == found.view(-1, 1, 1))
            classes.append(found.long())
        return cls.from_masks(masks), torch.cat(classes)

    @classmethod
    def grid(
        cls,
        batch: int,
        size: tuple[int, int],
        *,
        levels: Sequence[int] = (1, 2, 3),
        device: torch.device | str | None = None,
    ) -> Regions:
        """The same boxes for each of ``batch`` images, for images without any annotation.

        Level n cuts the image of ``size`` (height, width) into n x n boxes; the default gives the
        whole image, its quarters and its ninths: 14 regions.
        """
        if not levels or min(levels) < 1 or max(levels) > min(size):
            raise OpenTransError(
                f"regions: levels {tuple(levels)} do not cut an image of {size[0]}x{size[1]} "
                f"pixels. Use whole numbers from 1 to {min(size)}, such as (1, 2, 3)."
            )
        boxes = [
            (column * size[1] // n, row * size[0] // n, (column + 1) * size[1] // n,
             (row + 1) * size[0] // n)
            for n in levels
            for row in range(n)
            for column in range(n)
        ]  # fmt: skip
        one = cls.from_boxes([torch.tensor(boxes, device=device)], size)
        return cls(one.masks.repeat(batch, 1, 1), one.counts * batch)

    def __getitem__(self, numbers: torch.Tensor) -> Regions:
        """The regions with these rising numbers ([n], CPU)."""
        if bool((numbers.diff() <= 0).any()):
            raise OpenTransError(
                "regions: numbers must rise, or regions would move to another image. Sort them."
            )
        counts = count_chosen(self.counts, numbers)
        return Regions(self.masks[numbers.to(self.masks.device)], counts)

    def to(self, device: torch.device | str) -> Regions:
        """The same regions on another device."""
        return self if self.masks.device == torch.device(device) else Regions(
            self.masks.to(device), self.counts
        )  # fmt: skip

    def image_of(self) -> torch.Tensor:
        """[N] number of the image each region belongs to, on the masks' device."""
        images = torch.arange(len(self.counts))
        return images.repeat_interleave(torch.tensor(self.counts)).to(self.masks.device)


def choose_sorted(
    total: int, limit: int, generator: torch.Generator | None = None
) -> torch.Tensor | None:
    """Rising numbers [limit] of a random subset of ``total`` regions; None: all of them fit.

    Sorted, because an unsorted draw would move regions to other images. Drawn on the CPU from
    ``generator`` (None: torch's global one), so a resumed run repeats it.
    """
    if total <= limit:
        return None
    return torch.randperm(total, generator=generator)[:limit].sort().values


def count_chosen(counts: Sequence[int], numbers: torch.Tensor) -> tuple[int, ...]:
    """Regions per image among the chosen ``numbers`` ([n], rising, CPU)."""
    image = torch.searchsorted(torch.tensor(counts).cumsum(0), numbers, right=True)
    return tuple(torch.bincount(image, minlength=len(counts)).tolist())


def pool_regions(features: torch.Tensor, regions: Regions) -> torch.Tensor:
    """Mean feature of each region: [B, C, h, w] -> [N, C], at least float32.

    Masks are brought to h x w by averaging areas, so a region smaller than a feature cell still
    has its share of it. Differentiable in ``features``; with no region the result is [0, C] and
    still depends on them. Raises OpenTransError if the number of images differs.
    """
    if features.dim() != 4 or len(features) != len(regions.counts):
        raise OpenTransError(
            f"features of shape {tuple(features.shape)} for regions of {len(regions.counts)} "
            "images. Pass a map [images, channels, height, width] of the same batch."
        )
    wide = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        weights = regions.masks.to(features.device, wide).unsqueeze(1)
        if len(weights):
            weights = F.adaptive_avg_pool2d(weights, features.shape[-2:])
            weights = weights / weights.sum(dim=(2, 3), keepdim=True)
        else:
            weights = weights.new_zeros(0, 1, *features.shape[-2:])
        flat = features.to(wide).flatten(2)  # [B, C, h*w]
        parts = zip(weights.flatten(1).split(list(regions.counts)), flat, strict=True)
        return torch.cat([share @ values.T for share, values in parts])
