"""Signs of life on stderr, the one place for them: a command says at once what it is doing.

A terminal shows the present step in place, by a spinner or a bar. Elsewhere (a pipe, a log) every
step is a line, at most one in ``PAUSE_S`` seconds after the first. stdout stays clean.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TextIO

PAUSE_S = 5.0

Bar = Callable[[int, int, str], None]


class Screen(Protocol):
    """What is needed of ``render.Output``."""

    begun: bool
    rich: bool
    stderr: TextIO

    @property
    def error_console(self) -> Any: ...

    def write_error(self, text: str) -> object: ...


class Lines:
    """Steps as lines on a stream, not more often than ``PAUSE_S``."""

    def __init__(
        self, write: Callable[[str], object], label: str, clock: Callable[[], float]
    ) -> None:
        self._write, self._label, self._clock = write, label, clock
        self._last: float | None = None

    def __call__(self, step: str) -> None:
        now = self._clock()
        if self._last is None or now - self._last >= PAUSE_S:
            self._last = now
            self._write(f"{self._label}: {step}\n")


def begin(out: Screen, label: str) -> None:
    """Say what was started before PyTorch is imported, which alone takes seconds; once."""
    if not out.begun and "torch" not in sys.modules:
        out.write_error(f"{label}: loading PyTorch\n")
    out.begun = True


@contextlib.contextmanager
def steps(
    out: Screen, label: str, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """A function that shows the present step; the label is shown at once."""
    if out.stderr.isatty() and out.error_console is not None:
        with out.error_console.status(label) as status:
            yield lambda step: status.update(f"{label}: {step}")
        return
    out.write_error(f"{label} ...\n")
    yield Lines(out.write_error, label, clock)


@contextlib.contextmanager
def progress_bar(
    out: Screen, label: str, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Bar]:
    """A bar of finished parts on a terminal, lines elsewhere.

    Yields ``bar(done, total, name)``, the callback of ``estimate_alpha``.
    """
    if not out.stderr.isatty():
        lines = Lines(out.write_error, label, clock)

        def line(done: int, total: int, name: str) -> None:
            lines(f"{done} of {total}, {name}")

        yield line
        return
    if not out.rich:

        def plain(done: int, total: int, name: str) -> None:
            filled = 30 * done // max(1, total)
            bar = "#" * filled + "." * (30 - filled)
            out.write_error(f"\r{label} [{bar}] {done}/{total} {name[:30]:<30}")

        yield plain
        out.write_error("\r" + " " * 90 + "\r")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[layer]}", markup=False),
    )
    with Progress(*columns, console=Console(file=out.stderr), transient=True) as bar:
        task = bar.add_task(label, total=None, layer="")

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, layer=name)

        yield advance
