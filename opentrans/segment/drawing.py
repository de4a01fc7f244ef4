"""The overlay: the picture with its classes in colour, and a legend that names them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import optional_module

from ..images import pillow
from .vocabulary import NONE_COLOUR, none_of

__all__ = ["load_font", "overlay_png"]

LONGEST, SHORTEST = 1600, 480  # sides in pixels of the picture in an overlay
BLEND = 0.55  # share of the class colour
BACKGROUND, INK, FAINT = (24, 26, 31), (240, 241, 243), (165, 170, 178)
EDGE = (255, 255, 255)
MOST_ROWS = 60  # of a legend; the rest is counted


def load_font(size: int, file: str | None = None) -> Any:
    """A font of ``size`` pixels: of a file, else the one Pillow brings. Raises OpenTransError."""
    fonts = optional_module("PIL.ImageFont", "images are read and written by Pillow")
    if file is None:
        return fonts.load_default(size)
    try:
        return fonts.truetype(file, size)
    except OSError as error:
        raise OpenTransError(
            f"the font {file} cannot be used ({error}). Name a TrueType or OpenType file, or leave "
            "--font out."
        ) from error


def overlay_png(
    pixels: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    shares: Sequence[Mapping[str, Any]],
    *,
    notes: Sequence[str] = (),
    font: str | None = None,
) -> bytes:
    """PNG of picture, colours and legend.

    Args:
        pixels: uint8 [H, W, 3]. labels: [H, W], class numbers.
        shares: rows of ``shares_of``. notes: lines below the legend.
        font: file of a font, for names in scripts that Pillow's own does not have.
    """
    image = pillow()
    height, width = labels.shape
    scale = _scale(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Labels are taken from the nearest pixel: a class in between two others is not there.
    rows = np.minimum((np.arange(size[1]) / scale).astype(int), height - 1)
    columns = np.minimum((np.arange(size[0]) / scale).astype(int), width - 1)
    shown = labels[rows[:, None], columns[None, :]]
    photo = np.asarray(image.fromarray(pixels).resize(size, image.Resampling.BICUBIC))
    painted = image.fromarray(_blend(photo, shown, colours, none_of(len(classes))))
    legend = _legend(size[1], colours, shares, notes, font)
    sheet = image.new("RGB", (size[0] + legend.width, max(size[1], legend.height)), BACKGROUND)
    sheet.paste(painted, (0, 0))
    sheet.paste(legend, (size[0], 0))
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    return buffer.getvalue()


def _scale(height: int, width: int) -> float:
    """Large pictures become smaller, small ones larger, both by no more than is needed."""
    if max(height, width) > LONGEST:
        return LONGEST / max(height, width)
    return min(max(1.0, SHORTEST / min(height, width)), LONGEST / max(height, width))


def _blend(
    photo: np.ndarray, labels: np.ndarray, colours: Sequence[tuple[int, int, int]], none: int
) -> np.ndarray:
    table = np.zeros((none + 1, 3), np.float32)
    table[: len(colours)] = colours
    # Grey under the colour: the colours of the picture would mix with those of the classes.
    grey = photo.astype(np.float32) @ np.float32([0.299, 0.587, 0.114])
    base = 0.35 * photo.astype(np.float32) + 0.65 * grey[..., None]
    painted = (1 - BLEND) * base + BLEND * table[labels]
    painted[labels == none] = 0.6 * base[labels == none]
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    painted[edge] = 0.25 * painted[edge] + 0.75 * np.float32(EDGE)
    return painted.round().clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class _Line:
    """One line of a legend; a swatch of ``colour`` before it, ``share`` at the right."""

    text: str
    share: str = ""
    colour: tuple[int, int, int] | None = None
    faint: bool = False


def _legend(
    height: int, colours: Sequence[tuple[int, int, int]], shares: Sequence[Mapping[str, Any]],
    notes: Sequence[str], font: str | None,
) -> Any:  # fmt: skip
    letters = max(15, min(24, height // 30))
    big, small = load_font(letters, font), load_font(max(13, letters * 4 // 5), font)
    lines = []
    for row in shares[:MOST_ROWS]:
        none = row["name"] is None
        colour = NONE_COLOUR if none else colours[int(row["number"])]
        name = "(none)" if none else _short(str(row["name"]), 32)
        lines.append(_Line(name, _percent(float(row["share"])), colour))
    if len(shares) > MOST_ROWS:
        lines.append(_Line(f"and {len(shares) - MOST_ROWS} more", faint=True))
    left, gap, swatch = letters, letters * 2 // 3, letters
    names = max((big.getlength(line.text) for line in lines), default=0)
    numbers = max((big.getlength(line.share) for line in lines), default=0)
    width = round(left + swatch + gap + names + 2 * gap + numbers + left)
    width = max(width, 11 * letters)
    wrapped = [part for note in notes for part in _wrap(note, small, width - 2 * left)]
    step, note_step = round(letters * 1.7), round(letters * 1.15)
    needed = 2 * left + step * len(lines) + (gap + note_step * len(wrapped) if wrapped else 0)
    sheet = pillow().new("RGB", (width, max(height, needed)), BACKGROUND)
    draw = optional_module("PIL.ImageDraw", "images are read and written by Pillow").Draw(sheet)
    y = left
    for line in lines:
        middle = y + step // 2
        if line.colour is not None:
            box = (left, middle - swatch // 2, left + swatch, middle + swatch // 2)
            draw.rounded_rectangle(box, radius=3, fill=line.colour, outline=FAINT)
        ink = FAINT if line.faint else INK
        draw.text((left + swatch + gap, middle), line.text, fill=ink, font=big, anchor="lm")
        draw.text((width - left, middle), line.share, fill=FAINT, font=big, anchor="rm")
        y += step
    y += gap
    for text in wrapped:
        draw.text((left, y), text, fill=(250, 205, 90), font=small)
        y += note_step
    return sheet


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
