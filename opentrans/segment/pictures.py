"""Which pictures there are, what their outputs are called, and their pixels."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import optional_module

from ..images import SUFFIXES, pillow

__all__ = ["Picture", "find_pictures", "read_picture"]

HIGHEST = 65535  # of 16-bit pixels
#: Modes of Pillow with more than 8 bits of grey; its own conversion would cut them off at 255.
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class Picture:
    """file: resolved path. name: of its outputs, without suffix; may hold folders."""

    file: str
    name: str


def find_pictures(
    sources: Sequence[str | os.PathLike[str]],
    known: Mapping[str, str] | None = None,
    *,
    without: str | os.PathLike[str] | None = None,
) -> list[Picture]:
    """The pictures of files and folders (searched recursively), each once, in order.

    A picture in a folder is called after its path there, one that is named itself after its file.
    Where that name is taken, a number is added. Hidden files and other kinds than ``SUFFIXES`` are
    passed over in folders.

    Args:
        sources: files and folders.
        known: file -> name of an earlier run; they keep their names.
        without: a folder that is passed over, such as that of the results.

    Raises OpenTransError for what does not exist, and if there is no picture at all.
    """
    known = known or {}
    wanted: dict[str, str] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise OpenTransError(
                f"{source} does not exist. Name pictures, or folders that hold pictures."
            )
        if source.is_dir():
            for file in _below(source, without):
                name = file.relative_to(source).with_suffix("").as_posix()
                wanted.setdefault(str(file.resolve()), name)
        elif source.is_file():
            wanted.setdefault(str(source.resolve()), source.stem)
        else:
            raise OpenTransError(f"{source} is neither a file nor a folder. Name pictures.")
    if not wanted:
        raise OpenTransError(
            f"{', '.join(map(str, sources))} holds no picture ({', '.join(SUFFIXES)}). Name "
            "another folder, or the files themselves; folders inside a folder are searched too."
        )
    return _named(wanted, known)


def read_picture(file: str | os.PathLike[str]) -> np.ndarray:
    """uint8 [H, W, 3], RGB, upright (the camera's EXIF orientation is applied).

    16-bit grey is scaled to 8 bits, transparent pixels are shown on white, of several frames the
    first is taken. Raises OpenTransError, with the reason, for a file that is no picture.
    """
    image_module = pillow()
    try:
        with warnings.catch_warnings():
            # A very large picture is refused by Pillow itself at twice the size it warns of.
            warnings.simplefilter("ignore", image_module.DecompressionBombWarning)
            with image_module.open(file) as opened:
                upright = _ops().exif_transpose(opened)
                pixels = np.array(_rgb(upright))  # a copy: torch wants to be able to write
    except OpenTransError:
        raise
    except Exception as error:  # a decoder may raise anything on a broken file
        reason = str(error).replace(str(file), "the file") or type(error).__name__
        raise OpenTransError(f"cannot be read as a picture: {reason}") from error
    return pixels


def _rgb(image: Any) -> np.ndarray:
    if image.mode in DEEP:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > HIGHEST:
            raise OpenTransError(
                f"its grey values run from {values.min()} to {values.max()}, beyond 16 bits. "
                "Convert it to 8 or 16 bits."
            )
        grey = ((values * 255 + HIGHEST // 2) // HIGHEST).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise OpenTransError(
            "its pixels are floats, of which black and white are not known. Convert it to 8 or 16 "
            "bits."
        )
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = pillow().new("RGBA", rgba.size, "white")
        return np.asarray(pillow().alpha_composite(white, rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _below(folder: Path, without: str | os.PathLike[str] | None) -> Iterable[Path]:
    outside = None if without is None else Path(without).resolve()
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
        and not (outside and file.resolve().is_relative_to(outside))
    )


def _named(wanted: Mapping[str, str], known: Mapping[str, str]) -> list[Picture]:
    # Compared without case: some file systems do not tell a.png from A.png.
    taken = {name.casefold() for name in known.values()}
    found = []
    for file, wish in wanted.items():
        name = known.get(file)
        if name is None:
            base = name = "/".join(_portable(part) for part in wish.split("/"))
            number = 1
            while name.casefold() in taken:
                number += 1
                name = f"{base}-{number}"
            taken.add(name.casefold())
        found.append(Picture(file, name))
    return found


def _portable(part: str) -> str:
    """A file name that every file system takes; letters of all scripts stay."""
    clean = re.sub(r'[\x00-\x1f<>:"\\|?*]', "_", part).strip(". ")
    return clean[:120] or "picture"


def _ops() -> Any:
    return optional_module("PIL.ImageOps", "images are read and written by Pillow")
