"""The folder of what was fetched, outside the source tree; files in it are compared at each use."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from opentrans_kernels import settings
from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks.atomic import atomic_write

__all__ = ["cache_folder", "is_cached", "is_there", "sha256_of", "store", "workspace"]


def cache_folder() -> Path:
    """``OPENTRANS_CACHE``, or ``~/.cache/opentrans/trained``. It need not exist yet."""
    try:
        return Path(settings.get().cache).expanduser().absolute()
    except RuntimeError as error:
        raise CheckpointError(
            f"there is no folder for fetched files ({error}). Set OPENTRANS_CACHE to one."
        ) from error


def sha256_of(path: Path) -> str:
    """In hexadecimal digits. Raises CheckpointError if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def is_there(path: Path) -> bool:
    """Whether a file of the cache exists. Raises CheckpointError if that cannot be told."""
    try:
        return path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(
            f"{path} cannot be looked for: {error.strerror or error}. Set OPENTRANS_CACHE to a "
            "folder that can be read."
        ) from error


def is_cached(path: Path, sha256: str) -> bool:
    """Whether the file is there. Raises CheckpointError if it is there and differs from the pin."""
    if not is_there(path):
        return False
    found = sha256_of(path)
    if found != sha256:
        raise CheckpointError(
            f"{path} is not the file that was fetched: its sha256 is {found}, not {sha256}. It "
            "was left as it is. Remove it and fetch again."
        )
    return True


def store(path: Path, data: bytes) -> None:
    """Write a file of the cache as a whole, its folders first. Raises CheckpointError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot create {path.parent}: {error.strerror or error}. Set OPENTRANS_CACHE to a "
            "folder that can be written."
        ) from error
    atomic_write(path, data)


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder, removed in any case. Raises CheckpointError if there can be none."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="opentrans-", ignore_cleanup_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"there is no temporary folder for a download: {error.strerror or error}. Make room, "
            "or set TMPDIR to a folder with room."
        ) from error
    with folder as name:
        yield Path(name)
