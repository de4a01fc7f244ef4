"""The bit-packed mask file: safetensors, one uint8 tensor of ceil(n / 8) bytes per mask.

Bits are in ``numpy.packbits`` order (first weight in the highest bit), weights in the order of the
dense tensor. One metadata entry holds JSON: format version, shape of every mask, provenance and a
SHA-256 over names, shapes and bits, checked on every load. An RN50 takes 2.9 MB instead of 94 MB.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks.atomic import atomic_write
from opentrans_kernels.masks.limits import brief, parse_json

METADATA_KEY = "opentrans_masks"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Provenance:
    """Where a mask set comes from.

    ``kind``: the reader that understood the file, or "synthetic", "model zeros", "memory".
    ``path``: the file; ``sha256``: hash of its bytes (hex). ``notes``: what the reader wants to
    tell (entries it ignored, the origin of a packed file). ``synthetic``: not from training.
    """

    kind: str
    path: str | None = None
    sha256: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    synthetic: bool = False

    def __str__(self) -> str:
        label = "SYNTHETIC " if self.synthetic else ""
        where = f" from {self.path}" if self.path else ""
        notes = "".join(f"; {key}: {value}" for key, value in self.notes.items())
        return f"{label}{self.kind}{where}{notes}"


def pack_bits(mask: torch.Tensor) -> np.ndarray:
    """Bool tensor of any shape -> uint8 [ceil(numel / 8)], first element in the highest bit."""
    return np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1))


def content_hash(shapes: Mapping[str, tuple[int, ...]], bits: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over sorted names, shapes and packed bits: equal masks, equal hash."""
    digest = hashlib.sha256(b"opentrans masks 1\n")
    for name in sorted(shapes):
        header = json.dumps([name, list(shapes[name])], ensure_ascii=True)
        digest.update(header.encode("ascii") + b"\n")
        digest.update(bits[name].tobytes())
    return digest.hexdigest()


def write_packed(
    path: str | os.PathLike[str],
    masks: Mapping[str, torch.Tensor],
    source: Provenance,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write masks (name -> bool tensor) to ``path``, all or nothing.

    ``provenance`` adds text entries (who, which training run). The same input gives the same
    bytes. Raises CheckpointError if the path cannot be written; an existing file then stays.
    """
    from safetensors.torch import save

    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    bits = {name: pack_bits(mask) for name, mask in masks.items()}
    header = {
        "format_version": FORMAT_VERSION,
        "content_sha256": content_hash(shapes, bits),
        "shapes": {name: list(shape) for name, shape in sorted(shapes.items())},
        "order": list(masks),
        "synthetic": source.synthetic,
        "provenance": _origin(source) | {k: str(v) for k, v in (provenance or {}).items()},
    }
    tensors = {name: torch.from_numpy(array) for name, array in bits.items()}
    # One metadata entry only: safetensors does not keep the order of several.
    atomic_write(path, save(tensors, {METADATA_KEY: json.dumps(header, sort_keys=True)}))


def _origin(source: Provenance) -> dict[str, str]:
    """What a packed file tells about its source; a packed source hands its own origin on."""
    origin = dict(source.notes)
    if source.kind != "packed":
        origin["origin_kind"] = source.kind
        if source.path:
            origin["origin_file"] = Path(source.path).name  # no folders: they may be private
        if source.sha256:
            origin["origin_sha256"] = source.sha256
    return origin


def is_packed(metadata: Mapping[str, str] | None) -> bool:
    """Whether safetensors metadata is that of a packed mask file."""
    return METADATA_KEY in (metadata or {})


def unpack(
    tensors: Mapping[str, Any], metadata: Mapping[str, str], path: str
) -> tuple[dict[str, torch.Tensor], dict[str, str], bool]:
    """Checked masks, provenance notes and the synthetic flag of a packed file's content.

    Raises MaskError if anything disagrees: version, names, sizes, or the content hash.
    """
    shapes, header = _read_header(metadata, path)
    if set(shapes) != set(tensors):
        odd = sorted(set(shapes) ^ set(tensors))
        raise _damaged(path, f"its table of shapes and its tensors disagree about {odd[:5]}")
    bits: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        tensor, expected = tensors[name], -(-math.prod(shape) // 8)
        if tensor.dtype != torch.uint8 or tuple(tensor.shape) != (expected,):
            raise _damaged(
                path,
                f"mask {name!r} of shape {shape} needs {expected} bytes, the file has "
                f"{tuple(tensor.shape)} of {tensor.dtype}",
            )
        bits[name] = tensor.numpy()
    found = content_hash(shapes, bits)
    if found != header["content_sha256"]:
        recorded = header["content_sha256"]
        raise _damaged(path, f"its content hash is {found[:12]}, not the recorded {recorded[:12]}")
    masks = {}
    for name in header["order"]:
        count = math.prod(shapes[name])
        flat = np.unpackbits(bits[name], count=count).view(np.bool_)
        masks[name] = torch.from_numpy(flat).reshape(shapes[name])
    return masks, header["provenance"], header["synthetic"]


def _read_header(
    metadata: Mapping[str, str], path: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    try:
        header = parse_json(metadata[METADATA_KEY])
        version = header["format_version"]
    except (ValueError, KeyError, TypeError) as exc:
        raise _damaged(path, f"its header is not readable ({brief(exc)})") from exc
    if version != FORMAT_VERSION:
        raise MaskError(
            f"{path}: packed mask format version {brief(version)}, this version of "
            f"opentrans_kernels reads {FORMAT_VERSION}. Update opentrans_kernels, or save the "
            "masks again with it."
        )
    shapes, order, notes = (header.get(key) for key in ("shapes", "order", "provenance"))
    valid = (
        isinstance(shapes, dict)
        and all(is_shape(shape) for shape in shapes.values())
        and isinstance(order, list)
        and all(isinstance(name, str) for name in order)
        and sorted(order) == sorted(shapes)
        and isinstance(notes, dict)
        and all(isinstance(value, str) for value in notes.values())
        and isinstance(header.get("content_sha256"), str)
        and isinstance(header.get("synthetic"), bool)
    )
    if not valid:
        raise _damaged(path, "its header lacks entries or has entries of the wrong kind")
    return {name: tuple(shape) for name, shape in shapes.items()}, header


def is_shape(shape: object) -> bool:
    """Whether a JSON value is the shape of a mask."""
    return isinstance(shape, list) and all(type(n) is int and 0 < n < 2**31 for n in shape)


def _damaged(path: str, what: str) -> MaskError:
    return MaskError(
        f"{path} is a packed mask file, but {what}: it was changed or damaged after it was "
        "written. Copy it again from its source, or save the masks again."
    )
