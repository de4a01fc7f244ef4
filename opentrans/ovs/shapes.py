"""Coloured shapes on photo-like backgrounds, with exact labels: a small open-vocabulary task.

A class is a colour and a shape, "red circle". Some pairs are held out: every colour and every shape
occurs among the seen classes, but these pairs occur in no training image, label or caption. What
is known of them is their name, so a network that segments them has used the text.

Photographs are made too: no file, network or licence is needed, and every image is a function of
its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opentrans_kernels.errors import OpenTransError

__all__ = ["BACKGROUND", "COLOURS", "SEEN", "SHAPES", "UNSEEN", "Scene", "draw_scene", "photo"]

BACKGROUND = "background"
# RGB, 0 to 1; disturbed for every object.
COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.92, 0.82, 0.10),
}
SHAPES = ("circle", "square", "triangle", "cross")
# A diagonal: each colour and each shape is held out exactly once.
UNSEEN = tuple(f"{colour} {shape}" for colour, shape in zip(COLOURS, SHAPES, strict=True))
SEEN = tuple(
    f"{colour} {shape}"
    for colour in COLOURS
    for shape in SHAPES
    if f"{colour} {shape}" not in UNSEEN
)
LEAST_VISIBLE = 0.5  # of an object; one that hides more of another is placed again


@dataclass(frozen=True)
class Scene:
    """An image and what is in it.

    image: uint8 [size, size, 3], RGB. objects: int32 [size, size], 0 where there is none and n
    where the n-th object shows. names: the class of object 1, 2, ...
    """

    image: np.ndarray
    objects: np.ndarray
    names: tuple[str, ...]


def draw_scene(
    names: Sequence[str],
    *,
    size: int = 96,
    count: tuple[int, int] = (1, 3),
    radius: tuple[float, float] = (0.14, 0.28),
    seed: int = 0,
) -> Scene:
    """A photo with ``count`` (from, to) objects of classes drawn from ``names``.

    names: classes such as "red circle". size: side in pixels. radius: (from, to), of an object, as
    a share of the side. Raises OpenTransError for a name that cannot be drawn.
    """
    unknown = [name for name in names if not _is_class(name)]
    if unknown or not names or size < 16:
        raise OpenTransError(
            f"a scene of {size} pixels with {list(names)[:4]} cannot be drawn"
            + (f": {unknown[0]!r} is no class" if unknown else "")
            + f". Use 16 pixels or more, and classes of a colour ({', '.join(COLOURS)}) and a "
            f"shape ({', '.join(SHAPES)}), such as 'red circle'."
        )
    random = np.random.default_rng(seed)
    image = photo(size, random)
    objects = np.zeros((size, size), np.int32)
    found: list[str] = []
    for _ in range(int(random.integers(count[0], count[1] + 1))):
        name = names[int(random.integers(len(names)))]
        for _ in range(20):  # places tried; a full image keeps what it has
            inside = _outline(name.split()[1], size, radius, random)
            if inside.sum() >= 12 and _leaves_enough(inside, objects):
                break
        else:
            continue
        found.append(name)
        objects[inside] = len(found)
        image[inside] = _surface(name.split()[0], size, random)[inside]
    image += random.normal(0, 0.015, image.shape)  # the sensor
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return Scene(pixels, objects, tuple(found))


def photo(size: int, random: np.random.Generator) -> np.ndarray:
    """A photo-like background: float64 [size, size, 3], 0 to 1.

    Noise with the 1/f amplitude spectrum of natural images, in muted colours, under a light from
    one side.
    """
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    falloff = 1 / np.maximum(frequency, 1 / size) ** random.uniform(1.0, 1.4)
    layers = []
    for _ in range(3):
        noise = np.fft.irfft2(
            np.fft.rfft2(random.normal(size=(size, size))) * falloff, (size, size)
        )
        layers.append(noise / noise.std())
    grey, warm, other = layers
    brightness, contrast = random.uniform(0.3, 0.65), random.uniform(0.08, 0.16)
    tint = random.normal(0, 0.05, 3)
    image = brightness + contrast * grey[..., None] + tint
    image = image + 0.03 * warm[..., None] * np.array([1, 0, -1])
    image = image + 0.03 * other[..., None] * np.array([-0.5, 1, -0.5])
    down, right = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    light = random.normal(0, 0.08, 2)
    return np.clip(image + (light[0] * down + light[1] * right)[..., None], 0, 1)


def _is_class(name: str) -> bool:
    colour, _, shape = name.partition(" ")
    return colour in COLOURS and shape in SHAPES


def _outline(
    shape: str, size: int, radius: tuple[float, float], random: np.random.Generator
) -> np.ndarray:
    """Pixels inside a shape of random place, size, angle and aspect: bool [size, size]."""
    r = random.uniform(*radius) * size
    cy, cx = random.uniform(0.8 * r, size - 0.8 * r, 2)
    angle = random.uniform(-0.5, 0.5)
    stretch = random.uniform(0.9, 1.1)
    y, x = np.mgrid[:size, :size] + 0.5
    y, x = (y - cy) / (r * stretch), (x - cx) * stretch / r
    y, x = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.88
    if shape == "triangle":
        return (y <= 0.75) & (1.9 * abs(x) <= y + 1.05)
    return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1)


def _leaves_enough(inside: np.ndarray, objects: np.ndarray) -> bool:
    before = np.bincount(objects.ravel())
    hidden = np.bincount(objects[inside], minlength=len(before))
    return bool((hidden[1:] <= (1 - LEAST_VISIBLE) * before[1:]).all())


def _surface(colour: str, size: int, random: np.random.Generator) -> np.ndarray:
    """The colour of an object, disturbed, shaded and a little rough: [size, size, 3]."""
    base = np.array(COLOURS[colour]) * random.uniform(0.8, 1.1) + random.normal(0, 0.04, 3)
    down, right = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    light = random.normal(0, 0.06, 2)
    shade = 1 + light[0] * down + light[1] * right + random.normal(0, 0.04, (size, size))
    return np.clip(base * shade[..., None], 0, 1)
