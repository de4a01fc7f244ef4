"""Opening checkpoint files of unknown origin without ever running what is inside.

``torch.load`` is called with ``weights_only=True`` only. Every way in which a file can be wrong
ends in a CheckpointError that says what it is instead and what to do.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks.torchscript import is_torchscript, read_torchscript

ZIP_MAGIC = b"PK\x03\x04"
FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself. Run: git lfs pull"),
    (b"<!DOCTYPE", "a web page. Download the file itself, not the page that shows it"),
    (b"<html", "a web page. Download the file itself, not the page that shows it"),
    (b"\x1f\x8b", "gzip-compressed. Unpack it first with: gunzip FILE"),
    (b"\x93NUMPY", "a NumPy array. Save a dict of name -> tensor with torch.save"),
    (b"\x89HDF", "an HDF5 file. Save a dict of name -> tensor with torch.save"),
)


@dataclass(frozen=True)
class CheckpointFile:
    """The content of one file: ``container`` is "torch", "torchscript" or "safetensors";
    ``content`` nested dicts and tensors on the CPU; ``metadata`` safetensors' text entries."""

    path: str
    container: str
    content: Any
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_checkpoint(path: str | os.PathLike[str]) -> CheckpointFile:
    """Read a .pth/.pt (new or legacy), TorchScript or safetensors file, told apart by content.

    Tensors of new-style .pth files are memory-mapped. Raises CheckpointError for anything else:
    missing, empty, truncated, damaged, not a checkpoint, or with content other than tensors.
    """
    name = os.fspath(path)
    head, size = _first_bytes(name)
    for magic, what in FOREIGN:
        if head.lower().startswith(magic.lower()):
            raise CheckpointError(f"{name} is not a checkpoint: it is {what}.")
    if head.startswith(ZIP_MAGIC):
        return _open_zip(name)
    header_length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_length < 2**32:
        return _open_safetensors(name, header_length, size)
    if head.startswith(b"\x80"):  # pickle, protocol 2 or later
        return CheckpointFile(name, "torch", _torch_load(name, mmap=False))
    raise CheckpointError(
        f"{name} is not a checkpoint: it begins with {head[:8]!r}, which is neither a PyTorch nor "
        "a safetensors file. Pass a .pth, .pt or .safetensors file."
    )


def _first_bytes(name: str) -> tuple[bytes, int]:
    try:
        if Path(name).is_dir():
            raise CheckpointError(f"{name} is a directory. Pass the checkpoint file inside it.")
        with open(name, "rb") as file:
            head = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError as exc:
        raise CheckpointError(f"{name} does not exist. Check the path.") from exc
    except (OSError, ValueError) as exc:  # ValueError: a NUL byte in the path
        reason = getattr(exc, "strerror", None) or exc
        raise CheckpointError(f"{name} cannot be read: {reason}. Check its permissions.") from exc
    if not head:
        raise CheckpointError(
            f"{name} is empty (0 bytes): the download or the save that made it was interrupted. "
            "Get it again."
        )
    return head, size


def _open_zip(name: str) -> CheckpointFile:
    try:
        with zipfile.ZipFile(name) as archive:
            if is_torchscript(archive):
                return CheckpointFile(name, "torchscript", read_torchscript(archive, name))
            if not any(entry.endswith("/data.pkl") for entry in archive.namelist()):
                raise CheckpointError(
                    f"{name} is a zip archive but not a PyTorch checkpoint (it holds "
                    f"{shorten(archive.namelist())}). Pass the checkpoint itself."
                )
            _check_records(archive, name)
    except CheckpointError:
        raise
    except Exception as exc:  # hostile input: zipfile lets many errors of its parser through
        raise _damaged(name, exc) from exc
    return CheckpointFile(name, "torch", _torch_load(name, mmap=True))


def _check_records(archive: zipfile.ZipFile, name: str) -> None:
    """Compare the stored CRCs, which PyTorch does not; a flipped bit is a wrong weight.

    PyTorch can write archives without CRCs; then that of the pickle is wrong already, and the
    others say nothing.
    """
    pickled = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
    if not _crc_holds(archive, pickled):
        return  # torch.load judges the pickle itself
    for info in archive.infolist():
        if not _crc_holds(archive, info):
            raise _damaged(name, f"record {info.filename!r} does not have its recorded checksum")


def _crc_holds(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(info) as record:
            while record.read(1 << 20):
                pass
    except zipfile.BadZipFile as exc:
        if "CRC" in str(exc):
            return False
        raise
    return True


def _torch_load(name: str, *, mmap: bool) -> Any:
    try:
        return torch.load(name, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as exc:  # hostile input: a broken pickle may raise anything
        asked = re.search(r"GLOBAL ([\w.]+)", str(exc))
        if asked:
            raise CheckpointError(
                f"{name} was refused: it asks for {asked[1]}, and loading that would run code or "
                "build objects other than tensors. Nothing was executed. If you know and trust "
                "the program that wrote the file, let that program save only the tensors "
                "(torch.save(model.state_dict(), FILE))."
            ) from exc
        raise _damaged(name, exc) from exc


def _open_safetensors(name: str, header_length: int, size: int) -> CheckpointFile:
    from safetensors import safe_open

    if header_length + 8 > size:
        raise _damaged(name, f"its header needs {header_length + 8} bytes, the file has {size}")
    try:
        with safe_open(name, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return CheckpointFile(name, "safetensors", tensors, file.metadata() or {})
    except Exception as exc:  # hostile input: the parser's error types are not specified
        raise _damaged(name, exc) from exc


def _damaged(name: str, why: object) -> CheckpointError:
    first_line = (str(why).strip() or type(why).__name__).splitlines()[0][:200]
    return CheckpointError(
        f"{name} is truncated, damaged or not a checkpoint ({first_line}). Copy or download it "
        "again and compare its size with the original's."
    )


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shorten(names: Any, limit: int = 8) -> str:
    """ "a, b, c (+4 more)": a list that stays readable in a message."""
    items = [str(n) for n in names]
    more = f" (+{len(items) - limit} more)" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
