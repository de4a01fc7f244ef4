"""Files out of Debian packages: downloaded by apt-get, unpacked by dpkg-deb, never installed."""

from __future__ import annotations

import shutil
from pathlib import Path

from opentrans_kernels.errors import CheckpointError, OpenTransError

from .tool import run_tool

__all__ = ["unpack"]

INSTEAD = "or use a folder of images of your own (--images DIR, folder_photographs(DIR))"


def unpack(package: str, version: str, folder: Path) -> Path:
    """The files of a Debian package below the new folder ``folder/tree``.

    Raises OpenTransError: no apt-get or dpkg-deb, no such package or version in apt's lists, no
    connection; or CheckpointError: no room.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise OpenTransError(
                f"the photographs of {package} come in a Debian package, and there is no {tool} "
                f"here. Run this on Debian or Ubuntu and copy the cache, {INSTEAD}."
            )
    _run(["apt-get", "download", f"{package}={version}"], f"{package}={version}", folder)
    found = sorted(folder.glob("*.deb"))
    if len(found) != 1:
        raise OpenTransError(f"apt-get downloaded {len(found)} files for {package}={version}.")
    tree = folder / "tree"
    _run(["dpkg-deb", "-x", str(found[0]), str(tree)], f"{package}={version}", folder)
    return tree


def _run(command: list[str], what: str, folder: Path) -> None:
    code, said = run_tool(command, what, folder)
    if code != 0:
        raise _refused(command[0], what, said)


def _refused(tool: str, what: str, said: str) -> OpenTransError:
    """The error for what apt-get or dpkg-deb wrote."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = next((line for line in lines if line.startswith(("E:", "dpkg"))), "")
    last = last or (lines[-1] if lines else "it said nothing")
    if "No space left" in said or "enough free space" in said:
        return CheckpointError(
            f"no room to unpack the Debian package {what}. Make room (about 300 MB), or set TMPDIR "
            "to a folder that has it."
        )
    if "Unable to locate package" in said or "was not found" in said:
        return OpenTransError(
            f"apt does not know the Debian package {what} ({last}). Run 'apt-get update' as root; "
            f"the version is that of Debian 12. Where apt has another one, copy the cache, "
            f"{INSTEAD}."
        )
    if "Could not resolve" in said or "Failed to fetch" in said or "Could not connect" in said:
        return OpenTransError(
            f"the Debian package {what} could not be downloaded ({last}). Connect this machine, "
            f"{INSTEAD}."
        )
    return OpenTransError(f"{tool} failed on the Debian package {what}: {last}")
