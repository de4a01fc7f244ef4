"""Several processes, one model each, that take pictures from one list."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from opentrans_kernels.errors import OpenTransError

from .folder import OutputFolder
from .pictures import Picture
from .recipe import Recipe

__all__ = ["Failure", "OnDone", "OnReady", "work_in_processes"]

#: (picture, "" or why it failed), as soon as it is known.
OnDone = Callable[[Picture, str], None]
#: What ``systems.describe`` says of a model that was built.
OnReady = Callable[[dict[str, Any]], None]


class Failure(RuntimeError):
    """A worker met an error that is none of the input: a bug."""


@dataclass
class _Worker:
    process: Any
    link: Connection
    ready: bool = False
    picture: Picture | None = None


def work_in_processes(
    recipe: Recipe,
    pictures: Sequence[Picture],
    folder: OutputFolder,
    *,
    processes: int,
    font: str | None = None,
    on_done: OnDone,
    on_ready: OnReady,
) -> None:
    """Segment ``pictures`` in new processes (spawned, not forked).

    A process that ends on its own, for lack of memory for instance, costs the picture it was at,
    which is reported like one that cannot be read; another process takes its place.

    Raises OpenTransError if no model can be built, and Failure for a bug.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(pictures)
    workers: list[_Worker] = []

    def start() -> None:
        link, theirs = context.Pipe()
        arguments = (theirs, recipe, str(folder.path), font)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        workers.append(_Worker(process, link))

    try:
        for _ in range(min(processes, len(pictures))):
            start()
        while workers:
            for link in wait([worker.link for worker in workers]):
                worker = next(one for one in workers if one.link is link)
                try:
                    kind, content = worker.link.recv()
                except (EOFError, ConnectionError):
                    workers.remove(worker)
                    _ended(worker, on_done)
                    if waiting:
                        start()
                    continue
                if kind == "refused":
                    raise OpenTransError(content)
                if kind == "bug":
                    raise Failure(content)
                if kind == "ready":
                    worker.ready = True
                    on_ready(content)
                elif worker.picture is not None:
                    on_done(worker.picture, content)
                if not _next(worker, waiting):
                    workers.remove(worker)
                    worker.process.join()
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _next(worker: _Worker, waiting: deque[Picture]) -> bool:
    """Give a worker its next picture; False, and its end, where there is none."""
    worker.picture = waiting.popleft() if waiting else None
    try:
        worker.link.send(worker.picture)
    except (BrokenPipeError, ConnectionError):
        return True  # it is gone, which the next look at its pipe shows
    return worker.picture is not None


def _ended(worker: _Worker, on_done: OnDone) -> None:
    worker.process.join()
    code = worker.process.exitcode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if not worker.ready:
        raise OpenTransError(
            f"a worker process ended before its model was built ({how}). If memory is short, use "
            "fewer --processes."
        )
    if worker.picture is not None:
        on_done(
            worker.picture,
            f"the process that segmented it ended ({how}). If memory is short, use fewer "
            "--processes or a smaller --size",
        )


def _serve(link: Connection, recipe: Recipe, path: str, font: str | None) -> None:
    """The life of a worker: build, then picture after picture until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    try:
        from .job import tried
        from .systems import build, describe

        try:
            segmenter = build(recipe)
        except OpenTransError as error:
            link.send(("refused", str(error)))
            return
        link.send(("ready", describe(segmenter)))
        folder = OutputFolder(Path(path))
        while (picture := link.recv()) is not None:
            link.send(("done", tried(segmenter, picture, folder, font)))
    except (EOFError, BrokenPipeError, ConnectionError):
        return  # the parent is gone
    except Exception as error:
        link.send(("bug", f"{type(error).__name__} in a worker: {error}"))
