"""Class names as they are typed, and a colour for each."""

from __future__ import annotations

import colorsys
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
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
#: Words in class names -> the colour they mean.
NAMED = {
    "red": FIRST[0], "blue": FIRST[1], "green": FIRST[2], "yellow": FIRST[3], "purple": FIRST[4],
    "orange": FIRST[6], "pink": FIRST[7], "brown": FIRST[8], "background": (112, 118, 128),
    "other": (148, 152, 158),
}  # fmt: skip
DISTINCT = 2000  # colours; after them one may come twice, which no eye would notice
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
    """One RGB colour per class, different for up to 2000, the same for the same list.

    A class that names a colour has it if no class before does ("red car"), and a background is
    grey, so that what stands before it is seen.
    """
    chosen: dict[str, tuple[int, int, int]] = {}
    for name in classes:
        words = [NAMED[word] for word in name.lower().split() if word in NAMED]
        if words and words[0] not in chosen.values():
            chosen[name] = words[0]
    free = _more({*chosen.values(), NONE_COLOUR})
    return [chosen[name] if name in chosen else next(free) for name in classes]


def _more(taken: set[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Colours that are not taken, without end."""
    for number in itertools.count():
        if number < len(FIRST):
            colour = FIRST[number]
        else:
            hue = (number * GOLDEN) % 1
            light, full = 0.3 + 0.45 * ((number * 7) % 16) / 15, 0.4 + 0.5 * (number % 5) / 4
            red, green, blue = colorsys.hls_to_rgb(hue, light, full)
            colour = round(255 * red), round(255 * green), round(255 * blue)
        if number >= DISTINCT or colour not in taken:
            taken.add(colour)
            yield colour
