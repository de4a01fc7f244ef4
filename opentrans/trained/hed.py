"""Published weights of the edge detector, as Keras stores them, into the module of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

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
                    wanted = getattr(conv, part)
                    stored = _array(file, key, tuple(wanted.shape), path)
                    if place == "block1/layers/conv2d" and part == "weight":
                        stored = stored.flip(1)
                    if not torch.isfinite(stored).all():
                        raise _other(path, f"has values at {key} that are not finite")
                    with torch.no_grad():
                        wanted.copy_(stored)
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # damage, each its own
        raise CheckpointError(
            f"{path} cannot be read as an HDF5 file ({error}). Fetch it again."
        ) from error
    return model.eval().requires_grad_(False)


def _array(
    file: Any, key: str, shape: tuple[int, ...], path: str | os.PathLike[str]
) -> torch.Tensor:
    """The array of a convolution, turned to PyTorch's ``shape``, which is compared before reading:
    a small file may announce any."""
    found = file.get(key)
    if found is None or not hasattr(found, "dtype") or found.dtype.kind != "f":
        raise _other(path, f"has no array of numbers at {key}")
    if found.external or found.file != file:
        raise _other(path, f"keeps the values of {key} in another file")
    kernel = len(shape) == 4
    kept = (*shape[2:], shape[1], shape[0]) if kernel else shape  # as Keras lays kernels
    if tuple(found.shape) != kept:
        raise _other(path, f"has shape {tuple(found.shape)} at {key}, not {kept}")
    stored = torch.from_numpy(found[()].astype("float32"))
    return stored.permute(3, 2, 0, 1) if kernel else stored


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
