"""One picture: read, segmented, drawn, written."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.masks import atomic_write

from .drawing import overlay_png
from .folder import OutputFolder, stamp_of
from .labels import label_png, shares_of
from .pictures import Picture, read_picture
from .systems import Segmenter
from .vocabulary import colours_of

__all__ = ["segment_picture", "tried"]


def segment_picture(
    segmenter: Segmenter, picture: Picture, folder: OutputFolder, font: str | None = None
) -> dict[str, Any]:
    """Write label, overlay and record of a picture; returns the record.

    Raises OpenTransError if it cannot be read, has scores that are not finite, or an output cannot
    be written.
    """
    classes = segmenter.recipe.classes
    colours = colours_of(classes)
    try:
        stamp = stamp_of(picture.file)  # before it is read: what changes later is done again
    except OSError as error:
        raise OpenTransError(f"cannot be read: {error.strerror or error}") from error
    pixels = read_picture(picture.file)
    start = time.perf_counter()
    labels = segmenter.labels(pixels)
    seconds = time.perf_counter() - start
    shares = shares_of(labels, classes)
    label, overlay = folder.label(picture.name), folder.overlay(picture.name)
    for file in (label, overlay, folder.record(picture.name)):
        _make_folder(file.parent)
    atomic_write(label, label_png(labels, colours))
    drawn = overlay_png(pixels, labels, classes, colours, shares, notes=segmenter.notes, font=font)
    atomic_write(overlay, drawn)
    record = {
        "file": picture.file,
        "name": picture.name,
        "stamp": stamp,
        "height": labels.shape[0],
        "width": labels.shape[1],
        "label": label.relative_to(folder.path).as_posix(),
        "overlay": overlay.relative_to(folder.path).as_posix(),
        "classes": shares,
        "seconds": round(seconds, 4),
        "threads": segmenter.recipe.threads,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    atomic_write(folder.record(picture.name), text.encode("utf-8", "surrogatepass"))
    return record


def tried(
    segmenter: Segmenter, picture: Picture, folder: OutputFolder, font: str | None = None
) -> str:
    """:func:`segment_picture`; "" or the reason why the picture failed."""
    try:
        segment_picture(segmenter, picture, folder, font)
    except OpenTransError as error:
        return str(error)
    except MemoryError:
        return "not enough memory for it. Segment it alone, or make --size smaller"
    except RuntimeError as error:  # torch: no memory, or a size that a layer cannot take
        return f"the model cannot segment it ({str(error).splitlines()[0]})"
    return ""


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpenTransError(
            f"{path} cannot be made ({error.strerror or error}). Choose another output folder."
        ) from error
