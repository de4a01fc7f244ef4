"""The file of a sparse checkpoint (``save_accelerated``): what stands in it, checked, and unpacked
without the model.

The masks floor reads it too, so that such a file is a mask file and a checkpoint like any other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks.files import CheckpointFile
from opentrans_kernels.masks.limits import Malformed, brief, parse_json
from opentrans_kernels.masks.packed import is_shape
from opentrans_kernels.topology.linears import parameter_name

__all__ = [
    "DENSE", "DTYPES", "FORMAT_VERSION", "MASK", "METADATA_KEY", "PORTABLE", "VALUES",
    "damaged", "digest", "expanded", "header_of", "is_sparse", "unpack_layer",
]  # fmt: skip

METADATA_KEY = "opentrans_accelerated"
#: The oldest one's hash covers the tensors only. The newest, written where it is needed, may lack
#: the plan and hold half precision.
FORMAT_VERSION, WITHOUT_HEADER, PORTABLE = 2, 1, 3
FIELDS = {"sha256": str, "shapes": dict, "masks_given": bool, "plan": dict}
DTYPES = {"float32": torch.float32, "float16": torch.float16}
VALUES, MASK, DENSE = "values/", "mask/", "dense/"


def is_sparse(file: CheckpointFile) -> bool:
    """Whether ``save_accelerated`` wrote it."""
    return METADATA_KEY in file.metadata


def header_of(file: CheckpointFile) -> dict[str, Any]:
    """The checked header of a sparse checkpoint. Raises CheckpointError if it was damaged."""
    path = file.path
    try:
        header = parse_json(file.metadata[METADATA_KEY])
    except Malformed as error:
        raise damaged(path, f"its header is not readable: {error}") from error
    if not isinstance(header, dict) or "format_version" not in header:
        raise damaged(path, "its header is not readable: it has no format version")
    version = header["format_version"]
    known = (WITHOUT_HEADER, FORMAT_VERSION, PORTABLE)
    if version not in known or isinstance(version, bool | float):
        raise CheckpointError(
            f"{path}: sparse checkpoint format version {brief(version)}, this version of "
            f"opentrans_kernels reads {known[0]} to {known[-1]}. Update opentrans_kernels."
        )
    stored = header.get("values")
    if version == PORTABLE and not (isinstance(stored, str) and stored in DTYPES):
        raise damaged(path, f"its header is not readable: values is {brief(stored)}")
    for key, kind in FIELDS.items():
        left_out = key == "plan" and version == PORTABLE and header.get(key, 0) is None
        if not left_out and not isinstance(header.get(key), kind):
            raise damaged(path, f"its header is not readable: {key} is {brief(header.get(key))}")
    if not isinstance(header.get("arch"), str | None):
        raise damaged(path, f"its header is not readable: arch is {brief(header['arch'])}")
    if not all(is_shape(shape) for shape in header["shapes"].values()):
        raise damaged(path, "its table of shapes holds something else")
    names = {key.removeprefix(MASK) for key in file.content if key.startswith(MASK)}
    if names != set(header["shapes"]):
        raise damaged(path, "its table of shapes and its masks disagree")
    covered = None if version == WITHOUT_HEADER else header
    if digest(file.content, covered) != header["sha256"]:
        raise damaged(path, "its content does not have the recorded SHA-256")
    return header


def expanded(file: CheckpointFile) -> CheckpointFile:
    """The same file with a plain state dict, zeros written out in float32, and its masks."""
    header = header_of(file)
    tensors, portable = dict(file.content), header["format_version"] == PORTABLE
    dtype = DTYPES[header["values"]] if portable else torch.float32
    state = {k.removeprefix(DENSE): t for k, t in tensors.items() if k.startswith(DENSE)}
    masks: dict[str, torch.Tensor] = {}
    for name, shape in header["shapes"].items():
        weight, masks[name] = unpack_layer(file.path, name, shape, tensors, dtype)
        # An attention's packed projection is told from a module of that name by its bias, or by
        # the projection beside it.
        beside = f"{name.rpartition('.')[0]}.out_proj".lstrip(".")
        packed = (
            f"{name}_bias" in state or beside in header["shapes"] or f"{beside}.weight" in state
        )
        state[parameter_name(name, {f"{name}_weight"} if packed else ())] = weight
    return replace(file, content=state, masks=masks)


def unpack_layer(
    path: str, name: str, shape: list[int], tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 weight, bool mask) of one layer, whose entries are taken out of ``tensors``."""
    values, packed = tensors.pop(VALUES + name, None), tensors.pop(MASK + name)
    count = math.prod(shape)
    sizes = packed.dtype == torch.uint8 and packed.shape == (-(-count // 8),)
    if not sizes or values is None or values.ndim != 1 or values.dtype != dtype:
        raise damaged(path, f"the tensors of {name} do not have the recorded sizes")
    keep = torch.from_numpy(np.unpackbits(packed.numpy(), count=count).view(np.bool_))
    if int(torch.count_nonzero(keep)) != values.numel():
        raise damaged(path, f"{name} has {values.numel()} values for another mask")
    weight = torch.zeros(count)
    weight[keep] = values.float()
    return weight.view(shape), keep.view(shape)


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


def damaged(path: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a sparse checkpoint, but {what}: it was changed or damaged after it was "
        "written. Copy it again from its source, or save it again."
    )
