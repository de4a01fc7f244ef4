"""What the commands show: rich on a terminal, plain text elsewhere, JSON on request.

Commands describe *what* to show; whether that becomes a coloured table, aligned text or nothing
(JSON on stdout) is decided here, once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from opentrans_kernels.errors import CheckpointError

Cell = str | int | float | None


class Output:
    """Human-readable output on stdout, warnings and progress on stderr, JSON where asked.

    Args:
        json_target: None for no JSON, "-" for stdout (human output is then left out), else a path.
        stdout, stderr: streams, the process's own by default.
        use_rich: force rich on or off; by default rich is used on a terminal if installed.
    """

    def __init__(
        self,
        json_target: str | None = None,
        *,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        use_rich: bool | None = None,
    ) -> None:
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self.json_target = json_target
        self.quiet = json_target == "-"
        self._console: Any = None
        self._error_console: Any = None
        if use_rich is None:
            use_rich = self.stdout.isatty() and os.environ.get("TERM") != "dumb"
        if use_rich:
            self._start_rich()
        if json_target not in (None, "-"):
            check_writable(json_target)

    @property
    def rich(self) -> bool:
        """Whether rich renders the output."""
        return self._console is not None

    def text(self, text: str = "") -> None:
        """One paragraph."""
        if self.quiet:
            return
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self.stdout.write(text + "\n")

    def heading(self, text: str) -> None:
        """A line that starts a section."""
        if self.quiet:
            return
        if self._console is not None:
            self._console.print()
            self._console.print(text, style="bold", markup=False, highlight=False)
        else:
            self.stdout.write(f"\n{text}\n{'-' * len(text)}\n")

    def warn(self, text: str) -> None:
        """Something the reader must not miss; on stderr, also when JSON is on stdout."""
        if self._error_console is not None:
            self._error_console.print(f"warning: {text}", style="bold yellow", markup=False)
        else:
            self.stderr.write(f"warning: {text}\n")

    def pairs(self, rows: Mapping[str, Cell] | Sequence[tuple[str, Cell]]) -> None:
        """Names and values in two columns."""
        items = list(rows.items() if isinstance(rows, Mapping) else rows)
        self.table(None, ("", ""), items, right=())

    def table(
        self,
        title: str | None,
        columns: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        *,
        right: Sequence[int] | None = None,
    ) -> None:
        """A table. ``right`` are the right-aligned columns; default: all but the first.

        Floats should be formatted by the caller, who knows their unit.
        """
        if self.quiet:
            return
        aligned = set(range(1, len(columns)) if right is None else right)
        texts = [[cell_text(cell) for cell in row] for row in rows]
        if self._console is not None:
            self._rich_table(title, columns, texts, aligned)
        else:
            self.stdout.write(plain_table(title, columns, texts, aligned))

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Callable[[str], None]]:
        """A function that shows the present step; silent when stderr is no terminal."""
        if self._error_console is not None and self.stderr.isatty():
            with self._error_console.status(label) as status:
                yield lambda step: status.update(f"{label}: {step}")
        else:
            yield lambda step: None

    def finish(self, payload: Mapping[str, Any]) -> None:
        """Write the command's JSON, if it was asked for; files are replaced atomically."""
        if self.json_target is None:
            return
        text = to_json(payload)
        if self.json_target == "-":
            self.stdout.write(text)
        else:
            write_atomically(self.json_target, text)
            self.text(f"wrote {self.json_target}")

    def _start_rich(self) -> None:
        try:
            from rich.console import Console
        except ImportError:
            return  # rich is optional; plain text says the same
        self._console = Console(file=self.stdout)
        self._error_console = Console(file=self.stderr)

    def _rich_table(
        self, title: str | None, columns: Sequence[str], rows: list[list[str]], right: set[int]
    ) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", show_header=any(columns))
        for index, column in enumerate(columns):
            table.add_column(
                column,
                justify="right" if index in right else "left",
                no_wrap=index in right or index == 0,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._console.print(table)


def cell_text(cell: Cell) -> str:
    """Text of one cell: "-" for None, four significant digits for floats."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def plain_table(
    title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], right: set[int]
) -> str:
    """Columns aligned with spaces, ending with a newline."""
    header = [list(columns)] if any(columns) else []
    widths = [
        max((len(row[index]) for row in [*header, *rows]), default=0)
        for index in range(len(columns))
    ]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    lines = [title] if title else []
    if header:
        lines += [line(header[0]), "  ".join("-" * width for width in widths)]
    lines += [line(row) for row in rows]
    return "\n".join(lines) + "\n"


def to_json(payload: Mapping[str, Any]) -> str:
    """Indented JSON with a final newline; NaN and infinities become null, paths become text."""
    return json.dumps(_plain(payload), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def check_writable(path: str | os.PathLike[str], *, directory: bool = False) -> Path:
    """Raise unless ``path`` can be written; called before long work, nothing is created.

    Raises:
        CheckpointError: says which directory is missing or not writable.
    """
    target = Path(path)
    if directory and target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} exists and is not a directory. Name another directory.")
    if not directory and target.is_dir():
        raise CheckpointError(f"{target} is a directory. Name a file inside it.")
    holder = target if directory and target.exists() else target.parent
    if not holder.is_dir():
        raise CheckpointError(
            f"{target} cannot be written: the directory {holder} does not exist. Create it first."
        )
    if not os.access(holder, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{target} cannot be written: no write permission in {holder}. Choose another place."
        )
    return target


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the whole new one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from opentrans_kernels.masks import atomic_write

    atomic_write(path, text.encode("utf-8"))
