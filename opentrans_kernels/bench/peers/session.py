"""Peers and ours, taking turns: one process runs while the others wait for their next command."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import native
from ...errors import OpenTransError
from ..environment import isa_environment
from ..rows import matched
from ..timing import Timing, median_pair
from ..variants import relative_error
from .environments import absent, python_of
from .process import Worker
from .registry import PEERS, Peer
from .work import Work

OURS = "ours"
WORKERS = Path(__file__).resolve().parent / "workers"
_WARM_UP = "sample 3 3"
_SAMPLE = "sample 1 2"


@dataclass
class Turn:
    """One side of the session. ``error`` is set once it failed; ``timing`` keeps what it had."""

    name: str
    worker: Worker | None = None
    timing: Timing = field(default_factory=lambda: Timing("", 2))
    rel_err: float | None = None
    error: str | None = None
    note: str = ""

    def fail(self, error: Exception) -> None:
        """Record why this side stopped, and end its process."""
        self.error = str(error)
        self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def measure_peers(
    work: Work,
    reference: torch.Tensor,
    names: Sequence[str],
    *,
    home: Path,
    isa: str,
    threads: int,
    allowed: float,
    rounds: int = 7,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Time peers on a network or an operator, interleaved with ours by process.

    Args:
        work: what is computed. reference: its float64 output.
        names: peers of the registry. home: directory of their environments.
        allowed: error of ours against ``reference`` above which nothing is timed.

    Returns:
        name -> entry, and whether the run was interrupted. An entry has ``available`` and either
        times, ``speedup_of_ours`` (its wall time / ours within a round; ``_cpu``: its CPU time) and
        ``max_rel_err``, or ``error``; a peer that died keeps its finished rounds under ``partial``.

    Raises:
        OpenTransError: our own side does not run, or is not the network it should be.
    """
    entries: dict[str, dict[str, Any]] = {}
    turns = [Turn(OURS)]
    for name in names:
        why = absent(name, home)
        if why is None:
            turns.append(Turn(name))
        else:
            entries[name] = {"available": False, "skipped": True, "error": why}
    if len(turns) == 1:
        return entries, False
    interrupted = False
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        work.write(folder)
        refused = _without_graph(work, turns, folder)
        for turn in refused:
            entries[turn.name] = {"available": False, "skipped": True, "error": turn.error}
        turns = [turn for turn in turns if turn not in refused]
        if len(turns) == 1:
            return entries, False
        try:
            for turn in turns:
                tell(f"peers: starting {turn.name}")
                _start(turn, folder, work, home, isa, threads, reference)
            _check_ours(turns[0], allowed)
            for index in range(rounds):
                tell(f"peers: round {index + 1} of {rounds}")
                _round(turns, index)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            for turn in turns:
                if turn.worker is not None:
                    description = turn.worker.description
                    entries.setdefault(turn.name, {})["description"] = description
                turn.close()
    ours, *others = turns
    for turn in others:
        entries[turn.name] = _entry(turn, ours, entries.get(turn.name, {}), interrupted, allowed)
    entries.pop(OURS, None)
    return entries, interrupted


def _without_graph(work: Work, turns: list[Turn], folder: Path) -> list[Turn]:
    """Write the graph if a side reads it; the sides that cannot run for want of it, with why."""
    reading = [turn for turn in turns if turn.name in PEERS and PEERS[turn.name].reads_graph]
    try:
        if reading:
            work.graph(folder)
    except OpenTransError as error:
        for turn in reading:
            turn.error = str(error)
        return reading
    return []


def _start(
    turn: Turn,
    folder: Path,
    work: Work,
    home: Path,
    isa: str,
    threads: int,
    reference: torch.Tensor,
) -> None:
    """Start a side, compare its output and warm it up; a peer's failure is kept in its turn."""
    peer = PEERS.get(turn.name)
    try:
        turn.worker = Worker(
            turn.name, *_command(peer, turn.name, folder, work, home, isa, threads)
        )
        path = folder / f"{turn.name}.npy"
        if peer is None or peer.same_network:
            turn.worker.ask(f"output {path}")
            found = torch.from_numpy(np.load(path))
            if found.shape != reference.shape:
                raise OpenTransError(
                    f"{turn.name} answered with shape {list(found.shape)} instead of "
                    f"{list(reference.shape)}: it does not compute this network. Leave it out."
                )
            turn.rel_err = relative_error(found, reference)
        if peer is not None and not peer.limited and isa != "native":
            turn.note = f"cannot be limited to {isa}: it may use all the CPU has"
        turn.worker.ask(_WARM_UP)
    except (OpenTransError, OSError, ValueError) as error:
        turn.fail(error)
        if peer is None:
            raise


def _check_ours(ours: Turn, allowed: float) -> None:
    """Our worker must run the kernels of this process, exactly."""
    assert ours.worker is not None and ours.rel_err is not None
    here = native.cpu_capability() if native.available() else None
    there = ours.worker.description["cpu_capability"]
    if here != there:
        raise OpenTransError(
            f"our worker process runs on {there or 'the reference kernels'}, this process on "
            f"{here or 'the reference kernels'}: the extension changed in between. Repeat the run."
        )
    if ours.rel_err > allowed:
        raise OpenTransError(
            f"our worker's error {ours.rel_err:.1e} exceeds {allowed:.1e}, twice that of dense "
            "float32 or 1e-6, so peers are not timed against it. Report this with 'opentrans info'."
        )


def _command(
    peer: Peer | None, name: str, folder: Path, work: Work, home: Path, isa: str, threads: int
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of a worker, limited to the instruction set and threads of the run."""
    environ = {**os.environ, **isa_environment(isa, threads), "NM_DISABLE_ANALYTICS": "1"}
    environ["OPENBLAS_NUM_THREADS"] = str(threads)
    script = peer.worker if peer is not None and peer.worker else work.ours
    python = sys.executable if peer is None else str(python_of(name, home))
    arguments = [str(folder), str(threads)]
    if peer is None or peer.shares_torch:
        root = str(Path(__file__).resolve().parents[3])
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        arguments += work.words
    if peer is not None and peer.isa_variable is not None and isa != "native":
        environ[peer.isa_variable] = isa
    return [python, str(WORKERS / script), *arguments], environ


def _round(turns: list[Turn], index: int) -> None:
    """One sample of every side that still runs, in rotating order; all or none are kept."""
    alive = [turn for turn in turns if turn.worker is not None]
    shift = index % len(alive)
    answers = {}
    for turn in alive[shift:] + alive[:shift]:
        try:
            assert turn.worker is not None
            answers[turn.name] = turn.worker.ask(_SAMPLE)
        except OpenTransError as error:
            turn.fail(error)
            if turn.name == OURS:
                raise
    for turn in alive:
        if turn.name in answers:
            turn.timing.wall_ms.append(answers[turn.name]["wall_ms"])
            turn.timing.cpu_ms.append(answers[turn.name]["cpu_ms"])


def _entry(
    turn: Turn, ours: Turn, known: dict[str, Any], interrupted: bool, allowed: float
) -> dict[str, Any]:
    finished = len(turn.timing.wall_ms)
    if turn.error is not None or not finished:
        error = turn.error or "interrupted before its first round"
        entry: dict[str, Any] = {"available": False, "skipped": False, "error": error}
        if finished:
            entry["partial"] = {"rounds": finished, **turn.timing.to_dict()}
        return entry
    description = dict(known.get("description", {}))
    notes = [note for note in (description.pop("note", ""), turn.note) if note]
    pair = median_pair(turn.timing.wall_ms, ours.timing.wall_ms)
    cpu = median_pair(turn.timing.cpu_ms, ours.timing.cpu_ms)
    return {
        "available": True,
        **turn.timing.to_dict(),
        "ms": pair.slow_ms,
        "ours_ms": pair.fast_ms,
        "speedup_of_ours": pair.ratios.to_dict(),
        "speedup_of_ours_cpu": cpu.ratios.to_dict(),
        "max_rel_err": turn.rel_err,
        "match": None if turn.rel_err is None else matched(turn.rel_err, allowed),
        "note": "; ".join(notes),
        "rounds": finished,
        **description,
    }
