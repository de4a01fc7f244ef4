"""Opening checkpoint files of unknown origin without ever running what is inside.

``torch.load`` is called with ``weights_only=True`` only, on a file whose records, sizes and names
were checked before. Every way in which a file can be wrong ends in a CheckpointError that says what
it is instead and what to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks.archive import PlainArchive, read_archive
from opentrans_kernels.masks.arrays import plain, read_arrays, stand_ins
from opentrans_kernels.masks.limits import Malformed, Refused, check_dtype, check_nesting
from opentrans_kernels.masks.pickles import Announced, inspect, scan
from opentrans_kernels.masks.torchscript import is_torchscript, read_torchscript

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # the number torch.save begins with
_ALLOWING = threading.Lock()
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
    """The content of one file: ``container`` is "torch", "torchscript", "safetensors" or
    "numpy";
    ``content`` nested dicts and tensors on the CPU; ``metadata`` safetensors' text entries;
    ``masks`` those of a sparse checkpoint whose weights were written out."""

    path: str
    container: str
    content: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)


def open_checkpoint(path: str | os.PathLike[str]) -> CheckpointFile:
    """Read a checkpoint of any of these kinds, told apart by content: .pth/.pt (new or legacy),
    TorchScript, safetensors, a pickled dict of NumPy arrays (detectron2's .pkl).

    The tensors own their memory: the file may be overwritten afterwards. Raises CheckpointError
    for anything else: missing, empty, truncated, damaged, not a checkpoint, with content other
    than data, or that would take far more memory than the file has bytes.
    """
    name = os.fspath(path)
    with _opened(name) as file:
        head, size = file.read(64), os.fstat(file.fileno()).st_size
        file.seek(0)
        try:
            return _read(name, file, head, size)
        except CheckpointError:
            raise
        except Refused as exc:
            raise CheckpointError(
                f"{name} was refused: it asks for {exc.name}, and loading that would run code or "
                "build objects other than tensors. Nothing was executed. If you know and trust "
                "the program that wrote the file, let that program save only the tensors "
                "(torch.save(model.state_dict(), FILE))."
            ) from exc
        except Exception as exc:  # hostile input: parsers let many errors through
            raise _damaged(name, exc) from exc


def _read(name: str, file: BinaryIO, head: bytes, size: int) -> CheckpointFile:
    if not head:
        raise CheckpointError(
            f"{name} is empty (0 bytes): the download or the save that made it was interrupted. "
            "Get it again."
        )
    for magic, what in FOREIGN:
        if head.lower().startswith(magic.lower()):
            raise CheckpointError(f"{name} is not a checkpoint: it is {what}.")
    if head.startswith(ZIP_MAGIC):
        return _open_zip(name, file, size)
    header_length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_length < 2**32:
        if header_length + 8 > size:
            raise Malformed(f"its header needs {header_length + 8} bytes, the file has {size}")
        return _open_safetensors(name)
    if head.startswith(b"\x80"):  # pickle, protocol 2 or later
        return _open_pickle(name, file, size)
    raise CheckpointError(
        f"{name} is not a checkpoint: it begins with {head[:8]!r}, which is neither a PyTorch nor "
        "a safetensors file. Pass a .pth, .pt or .safetensors file."
    )


def _opened(name: str) -> BinaryIO:
    try:
        if Path(name).is_dir():
            raise CheckpointError(f"{name} is a directory. Pass the checkpoint file inside it.")
        return open(name, "rb")
    except FileNotFoundError as exc:
        raise CheckpointError(f"{name} does not exist. Check the path.") from exc
    except (OSError, ValueError) as exc:  # ValueError: a NUL byte in the path
        reason = getattr(exc, "strerror", None) or exc
        raise CheckpointError(f"{name} cannot be read: {reason}. Check its permissions.") from exc


def _open_zip(name: str, file: BinaryIO, size: int) -> CheckpointFile:
    with zipfile.ZipFile(file) as archive:
        script = is_torchscript(archive)
        if not script and not any(n.endswith("/data.pkl") for n in archive.namelist()):
            raise CheckpointError(
                f"{name} is a zip archive but not a PyTorch checkpoint (it holds "
                f"{shorten(archive.namelist())}). Pass the checkpoint itself."
            )
        records = read_archive(archive, file, size)
    if script:
        return CheckpointFile(name, "torchscript", read_torchscript(records, name))
    sizes = {key: len(record) for key, record in records.items()}
    pickled = scan(io.BytesIO(records["data.pkl"]))
    announced = inspect(pickled, lambda key: sizes.get(f"data/{key}"))
    # Not mapped: a tensor of a mapped file dies with the file.
    return CheckpointFile(
        name, "torch", _torch_load(PlainArchive(records), announced, len(pickled))
    )


def _open_pickle(name: str, file: BinaryIO, size: int) -> CheckpointFile:
    """A legacy file of torch.save (five pickles and then the values), or one pickle with arrays."""
    first = scan(file, size)
    if LEGACY_MAGIC not in first[:32]:
        return CheckpointFile(name, "numpy", read_arrays(first))
    for _ in ("protocol", "system"):
        scan(file)
    announced = inspect(scan(file), None)
    keys = inspect(scan(file), None).content
    if sorted(map(str, keys)) != sorted(announced.storages):
        raise Malformed("its table of storages is not that of its tensors")
    if sum(announced.storages.values()) > size - file.tell():
        raise Malformed(f"its tensors announce more bytes than the file has ({size})")
    return CheckpointFile(name, "torch", _torch_load(file, announced, size))


def _torch_load(file: Any, announced: Announced, size: int) -> Any:
    """``announced``: what the pickle of the file asks for, which has passed ``inspect``."""
    extra = announced.stand_ins
    file.seek(0)
    with _allowing(size) if extra else contextlib.nullcontext():
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    check_nesting(content)
    return plain(content) if extra else content


@contextlib.contextmanager
def _allowing(size: int) -> Iterator[None]:
    """Lets torch.load use the stand-ins. Its list is for all threads: one would empty another's."""
    names = [(stand_in, name) for name, stand_in in stand_ins(size).items()]
    with _ALLOWING, torch.serialization.safe_globals(names):
        yield


def _open_safetensors(name: str) -> CheckpointFile:
    from safetensors import safe_open

    with safe_open(name, framework="pt", device="cpu") as file:
        # The library maps the file; a tensor must not die with it.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        for tensor in tensors.values():
            check_dtype(tensor.dtype)
        return CheckpointFile(name, "safetensors", tensors, file.metadata() or {})


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
