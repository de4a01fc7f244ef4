"""What a run is made of, as plain values: for other processes, and to compare with earlier runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks import split_entry

__all__ = ["Recipe", "file_hash", "fingerprint"]

BLOCK = 2**24
DIGITS = 16  # of a hash beside a name: short enough to be read in a message


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a picture becomes.

    Args:
        weights: file of ``save_segmenter``, or with ``config`` a checkpoint of detectron2.
        classes: names, by label.
        config: detectron2 config, ours or that of a tree on ``PYTHONPATH``.
        options: detectron2's KEY VALUE pairs, flat.
        setup: ``MODULE:FUNCTION`` that adds a tree's own keys to the config; several.
        mask: mask file or recipe; None: the zeros that the weights have.
        size: short side in pixels that pictures are brought to; None: the model's own.
        least: pixels whose best score lies below have no class.
        threads: of the CPU, per process.
        accelerate: run on the sparse kernels.
        text_cache: folder of text embeddings; None: none is used.
    """

    weights: str
    classes: tuple[str, ...]
    config: str | None = None
    options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    mask: str | None = None
    size: int | None = None
    least: float = 0.0
    threads: int = 1
    accelerate: bool = True
    text_cache: str | None = None

    def settings(self) -> dict[str, Any]:
        """What must be the same when a run goes on: plain values, files as name and hash.

        Threads and the place of the text cache change nothing in a picture. Raises CheckpointError
        for a file that cannot be read.
        """
        return {
            "classes": list(self.classes),
            "weights": named_hash(self.weights),
            "config": config_hash(self.config),
            "options": list(self.options),
            "setup": list(self.setup),
            "mask": named_hash(self.mask),
            "size": self.size,
            "least": self.least,
            "accelerate": self.accelerate,
        }


def named_hash(path: str | None) -> str | None:
    """``NAME sha256:...`` of a file, or of FILE:ENTRY; any other text as it is."""
    if path is None:
        return None
    file = path if os.path.isfile(path) else split_entry(path)[0]
    if not os.path.isfile(file):
        return path
    return f"{Path(path).name} sha256:{file_hash(file)[:DIGITS]}"


def config_hash(path: str | None) -> str | None:
    """As :func:`named_hash`, over a config and the files it builds on (``_BASE_``)."""
    if path is None:
        return None
    digest = hashlib.sha256()
    for file in _with_bases(Path(path)):
        digest.update(file_hash(file).encode())
    return f"{Path(path).name} sha256:{digest.hexdigest()[:DIGITS]}"


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file. Raises CheckpointError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}). Name a file that can."
        ) from error
    return digest.hexdigest()


def _with_bases(file: Path) -> Iterable[Path]:
    seen: set[Path] = set()
    while file not in seen and file.is_file():
        seen.add(file)
        yield file
        text = file.read_text(encoding="utf-8", errors="replace")
        bases = [
            line.partition(":")[2].split("#")[0].strip().strip("\"'")
            for line in text.splitlines()
            if line.startswith("_BASE_:")
        ]
        if not bases:
            return
        file = (file.parent / bases[0]).resolve()


def fingerprint(settings: dict[str, Any]) -> str:
    """SHA-256 (hex) of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
