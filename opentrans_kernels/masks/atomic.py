"""Files that are replaced as a whole, and no leftovers of processes that died in between."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import socket
import tempfile
import time
from functools import cache
from pathlib import Path

from opentrans_kernels.errors import CheckpointError

FORGOTTEN_AFTER = 7 * 24 * 3600.0  # seconds; nobody writes one file for a week
LOOK_AGAIN_AFTER = 60.0  # seconds; a folder of thousands of files is not listed for each of them
_looked: dict[str, float] = {}
_TEMPORARY = re.compile(r"\..*\.opentrans-([0-9a-f]{12})-(\d+)-(\d+)-[^-]*\.tmp")


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the whole new one.

    A temporary file in the same directory is written, flushed and renamed; those that killed
    processes left there are removed. Raises CheckpointError (nothing left behind, an existing file
    untouched) if that is not possible.
    """
    target = Path(path)
    if target.is_dir():
        raise CheckpointError(f"cannot write {target}: it is a directory. Add a file name.")
    temporary: str | None = None
    try:
        _clean(target.parent)
        own = f"{_host()}-{os.getpid()}-{_started(os.getpid()) or 0}-"
        handle, temporary = tempfile.mkstemp(
            ".tmp", f".{target.name[:40]}.opentrans-{own}", target.parent
        )
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _default_mode())
        os.replace(temporary, target)
        temporary = None
    except OSError as exc:
        raise CheckpointError(
            f"cannot write {target} ({len(data)} bytes): {exc.strerror or exc}. Nothing was "
            "written. Choose a directory that exists, is writable and has room."
        ) from exc
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _clean(folder: Path) -> None:
    """Remove temporary files of dead processes of this machine, and of any that are a week old."""
    place, now = os.path.abspath(folder), time.monotonic()
    if now - _looked.get(place, -math.inf) < LOOK_AGAIN_AFTER:
        return
    _looked[place] = now
    for name in os.listdir(folder):
        found = _TEMPORARY.fullmatch(name)
        if found is None:
            continue
        with contextlib.suppress(OSError):  # another process may have removed it
            old = time.time() - os.stat(folder / name).st_mtime > FORGOTTEN_AFTER
            dead = found[1] == _host() and not _runs(int(found[2]), int(found[3]))
            if old or dead:
                os.unlink(folder / name)


@cache
def _host() -> str:
    """This machine since it was started, and the processes it can see (containers have their own).

    A shared folder may hold files of other machines, whose processes cannot be asked for.
    """
    parts = [socket.gethostname()]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            link = os.path.islink(source)
            parts.append(os.readlink(source) if link else Path(source).read_text("ascii").strip())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _started(pid: int) -> int | None:
    """When the process started, which tells it from a later one of its number; None if unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def _runs(pid: int, started: int) -> bool:
    """Whether the process that wrote its number and start still runs; True in doubt."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # somebody else's
    now = _started(pid)
    return now is None or not started or now == started


def _default_mode() -> int:
    """The mode open() would give; mkstemp's is private to the owner."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
