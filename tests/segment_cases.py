"""A small segmenter file, pictures of every kind, and the command as a call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from opentrans import cli
from opentrans.ovs.saved import Design, build_segmenter, save_segmenter

CLASSES = ("cat", "road", "sky")
SMALL = Design(
    clip={
        "embed_dim": 16,
        "vision": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32, "head_width": 64},
        "text": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    options={"width": 16, "project": 8, "rates": [1, 2]},
    templates=("a photo of a {}.", "a {}."),
    size=32,
)


def small_segmenter(path: Path, seed: int = 0, note: str = "") -> Path:
    """Random weights that give several classes in one picture."""
    torch.manual_seed(seed)
    design = Design(**{**vars(SMALL), "note": note})
    model = build_segmenter(design)
    with torch.no_grad():
        for module in model.backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # or what is masked fades to one class
                module.running_var.uniform_(0.01, 0.1)
        model.head.embed.weight.mul_(30)
        words = model.classifier.weights(CLASSES)
        model.head.embed.bias.copy_(words.mean(0))
    return save_segmenter(path, model, design)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of colour, uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]


def picture(path: Path, height: int = 40, width: int = 56, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, seed)).save(path)
    return path


def segment(*words: object) -> int:
    """``opentrans segment`` in this process; its exit code."""
    return cli.main(["segment", *map(str, words)])


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def names(folder: Path) -> list[str]:
    return [row["name"] for row in results(folder)["pictures"]]


def label(folder: Path, name: str) -> np.ndarray:
    with Image.open(folder / "labels" / f"{name}.png") as image:
        return np.asarray(image).copy()


def times(folder: Path, parts: Sequence[str] = ("labels", "overlays", "records")) -> dict[str, int]:
    """Output -> when it was written."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_mtime_ns
        for part in parts
        for file in (folder / part).rglob("*.*")
    }
