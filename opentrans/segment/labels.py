"""From class scores at the network's size to a label per pixel of the picture, and to a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from opentrans_kernels.errors import OpenTransError

from ..images import pillow
from .vocabulary import NONE_COLOUR, none_of

__all__ = ["label_png", "labels_of", "shares_of"]

STRIP = 2**24  # scores held at once at the picture's size


def labels_of(
    scores: torch.Tensor, size: tuple[int, int], *, least: float = 0.0, strip: int = STRIP
) -> np.ndarray:
    """The best class of every pixel, uint8 [H, W] (uint16 for more than 255 classes).

    Scores are enlarged bilinearly, in strips of rows, so that no map of all classes at the size of
    the picture is ever held.

    Args:
        scores: [K, h, w], one map per class, larger is better.
        size: (H, W) of the picture.
        least: pixels whose best score lies below have no class (255 or 65535).
        strip: scores held at once.

    Raises OpenTransError for scores that are not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise OpenTransError(
            "the model gave scores that are not finite (NaN or Inf). Check its weights; nothing "
            "was written for this picture."
        )
    classes, rows, _ = scores.shape
    height, width = size
    none = none_of(classes)
    labels = np.empty(size, np.uint8 if none == 255 else np.uint16)
    # Centres of the picture's rows among those of the scores, as align_corners=False has them.
    places = ((torch.arange(height, dtype=torch.float64) + 0.5) * rows / height - 0.5).clamp(
        0, rows - 1
    )
    above = places.floor().long()
    below = (above + 1).clamp(max=rows - 1)
    share = (places - above).to(scores.dtype)
    step = max(1, strip // (classes * max(width, 1)))
    for first in range(0, height, step):
        part = slice(first, min(first + step, height))
        near, far = scores[:, above[part]], scores[:, below[part]]
        lines = torch.lerp(near, far, share[part].view(1, -1, 1))
        wide = F.interpolate(
            lines.unsqueeze(0), (lines.shape[1], width), mode="bilinear", align_corners=False
        )[0]
        best, number = wide.max(0)
        found = number.numpy().astype(labels.dtype)
        if least > 0:
            found[(best < least).numpy()] = none
        labels[part] = found
    return labels


def label_png(labels: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> bytes:
    """A lossless PNG: with a palette for uint8 labels, so that viewers show the colours and readers
    the class numbers; 16-bit grey for uint16."""
    image = pillow().fromarray(labels)
    if labels.dtype == np.uint8:
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(colours)] = colours
        palette[255] = NONE_COLOUR
        image.putpalette(palette.tobytes())  # turns grey into a picture of indices
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=False)
    return buffer.getvalue()


def shares_of(labels: np.ndarray, classes: Sequence[str]) -> list[dict[str, object]]:
    """Per class that occurs: name, number, pixels and share, the largest first; "none" last."""
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    none = none_of(len(classes))
    found = [
        {
            "name": name,
            "number": number,
            "pixels": int(counts[number]),
            "share": round(float(counts[number]) / labels.size, 6),
        }
        for number, name in enumerate(classes)
        if counts[number]
    ]
    found.sort(key=lambda row: -int(row["pixels"]))  # type: ignore[call-overload]
    if none < len(counts) and counts[none]:
        share = round(float(counts[none]) / labels.size, 6)
        found.append({"name": None, "number": none, "pixels": int(counts[none]), "share": share})
    return found
