"""Published weights of the edge detector, as Keras stores them, into the module of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import nn

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.hed import Hed
from opentrans_kernels.lazy import optional_module

__all__ = ["load_hed"]


def load_hed(path: str | os.PathLike[str], model: Hed | None = None) -> Hed:
    """The edge detector with the weights of a Keras ``.weights.h5`` file, eval mode, no gradients.

    Keras keeps convolutions as [height, width, in, out] and expects BGR; both are turned, so that
    the module takes RGB.

    Args:
        model: another shape of the same network; by default the published one.

    Raises CheckpointError if the file is not one of this network, and OpenTransError if h5py is
    missing.
    """
    h5py = optional_module("h5py", "the weights are an HDF5 file")
    model = Hed() if model is None else model
    try:
        with h5py.File(os.fspath(path), "r") as file:
            for place, conv in _convolutions(model):
                for part, number in (("weight", 0), ("bias", 1)):
                    key = f"{place}/vars/{number}"
                    if not isinstance(file.get(key), h5py.Dataset):
                        raise _other(path, f"has no array {key}")
                    stored = torch.from_numpy(file[key][()]).float()
                    if part == "weight" and stored.dim() == 4:
                        stored = stored.permute(3, 2, 0, 1)
                    if place == "block1/layers/conv2d" and part == "weight":
                        stored = stored.flip(1)
                    wanted = getattr(conv, part)
                    if stored.shape != wanted.shape:
                        raise _other(
                            path,
                            f"has shape {tuple(stored.shape)} at {key}, not {tuple(wanted.shape)}",
                        )
                    if not torch.isfinite(stored).all():
                        raise _other(path, f"has values at {key} that are not finite")
                    with torch.no_grad():
                        wanted.copy_(stored)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read as an HDF5 file ({error}). Fetch it again."
        ) from error
    return model.eval().requires_grad_(False)


def _convolutions(model: Hed) -> Iterator[tuple[str, nn.Conv2d]]:
    """Where Keras keeps each convolution: numbered within its block, the first without a number."""
    for number, block in enumerate(model.blocks, 1):
        convs = [layer for layer in block if isinstance(layer, nn.Conv2d)]
        for i, conv in enumerate(convs):
            yield f"block{number}/layers/conv2d" + (f"_{i}" if i else ""), conv
        yield f"dsn{number}", model.sides[number - 1]
    yield "fuse", model.fuse


def _other(path: str | os.PathLike[str], what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no weights file of the edge detector: it {what}. Fetch the published one."
    )
