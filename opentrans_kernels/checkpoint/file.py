"""The file of a sparse checkpoint: what stands in it, read, checked and unpacked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError
from ..masks import open_checkpoint
from ..masks.limits import Malformed, brief, parse_json
from ..masks.packed import is_shape
from ..topology import parameter_name
from ..towers import shapes_of

__all__ = [
    "DENSE", "DTYPES", "FORMAT_VERSION", "MASK", "METADATA_KEY", "PORTABLE", "VALUES", "digest",
    "read", "same_layout", "shapes_of_file", "unpack",
]  # fmt: skip

METADATA_KEY = "opentrans_accelerated"
#: The oldest one's hash covers the tensors only. The newest, written where it is needed, may lack
#: the plan and hold half precision.
FORMAT_VERSION, WITHOUT_HEADER, PORTABLE = 2, 1, 3
FIELDS = {"sha256": str, "shapes": dict, "masks_given": bool, "plan": dict}
DTYPES = {"float32": torch.float32, "float16": torch.float16}
VALUES, MASK, DENSE = "values/", "mask/", "dense/"


def read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, header) of a sparse checkpoint. Raises CheckpointError for any other file."""
    file = open_checkpoint(path)
    if METADATA_KEY not in file.metadata:
        raise CheckpointError(
            f"{path} is a {file.container} file, but not one that save_accelerated wrote. Load "
            "dense weights with load_state_dict, then call accelerate(model, masks)."
        )
    try:
        header = parse_json(file.metadata[METADATA_KEY])
    except Malformed as error:
        raise _damaged(path, f"its header is not readable: {error}") from error
    if not isinstance(header, dict) or "format_version" not in header:
        raise _damaged(path, "its header is not readable: it has no format version")
    version = header["format_version"]
    known = (WITHOUT_HEADER, FORMAT_VERSION, PORTABLE)
    if version not in known or isinstance(version, bool | float):
        raise CheckpointError(
            f"{path}: sparse checkpoint format version {brief(version)}, this version of "
            f"opentrans_kernels reads {known[0]} to {known[-1]}. Update opentrans_kernels."
        )
    stored = header.get("values")
    if version == PORTABLE and not (isinstance(stored, str) and stored in DTYPES):
        raise _damaged(path, f"its header is not readable: values is {brief(stored)}")
    for key, kind in FIELDS.items():
        left_out = key == "plan" and version == PORTABLE and header.get(key, 0) is None
        if not left_out and not isinstance(header.get(key), kind):
            raise _damaged(path, f"its header is not readable: {key} is {brief(header.get(key))}")
    if not isinstance(header.get("arch"), str | None):
        raise _damaged(path, f"its header is not readable: arch is {brief(header['arch'])}")
    if not all(is_shape(shape) for shape in header["shapes"].values()):
        raise _damaged(path, "its table of shapes holds something else")
    names = {key.removeprefix(MASK) for key in file.content if key.startswith(MASK)}
    if names != set(header["shapes"]):
        raise _damaged(path, "its table of shapes and its masks disagree")
    covered = None if version == WITHOUT_HEADER else header
    if digest(file.content, covered) != header["sha256"]:
        raise _damaged(path, "its content does not have the recorded SHA-256")
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
        values, packed = tensors.pop(VALUES + name, None), tensors.pop(MASK + name)
        count = math.prod(shape)
        sizes = packed.dtype == torch.uint8 and packed.shape == (-(-count // 8),)
        if not sizes or values is None or values.ndim != 1 or values.dtype != dtype:
            raise _damaged(path, f"the tensors of {name} do not have the recorded sizes")
        keep = torch.from_numpy(np.unpackbits(packed.numpy(), count=count).view(np.bool_))
        if int(torch.count_nonzero(keep)) != values.numel():
            raise _damaged(path, f"{name} has {values.numel()} values for another mask")
        weight = torch.zeros(count)
        weight[keep] = values.float()
        state[parameter_name(name, own)] = weight.view(shape)
        masks[name] = keep.view(shape)
    for key in [key for key in tensors if key.startswith(DENSE)]:
        state[key.removeprefix(DENSE)] = tensors.pop(key)
    for key, tensor in state.items():
        kinds = [one.is_floating_point() + 2 * one.is_complex() for one in (tensor, own[key])]
        if kinds[0] != kinds[1]:
            raise _damaged(path, f"{key} is {tensor.dtype}, in the model {own[key].dtype}")
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


def digest(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any] | None) -> str:
    """SHA-256 (hex) over the header, and names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256()
    if header is not None:
        covered = {key: value for key, value in header.items() if key != "sha256"}
        digest.update(json.dumps(covered, sort_keys=True).encode() + b"\n")
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _damaged(path: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a sparse checkpoint, but {what}: it was changed or damaged after it was "
        "written. Copy it again from its source, or save it again."
    )
