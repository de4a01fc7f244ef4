"""A sparse checkpoint opened, and unpacked for the model that it was saved from."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from ..masks import open_checkpoint
from ..masks.sparse_file import (
    DENSE,
    DTYPES,
    PORTABLE,
    damaged,
    header_of,
    is_sparse,
    unpack_layer,
)
from ..topology import parameter_name
from ..towers import shapes_of

__all__ = ["read", "same_layout", "shapes_of_file", "unpack"]


def read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, header) of a sparse checkpoint. Raises CheckpointError for any other file."""
    file = open_checkpoint(path)
    if not is_sparse(file):
        raise CheckpointError(
            f"{path} is a {file.container} file, but not one that save_accelerated wrote. Load "
            "dense weights with load_state_dict, then call accelerate(model, masks)."
        )
    header = header_of(file)
    return dict(file.content), header


def unpack(
    path: str,
    tensors: dict[str, torch.Tensor],
    header: Mapping[str, Any],
    own: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(dense state dict, masks) for a model with the state dict ``own``. Consumes ``tensors``."""
    masks: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    portable = header["format_version"] == PORTABLE
    dtype = DTYPES[header["values"]] if portable else torch.float32
    same_layout(path, shapes_of(own), shapes_of_file(tensors, header, own))
    for name, shape in header["shapes"].items():
        weight, masks[name] = unpack_layer(path, name, shape, tensors, dtype)
        state[parameter_name(name, own)] = weight
    for key in [key for key in tensors if key.startswith(DENSE)]:
        state[key.removeprefix(DENSE)] = tensors.pop(key)
    for key, tensor in state.items():
        kinds = [one.is_floating_point() + 2 * one.is_complex() for one in (tensor, own[key])]
        if kinds[0] != kinds[1]:
            raise damaged(path, f"{key} is {tensor.dtype}, in the model {own[key].dtype}")
    return state, masks


def same_layout(
    path: str, own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> None:
    missing, extra = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or extra:
        raise CheckpointError(
            f"{path} holds another architecture: {len(missing)} tensors of the model are not in it "
            f"{missing[:3]}, {len(extra)} of its tensors are not in the model {extra[:3]}. Build "
            "the architecture it was saved from."
        )
    wrong = [key for key in own if own[key] != given[key]]
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"{path} holds another architecture: {len(wrong)} tensors have other shapes, {key} is "
            f"{given[key]} in the file and {own[key]} in the model. Build the architecture it was "
            "saved from."
        )


def shapes_of_file(
    tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any], own: Container[str]
) -> dict[str, tuple[int, ...]]:
    """Dense shapes of every entry, whole and sparse, of a model with the keys ``own``."""
    whole = {k.removeprefix(DENSE): t for k, t in tensors.items() if k.startswith(DENSE)}
    sparse = {parameter_name(n, own): tuple(shape) for n, shape in header["shapes"].items()}
    return shapes_of(whole) | sparse
