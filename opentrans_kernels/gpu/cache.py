"""Tuning results on disk: one small JSON file per network, masks, shape, precision and machine.

The key names everything that a choice depends on, so another GPU, driver library or kernel source
tunes anew. Files are written to a temporary name and renamed: a reader sees all of a file or none.
A file that cannot be used is ignored with the reason logged, and written again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import settings
from ..errors import CheckpointError, PlanError
from ..masks import atomic_write
from ..masks.limits import parse_json
from ..ops.sparse_conv2d_nhwc.build import why_not as why_no_nvcc
from ..plan.subject import PlanSubject
from .kernels import Place

__all__ = ["TuneCache", "cache_key", "default_folder"]

FORMAT = 1
_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/opentrans_kernels``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else Path.home() / ".cache") / "opentrans_kernels" / "gpu"


def cache_key(subject: PlanSubject, place: Place, size: tuple[int, int, int]) -> dict[str, Any]:
    """Everything a choice depends on, as plain values. size: batch, height, width."""
    device = place.device
    return {
        "format": FORMAT,
        "architecture": subject.architecture(),
        "masks": subject.masks_hash,
        "size": list(size),
        "precision": place.precision.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "capability": list(place.capability or ()),
        "versions": versions(),
        "backend": settings.get().backend,
        "nvcc": why_no_nvcc(),
        "kernels": _sources(),
    }


@cache
def versions() -> dict[str, str | None]:
    """torch, CUDA, cuDNN and triton."""
    from importlib import metadata

    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "triton": triton,
    }


@cache
def _sources() -> str:
    """Hash of the sources of kernels and planner: a changed kernel is measured again."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    patterns = ("gpu/*.py", "ops/*.py", "ops/*/*.py", "compact/*.py")
    found = [path for pattern in patterns for path in package.glob(pattern)]
    for path in sorted([*found, *package.parent.glob("csrc/cuda/*")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class TuneCache:
    """Choices by key in a folder; ``folder=None`` keeps nothing."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def path(self, key: Mapping[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        text = json.dumps(key, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def load(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record stored for ``key``; None, with the reason logged, if there is none to use."""
        path = self.path(key)
        if path is None:
            return None
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            if content["key"] != dict(key):
                raise ValueError("it belongs to another network or machine")
            record = content["record"]
            if not isinstance(record, dict):
                raise ValueError(f"its record is a {type(record).__name__}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            _log.warning("tuning again: the cache file %s cannot be used (%s)", path, why)
            return None
        return record

    def store(self, key: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Write atomically. A folder that cannot be written costs a warning, not the plan."""
        path = self.path(key)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"key": dict(key), "record": dict(record)}, indent=1)
            atomic_write(path, text.encode("utf-8"))
        except (OSError, CheckpointError) as error:
            _log.warning("tuning results are not kept: %s cannot be written (%s)", path, error)


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise PlanError if ``folder`` exists and is no folder."""
    if Path(folder).exists() and not Path(folder).is_dir():
        raise PlanError(f"cache={str(folder)!r} is a file; pass a folder, or None to keep nothing.")
