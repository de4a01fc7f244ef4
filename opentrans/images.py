"""Batches of images from a folder, by step number, so that a continued run sees the same ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import optional_module

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "SUFFIXES",
    "ImageFolder",
    "Passes",
    "broken_image",
    "images_below",
    "open_image",
    "pillow",
    "square",
]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Of the images CLIP was trained on, per channel, values from 0 to 1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LEAST_AREA = 0.5  # of the image, of a random crop


class ImageFolder:
    """All images below a folder, cropped at random, as CLIP expects them.

    Args:
        source: folder, in which files of other kinds than ``SUFFIXES`` are passed over and hidden
            ones too; or a list of files.
        size: side in pixels of the square images returned.
        batch: images per batch; files repeat if there are fewer.
        seed: of order and crops.

    Raises OpenTransError if Pillow is missing, the folder does not exist or holds no image, or a
    file is no image (it is named).
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[Path],
        size: int,
        batch: int,
        *,
        seed: int = 0,
    ) -> None:
        pillow()
        self.size, self.batch_size, self.seed = size, batch, seed
        if size < 1 or batch < 1:
            raise OpenTransError(f"size={size} and batch={batch} must be whole numbers from 1.")
        if isinstance(source, str | os.PathLike):
            self.files = images_below(Path(source))
        else:
            self.files = list(source)
        if not self.files:
            raise OpenTransError(
                f"{source} holds no image. Name a folder with {', '.join(SUFFIXES)} files; "
                "folders inside it are searched too."
            )
        self._passes = Passes(len(self.files), seed)

    def __len__(self) -> int:
        return len(self.files)

    def check(self) -> None:
        """Read the header of every file. Raises OpenTransError naming the first that is broken."""
        for file in self.files:
            open_image(file).close()

    def batch(self, step: int) -> torch.Tensor:
        """Batch number ``step``: float32 [batch, 3, size, size], normalised for CLIP.

        Every file comes once per pass, in an order that differs from pass to pass. Raises
        OpenTransError naming a file that cannot be read.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        first = step * self.batch_size
        images = [self._image(first + i, generator) for i in range(self.batch_size)]
        pixels = torch.stack(images).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return ((pixels - mean) / std).contiguous()

    def _image(self, number: int, generator: torch.Generator) -> torch.Tensor:
        """uint8 [size, size, 3] of the ``number``-th image of all passes."""
        file = self.files[self._passes[number]]
        area, left, top, flip = torch.rand(4, generator=generator).tolist()
        with open_image(file) as image:
            side = min(image.size) * (LEAST_AREA + (1 - LEAST_AREA) * area) ** 0.5
            try:
                rgb = image.convert("RGB")
                return square(rgb, side, left, top, flip < 0.5, self.size)
            except Exception as error:  # a decoder may raise anything on a broken file
                raise broken_image(file, error) from error


class Passes:
    """Indices of ``count`` things, each once per pass, in an order that differs from pass to pass.

    ``passes[number]`` is the index at place ``number`` of all passes, the same in any process.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, number: int) -> int:
        turn, place = divmod(number, self.count)
        if self._order[0] != turn:
            shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 - 1 - turn)
            self._order = (turn, torch.randperm(self.count, generator=shuffle).tolist())
        return self._order[1][place]


def square(image: Any, side: float, left: float, top: float, flip: bool, size: int) -> torch.Tensor:
    """A square of an RGB image as uint8 [size, size, 3].

    side: of the square in pixels of the image. left, top: where it lies, from 0 to 1.
    """
    x, y = left * (image.width - side), top * (image.height - side)
    box = (x, y, x + side, y + side)
    cut = image.resize((size, size), pillow().Resampling.BICUBIC, box=box)
    pixels = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return pixels.flip(1) if flip else pixels


def images_below(folder: Path) -> list[Path]:
    """Files of the known kinds, hidden ones left out. Raises OpenTransError if it is no folder."""
    if not folder.is_dir():
        raise OpenTransError(
            f"{folder} is not a folder. Name one that holds images ({', '.join(SUFFIXES)})."
        )
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def pillow() -> Any:
    """``PIL.Image``. Raises OpenTransError with the fix where Pillow is missing."""
    return optional_module("PIL.Image", "images are read and written by Pillow")


def open_image(file: Path) -> Any:
    """Pillow's image. Raises OpenTransError naming a file that is none."""
    try:
        return pillow().open(file)
    except Exception as error:  # not only OSError: parsers of single formats raise others
        raise broken_image(file, error) from error


def broken_image(file: Path, error: Exception) -> OpenTransError:
    """The error for an image that cannot be read."""
    return OpenTransError(
        f"the image {file} cannot be read ({error}). Remove or replace it, then start the command "
        "again: it continues."
    )
