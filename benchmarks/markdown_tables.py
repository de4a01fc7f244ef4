"""Markdown tables of the generated parts of the documentation."""

from __future__ import annotations

from collections.abc import Sequence

EMPTY = "No results are stored yet."


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; cells may not break it."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
