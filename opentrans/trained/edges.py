"""The edge detector at work: a photograph, the map of its edges, and pictures of both."""

from __future__ import annotations

import io
import os

import numpy as np
import torch
from torch import nn

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.hed import MEAN_RGB, Hed
from opentrans_kernels.lazy import optional_module

from ..images import pillow
from .cache import is_cached
from .catalog import network
from .fetch import place_of
from .hed import load_hed

__all__ = ["cached_hed", "edge_map", "photograph", "png", "read_map"]

HEIGHT, WIDTH = 320, 480  # as in BSDS500, whose photographs it was trained on


def photograph() -> torch.Tensor:
    """The middle of scikit-image's photograph of a cup of coffee: uint8 [3, 320, 480], RGB.

    Raises OpenTransError if scikit-image is missing.
    """
    data = optional_module("skimage.data", "the photograph is one of scikit-image's")
    picture = torch.from_numpy(np.array(data.coffee())).permute(2, 0, 1)
    top, left = (picture.shape[1] - HEIGHT) // 2, (picture.shape[2] - WIDTH) // 2
    return picture[:, top : top + HEIGHT, left : left + WIDTH].contiguous()


def edge_input(photo: torch.Tensor) -> torch.Tensor:
    """What the network takes: float32 [1, 3, H, W] of uint8 [3, H, W]."""
    return (photo.float() - torch.tensor(MEAN_RGB).view(3, 1, 1))[None]


def edge_map(model: nn.Module, photo: torch.Tensor) -> torch.Tensor:
    """Probability of an edge at every pixel, float32 [H, W], of a photograph uint8 [3, H, W]."""
    with torch.no_grad():
        return torch.sigmoid(model(edge_input(photo)))[0, 0].contiguous()


def cached_hed() -> Hed | None:
    """The dense network, if ``fetch("hed")`` has fetched its weights before; nothing is fetched.

    Raises OpenTransError if h5py is missing, CheckpointError if the file there is another one.
    """
    chosen = network("hed")
    place = place_of(chosen)
    return load_hed(place) if is_cached(place, chosen.sha256) else None


def png(picture: torch.Tensor) -> bytes:
    """A PNG file of uint8 [3, H, W] in RGB, or of a map float32 [H, W] from 0 to 1, in grey."""
    if picture.is_floating_point():
        pixels = (255 * picture.clamp(0, 1)).round().to(torch.uint8)
    else:
        pixels = picture.permute(1, 2, 0)
    buffer = io.BytesIO()
    pillow().fromarray(pixels.contiguous().numpy()).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def read_map(path: str | os.PathLike[str], size: tuple[int, int]) -> torch.Tensor:
    """A map that ``png`` wrote: float32 [H, W] from 0 to 1, in steps of 1/255.

    Raises CheckpointError if the file is no grey picture of ``size`` (height, width).
    """
    try:
        with pillow().open(path) as image:
            if image.mode != "L" or image.size != size[::-1]:
                raise CheckpointError(
                    f"{path} is a picture of mode {image.mode} and {image.height}x{image.width} "
                    f"pixels, not a grey one of {size[0]}x{size[1]}. Install the package again."
                )
            pixels = np.array(image)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read as a picture ({error}). Install the package again."
        ) from error
    return torch.from_numpy(pixels).float() / 255
