"""What the commands show: rich on a terminal, plain text elsewhere, JSON on request.

Commands describe *what* to show; whether that becomes a coloured table, aligned text or nothing
(JSON on stdout) is decided here, once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

from opentrans_kernels.errors import CheckpointError

from .layout import ELISION, WIDTH, Block, fit_text, lay_out
from .progress import steps

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
        self.error_console: Any = None
        self.begun = False  # whether ``progress.begin`` has spoken
        self._said: set[str] = set()
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

    def text(self, text: str = "", *, whole: bool = False) -> None:
        """One paragraph, wrapped on a terminal; ``whole``: a command or path to copy, as it is.

        In a pipe a paragraph stays one line, so that ``grep`` finds a phrase wherever it falls.
        """
        if self.quiet:
            return
        text = text if whole else self._fit(text)
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
            text = self._fit(text)
            self.stdout.write(f"\n{text}\n{'-' * min(WIDTH, max(map(len, text.splitlines())))}\n")

    def _fit(self, text: str) -> str:
        return fit_text(text) if self.rich or self.stdout.isatty() else text

    def warn(self, text: str) -> None:
        """Something the reader must not miss; on stderr, also when JSON is on stdout.

        Said once in a command, however many of its parts have to say it.
        """
        if text in self._said:
            return
        self._said.add(text)
        if self.error_console is not None:
            self.error_console.print(f"warning: {text}", style="bold yellow", markup=False)
        else:
            self.stderr.write(f"warning: {text}\n")

    def note(self, text: str) -> None:
        """A remark on the result, said once in a command."""
        if text not in self._said:
            self._said.add(text)
            self.text(f"note: {text}")

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
        if self._console is None:
            self.stdout.write(plain_table(title, columns, texts, aligned))
            return
        # A border and a blank on either side of every cell.
        width = min(WIDTH, self._console.width)
        prefix, blocks = lay_out(columns, texts, aligned, width=width - 4, gap=3)
        for block in blocks:
            self._rich_table(_titled(title, prefix), block)

    def progress(self, label: str) -> AbstractContextManager[Callable[[str], None]]:
        """``progress.steps`` on this output."""
        return steps(self, label)

    def write_error(self, text: str) -> None:
        """``text`` on stderr, at once."""
        self.stderr.write(text)
        self.stderr.flush()

    def finish(self, payload: Mapping[str, Any]) -> None:
        """Write the command's JSON, if it was asked for; files are replaced atomically."""
        if self.json_target is None:
            return
        text = to_json(payload)
        if self.json_target == "-":
            self.stdout.write(text)
        else:
            write_atomically(self.json_target, text)
            self.text(f"wrote {self.json_target}", whole=True)

    def _start_rich(self) -> None:
        try:
            from rich.console import Console
        except ImportError:
            return  # rich is optional; plain text says the same
        self._console = Console(file=self.stdout)
        self.error_console = Console(file=self.stderr)

    def _rich_table(self, title: str | None, block: Block) -> None:
        from rich.table import Table
        from rich.text import Text

        header = ["\n".join(lines) for lines in block.header]
        table = Table(title=title, title_justify="left", show_header=any(header))
        for index, column in enumerate(header):
            table.add_column(
                Text(column),
                justify="right" if index in block.right else "left",
                overflow="fold",
                min_width=block.widths[index],
            )
        for row in block.rows:
            table.add_row(*(Text("\n".join(lines)) for lines in row))
        self._console.print(table)


def _titled(title: str | None, prefix: str | None) -> str | None:
    """The title, and what was taken out of the names of the first column."""
    return title if prefix is None else f"{title or ''}\n{ELISION} = {prefix}".strip()


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
    """Columns aligned with spaces, at most ``WIDTH`` wide, ending with a newline."""
    prefix, blocks = lay_out(columns, rows, right)
    title = _titled(title, prefix)
    tables = ["\n".join(block.lines()) for block in blocks]
    return "\n".join(filter(None, [title, "\n\n".join(tables)])) + "\n"


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


def make_folder(folder: Path, option: str = "--output") -> None:
    """Create a folder for output, and those above it. option: the one that names it.

    Raises:
        CheckpointError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file system that takes none, a full disk
        raise CheckpointError(
            f"the folder {folder} cannot be created: {error.strerror or error}. Name another one "
            f"with {option}."
        ) from error


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the whole new one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from opentrans_kernels.masks import atomic_write

    atomic_write(path, text.encode("utf-8"))
