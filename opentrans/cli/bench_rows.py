"""Cells that every table of a benchmark shares, and the commands below it that repeat its rows."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .render import Output

INEXACT = "inexact"  # shown in place of a ratio: a wrong answer has no speed


def ratio_cell(spread: Mapping[str, Any] | None, digits: int = 2) -> str:
    """A ratio with its quartiles: ``2.37x (2.32-2.42)``; ``inexact`` for None."""
    if spread is None:
        return INEXACT
    median, low, high = (f"{spread[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median}x ({low}-{high})"


def match_cell(match: Mapping[str, Any] | None) -> str | None:
    """``equal`` or ``DIFFERS`` with the error; for the latter also the bound it breaks."""
    if match is None:
        return None
    if match["equal"]:
        return f"equal {match['error']:.1e}"
    return f"DIFFERS {match['error']:.1e} > {match['bound']:.1e}"


def show_repeats(commands: Iterable[tuple[str, Sequence[str]]], out: Output) -> None:
    """The command of each row, by the row's name; one line where all rows have the same."""
    found = list(commands)
    if not found:
        return
    if len({tuple(words) for _, words in found}) == 1:
        out.text(f"repeat: {shlex.join(found[0][1])}")
        return
    out.text("repeat one row:")
    for name, words in found:
        out.text(f"  {name}: {shlex.join(words)}")
