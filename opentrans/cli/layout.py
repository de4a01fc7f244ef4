"""Tables and paragraphs that fit a width: nothing is dropped.

A table that is too wide loses the module path that all its layers share (a line above says which),
then wraps its text columns and the words of its headings, then continues in a second block that
repeats the first column.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 120
GAP = 2
ELISION = "~"
_NARROWEST = 16  # a text column is not wrapped below this
_FIRST = 48  # longest first column that the blocks of a table repeat as it is


@dataclass(frozen=True)
class Block:
    """Columns side by side. Cells hold their lines; ``right`` are the right-aligned columns."""

    header: list[list[str]]
    rows: list[list[list[str]]]
    widths: list[int]
    right: set[int]

    def lines(self) -> list[str]:
        """Aligned with spaces; a rule below the header, where there is one."""
        found: list[str] = []
        if any(any(cell) for cell in self.header):
            found += self._lines(self.header)
            found.append((" " * GAP).join("-" * width for width in self.widths))
        for row in self.rows:
            found += self._lines(row)
        return found

    def _lines(self, cells: list[list[str]]) -> list[str]:
        lines = []
        for at in range(max(map(len, cells), default=0)):
            texts = (cell[at] if at < len(cell) else "" for cell in cells)
            aligned = (
                text.rjust(width) if column in self.right else text.ljust(width)
                for column, (text, width) in enumerate(zip(texts, self.widths, strict=True))
            )
            lines.append((" " * GAP).join(aligned).rstrip())
        return lines


def lay_out(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: set[int],
    *,
    width: int = WIDTH,
    gap: int = GAP,
) -> tuple[str | None, list[Block]]:
    """(what ``~`` stands for in the first column or None, blocks at most ``width`` wide).

    ``gap`` is what a border between two columns takes.
    """
    header, body = list(columns), [list(row) for row in rows]
    if not header:
        return None, []
    prefix = None
    if _total(_widths(header, body), gap) > width:
        prefix = shared_path([row[0] for row in body])
        if prefix is not None:
            body = [[row[0].replace(prefix, ELISION, 1), *row[1:]] for row in body]
    limits = [min(natural, width) for natural in _widths(header, body)]
    # Words of a heading above numbers go below one another.
    for column in right:
        words = max((len(word) for word in header[column].split()), default=0)
        limits[column] = max([words, *(len(row[column]) for row in body)])
    if _total(_widths(header, body), gap) <= width:
        limits = _widths(header, body)
    text = [column for column in range(1, len(header)) if column not in right]
    while _total(limits, gap) > width and any(limits[column] > _NARROWEST for column in text):
        widest = max(text, key=lambda column: limits[column])
        over = _total(limits, gap) - width
        limits[widest] = max(_NARROWEST, limits[widest] - over)
    if _total(limits, gap) > width:
        limits[0] = min(limits[0], _FIRST)
    return prefix, [
        _block(header, body, limits, chosen, right) for chosen in _split(limits, width, gap)
    ]


def shared_path(names: Sequence[str]) -> str | None:
    """The longest dotted path before several names, without its last dot; None if there is none.

    A few rows may stand outside of it (a total), but not one in four.
    """
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            path = ".".join(parts[:end])
            counts[path] = counts.get(path, 0) + 1
    shared = [path for path, count in counts.items() if count > 1 and 4 * count > 3 * len(names)]
    longest = max(shared, key=len, default="")
    return longest if len(longest) > len(ELISION) else None


def fit_text(text: str, width: int = WIDTH) -> str:
    """``text`` with lines too long wrapped between words, continued under their indent."""
    return "\n".join(_fit_line(line, width) for line in text.split("\n"))


def _fit_line(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()))
    return "\n".join(_wrap(line.strip(), width, indent, indent + "  "))


def _wrap(text: str, width: int, first: str = "", later: str = "") -> list[str]:
    """Lines of at most ``width``; a word that alone is longer is cut, and goes on below."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False,
        drop_whitespace=True, replace_whitespace=False, expand_tabs=False,
    ) or [first]  # fmt: skip


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]


def _total(widths: Sequence[int], gap: int) -> int:
    return sum(widths) + gap * (len(widths) - 1)


def _split(widths: Sequence[int], width: int, gap: int) -> list[list[int]]:
    """Columns of each block; every block starts with the first."""
    blocks = [[0]]
    for column in range(1, len(widths)):
        tried = [*blocks[-1], column]
        if len(blocks[-1]) > 1 and _total([widths[at] for at in tried], gap) > width:
            tried = [0, column]
            blocks.append(tried)
        blocks[-1] = tried
    return blocks


def _block(
    header: list[str],
    rows: list[list[str]],
    limits: Sequence[int],
    chosen: list[int],
    right: set[int],
) -> Block:
    wrapped_header = [_wrap(header[column], max(1, limits[column])) for column in chosen]
    tallest = max(map(len, wrapped_header))
    wrapped_header = [[""] * (tallest - len(cell)) + cell for cell in wrapped_header]
    wrapped = [[_cell(row[column], limits[column]) for column in chosen] for row in rows]
    widths = [
        max(len(line) for cells in [wrapped_header, *wrapped] for line in cells[at])
        for at in range(len(chosen))
    ]
    return Block(
        wrapped_header, wrapped, widths, {at for at, column in enumerate(chosen) if column in right}
    )


def _cell(text: str, limit: int) -> list[str]:
    if len(text) <= limit and "\n" not in text:
        return [text]  # as it is, indent included
    return [line for part in text.split("\n") for line in _wrap(part, max(1, limit))]
