"""A trained network by its name: the module, and what turns photographs into its input."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.hed import MEAN_RGB
from opentrans_kernels.lazy import require_packages

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
    return images.float() - torch.tensor(MEAN_RGB, device=images.device).view(1, 3, 1, 1)


_LOADERS: dict[str, tuple[Loader, Prepare]] = {"hed": (load_hed, _less_mean)}
