"""A trained network by its name: the module, and what turns photographs into its input."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.hed import MEAN_RGB
from opentrans_kernels.lazy import require_packages

from . import efficientnet, focus, resnet_half
from .catalog import Network, network
from .fetch import fetch
from .hed import load_hed

__all__ = ["Loaded", "load"]

Loader = Callable[[str | os.PathLike[str]], nn.Module]
Prepare = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loaded:
    """A trained network.

    ``module``: eval mode, float32, no gradients. ``prepare(images)``: uint8 RGB [B, 3, H, W] into
    the module's input, resized and cropped as it was for the training; raises OpenTransError for
    anything else.
    """

    network: Network
    module: nn.Module
    prepare: Prepare


def load(name: str, path: str | os.PathLike[str] | None = None) -> Loaded:
    """The trained network ``name`` of the catalog, fetched if it is not there yet.

    path: a weights file of one's own of the same form instead, which is not compared with the pin.
    Raises OpenTransError (no such network, what reads the file is not installed, it could not be
    fetched) or CheckpointError (the file is not this network's).
    """
    chosen = network(name)
    require_packages(dict(chosen.needs))
    loader, prepare = _LOADERS[name]
    module = loader(fetch(name) if path is None else Path(path))

    def prepared(images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise OpenTransError(
                f"{name} takes uint8 images [B, 3, H, W] in RGB, not {images.dtype} "
                f"{tuple(images.shape)}."
            )
        return prepare(images)

    return Loaded(chosen, module, prepared)


def _less_mean(images: Tensor) -> Tensor:
    return images.float() - _channels(MEAN_RGB, images)


def _cropped_less_mean(images: Tensor) -> Tensor:
    return _centre(_resized(images, (256, 256))) - _channels(resnet_half.MEAN_RGB, images)


def _cropped(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    scale = 256 / min(height, width)
    size = (max(256, round(height * scale)), max(256, round(width * scale)))
    return (_centre(_resized(images, size, "bicubic")) - 127) / 128


def _padded(images: Tensor) -> Tensor:
    """The longer side 224, black around."""
    height, width = images.shape[2:]
    scale = 224 / max(height, width)
    size = (max(1, int(height * scale)), max(1, int(width * scale)))
    x = _resized(images, size)
    top, left = (224 - size[0]) // 2, (224 - size[1]) // 2
    x = F.pad(x, (left, 224 - size[1] - left, top, 224 - size[0] - top)) / 255
    return (x - _channels(focus.MEAN, images)) / _channels(focus.STD, images)


def _resized(images: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    x = F.interpolate(images.float(), size, mode=mode, align_corners=False, antialias=True)
    return x.clamp(0, 255)


def _centre(x: Tensor, side: int = 224) -> Tensor:
    top, left = (x.shape[2] - side) // 2, (x.shape[3] - side) // 2
    return x[:, :, top : top + side, left : left + side]


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).view(1, 3, 1, 1)


_LOADERS: dict[str, tuple[Loader, Prepare]] = {
    "hed": (load_hed, _less_mean),
    "resnet50-half": (resnet_half.load_resnet_half, _cropped_less_mean),
    "efficientnet-lite0": (efficientnet.load_efficientnet_lite0, _cropped),
    "focus": (focus.load_focus, _padded),
}
