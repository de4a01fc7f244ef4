"""Segmentation data in a folder, as detectron2's dataset dicts; and the shapes dataset written so.

::

    shapes/train/classes.json      {"classes": [...], "things": [...], "ignore": 255}
    shapes/train/images/000000.png
    shapes/train/labels/000000.png     class number per pixel, a row of "classes"
    shapes/train/panoptic/000000.png   optional: segment number per pixel, R + 256 G + 65536 B
    shapes/train/panoptic.json         optional: {"000000": [{"id", "category_id", "isthing"}]}

Every split has its own vocabulary, so "seen" and "unseen" are two splits of one folder.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.masks import atomic_write
from opentrans_kernels.masks.limits import parse_json

from ..images import pillow
from .shapes import BACKGROUND, SEEN, UNSEEN, Scene, draw_scene

__all__ = ["IGNORE", "SPLITS", "Split", "read_split", "splits_of", "write_shapes"]

IGNORE = 255  # label of pixels without a class, in files and in tensors
SUFFIXES = (".png", ".jpg", ".jpeg")
# Split -> the classes its images and labels hold, besides the background.
SPLITS = {"train": SEEN, "seen": SEEN, "unseen": UNSEEN, "all": (*SEEN, *UNSEEN)}
MADE_BY = "Make the shapes dataset with: python -m opentrans.ovs shapes FOLDER"


@dataclass(frozen=True)
class Split:
    """One split of a folder.

    records: dicts with ``file_name``, ``image_id``, ``height``, ``width``, ``sem_seg_file_name``
    and, if the folder has them, ``pan_seg_file_name`` and ``segments_info``.
    classes: names, by label. things: those that are counted, as opposed to stuff. ignore: label of
    pixels without one.
    """

    name: str
    records: list[dict[str, Any]]
    classes: tuple[str, ...]
    things: tuple[str, ...]
    ignore: int


def splits_of(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the splits in a folder. Raises OpenTransError if there is none."""
    folder = Path(root)
    found = tuple(sorted(file.parent.name for file in folder.glob("*/classes.json")))
    if not found:
        what = "holds no split (SPLIT/classes.json)" if folder.is_dir() else "does not exist"
        raise OpenTransError(f"the dataset folder {folder} {what}. {MADE_BY}")
    return found


def read_split(root: str | os.PathLike[str], split: str) -> Split:
    """List one split; of the images only the headers are read.

    Raises OpenTransError if the folder, the split, an image or a label file is missing, or
    classes.json is not as described above.
    """
    names = splits_of(root)
    if split not in names:
        raise OpenTransError(
            f"the dataset folder {root} has no split {split!r}; it has {', '.join(names)}. "
            f"{MADE_BY}"
        )
    folder = Path(root) / split
    classes, things, ignore = _classes(folder / "classes.json")
    images = sorted(f for f in (folder / "images").glob("*") if f.suffix.lower() in SUFFIXES)
    if not images:
        raise OpenTransError(f"{folder / 'images'} holds no .png or .jpg image. {MADE_BY}")
    segments = _json(folder / "panoptic.json") if (folder / "panoptic.json").exists() else None
    records = [_record(image, folder, segments) for image in images]
    return Split(split, records, classes, things, ignore)


def write_shapes(
    root: str | os.PathLike[str],
    *,
    train: int = 400,
    val: int = 60,
    size: int = 96,
    seed: int = 0,
) -> Path:
    """Draw the shapes dataset: splits "train" and "seen", "unseen", "all" for evaluation.

    Images and labels of "train" and "seen" hold classes of ``SEEN`` only, those of "unseen" only
    the held-out ones, "all" both. Same arguments, same files. train, val: images per split. size:
    side in pixels.

    Raises OpenTransError for sizes that are not possible or a folder that cannot be written.
    """
    if train < 1 or val < 1:
        raise OpenTransError(f"train={train} and val={val} must be 1 or more images.")
    pillow()  # which writes every image; its absence is told before a folder is made
    folder = Path(root)
    for number, (split, names) in enumerate(SPLITS.items()):
        classes = (BACKGROUND, *names)
        _make_folders(folder / split)
        segments = {}
        for i in range(train if split == "train" else val):
            scene = draw_scene(names, size=size, seed=(seed * 10 + number) * 1_000_000 + i)
            stem = f"{i:06d}"
            segments[stem] = _write_scene(folder / split, stem, scene, classes)
        _write_json(folder / split / "panoptic.json", segments)
        # Last: a split without it does not count, so one that was interrupted is not used.
        content = {"classes": classes, "things": names, "ignore": IGNORE}
        _write_json(folder / split / "classes.json", content)
    return folder


def _make_folders(folder: Path) -> None:
    try:
        for part in ("images", "labels", "panoptic"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpenTransError(
            f"{folder} cannot be written ({error.strerror}). Name another folder."
        ) from error


def _write_scene(
    folder: Path, stem: str, scene: Scene, classes: Sequence[str]
) -> list[dict[str, Any]]:
    labels = np.array([0, *(classes.index(name) for name in scene.names)], np.uint8)
    ids = scene.objects + 1  # 0 means "no segment" in panoptic files; the background is a segment
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    for part, pixels in (
        ("images", scene.image),
        ("labels", labels[scene.objects]),
        ("panoptic", rgb),
    ):
        atomic_write(folder / part / f"{stem}.png", _png(pixels))
    return [
        {"id": int(i), "category_id": int(labels[i - 1]), "isthing": bool(i > 1)}
        for i in np.unique(ids)
    ]


def _record(image: Path, folder: Path, segments: Any) -> dict[str, Any]:
    label = folder / "labels" / f"{image.stem}.png"
    if not label.exists():
        raise OpenTransError(
            f"the image {image} has no label file {label}. Add it, or remove the image."
        )
    width, height = _size(image)
    record: dict[str, Any] = {
        "file_name": str(image),
        "image_id": image.stem,
        "height": height,
        "width": width,
        "sem_seg_file_name": str(label),
    }
    if segments is not None:
        panoptic = folder / "panoptic" / f"{image.stem}.png"
        if image.stem not in segments or not panoptic.exists():
            raise OpenTransError(
                f"the image {image} is missing from {folder / 'panoptic.json'} or has no "
                f"{panoptic}. Add both, or remove panoptic.json."
            )
        record["pan_seg_file_name"] = str(panoptic)
        record["segments_info"] = segments[image.stem]
    return record


def _classes(file: Path) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    content = _json(file)
    try:
        classes, things = tuple(content["classes"]), tuple(content.get("things", ()))
        ignore = int(content.get("ignore", IGNORE))
        valid = all(isinstance(name, str) for name in classes) and set(things) <= set(classes)
    except (TypeError, KeyError, ValueError, AttributeError):
        valid = False
    if not valid or not classes or len(set(classes)) != len(classes):
        raise OpenTransError(
            f'{file} must be {{"classes": [different names], "things": [some of them], "ignore": '
            f"{IGNORE}}}. Correct it."
        )
    return classes, things, ignore


def _json(file: Path) -> Any:
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OpenTransError(
            f"{file} cannot be read as JSON ({error}). Correct or replace it."
        ) from error


def _write_json(file: Path, content: Any) -> None:
    atomic_write(file, (json.dumps(content, indent=1) + "\n").encode())


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    pillow().fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def _size(image: Path) -> tuple[int, int]:
    try:
        with pillow().open(image) as opened:  # reads the header only
            return opened.size
    except OSError as error:
        raise OpenTransError(
            f"the image {image} cannot be read ({error}). Remove or replace it."
        ) from error
