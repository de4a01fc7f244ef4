"""Class names as they are typed, and a colour for each."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from opentrans_kernels.errors import OpenTransError

__all__ = ["MOST_CLASSES", "NONE_COLOUR", "colours_of", "none_of", "parse_classes"]

MOST_CLASSES = 65_535  # a 16-bit label has no more numbers besides "none"
NONE_COLOUR = (0, 0, 0)
#: The first colours, easily told apart and named; further ones are computed.
FIRST = (
    (230, 75, 60), (60, 130, 220), (70, 175, 80), (245, 190, 45), (145, 85, 200), (40, 190, 195),
    (240, 130, 40), (235, 110, 175), (125, 85, 60), (165, 205, 70), (95, 105, 150), (255, 155, 140),
    (120, 190, 250), (0, 110, 90), (180, 140, 30), (190, 165, 225),
)  # fmt: skip
GOLDEN = 0.618033988749895  # steps of this share of a circle never come close to one another


def parse_classes(text: str) -> tuple[str, ...]:
    """Class names of ``"cat, road"``, or of ``@FILE`` with one name per line.

    Blank lines and lines that start with # are passed over; a line may hold commas. Raises
    OpenTransError for no name, a name that comes twice, a file that cannot be read, or more names
    than 65535.
    """
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise OpenTransError(
                f"the class list {text[1:]} cannot be read ({error}). Name a UTF-8 text file with "
                "one class per line, or write the classes: --classes 'cat, road'."
            ) from error
        names = [line for line in lines if not line.lstrip().startswith("#")]
    else:
        names = text.split(",")
    found = [" ".join(name.split()) for name in names]
    found = [name for name in found if name]
    if not found:
        raise OpenTransError(
            f"--classes {text!r} names no class. Write for example --classes 'cat, road, sky', or "
            "--classes @FILE with one class per line."
        )
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        raise OpenTransError(
            f"--classes names {twice[0]!r} more than once, so two classes could not be told apart. "
            "Leave out one."
        )
    if len(found) > MOST_CLASSES:
        raise OpenTransError(
            f"--classes names {len(found)} classes; labels have 16 bits, for {MOST_CLASSES} at "
            "most. Segment with a part of them."
        )
    return tuple(found)


def none_of(classes: int) -> int:
    """The label of pixels without a class: 255, and 65535 where 8 bits do not suffice."""
    return 255 if classes <= 255 else 65535


def colours_of(classes: Sequence[str]) -> list[tuple[int, int, int]]:
    """One RGB colour per class, the same for the same place in the list."""
    found = list(FIRST[: len(classes)])
    for number in range(len(found), len(classes)):
        hue = (number * GOLDEN) % 1
        light, full = (0.45, 0.58, 0.7)[number % 3], (0.75, 0.5)[number // 3 % 2]
        found.append(tuple(round(255 * v) for v in colorsys.hls_to_rgb(hue, light, full)))  # type: ignore[arg-type]
    return found
