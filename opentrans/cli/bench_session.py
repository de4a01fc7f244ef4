"""What the row-by-row benchmarks share: a limited, pinned process, the canary, and results on disk
after every row, so that an interrupt costs the row that was running and no more."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from opentrans_kernels.bench.environment import ISAS

from . import INTERRUPTED
from .options import AGAIN, positive
from .progress import begin
from .render import Output, to_json, write_atomically

__all__ = ["INTERRUPTED", "ISAS", "Session", "add_limits", "chosen_cpus", "command_of", "limit"]


def add_limits(parser: argparse.ArgumentParser, *, threads: bool = True) -> None:
    """``--isa``, ``--threads``, ``--cpus`` and ``--quick``."""
    if threads:
        parser.add_argument(
            "--threads", type=positive, default=1, metavar="N", help="CPU threads (default 1)"
        )
    parser.add_argument(
        "--isa", choices=ISAS, default="native",
        help="limit BOTH sides to this instruction set (default native: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--cpus", metavar="A,B,...", help="pin to these CPUs (default: the last ones available)"
    )
    parser.add_argument("--quick", action="store_true", help="few cases and rounds")


def limit(options: argparse.Namespace, out: Output) -> int | list[int] | None:
    """Limit and pin this process.

    Returns:
        An exit code if the command had to start over in a process that is limited from its start,
        else the CPUs it is pinned to (None where pinning is absent).
    """
    from opentrans_kernels.bench.environment import missing_limits, rerun
    from opentrans_kernels.bench.timing import pin

    if missing_limits(options.isa, options.threads):
        return rerun([*AGAIN, *options.arguments], options.isa, options.threads)
    cpus = chosen_cpus(options.cpus, options.threads)
    if cpus is not None:
        pin(cpus)  # before torch starts its threads, which inherit it
    begin(out, f"opentrans bench {options.target}")
    import torch

    torch.set_num_threads(options.threads)
    return cpus


def chosen_cpus(text: str | None, threads: int) -> list[int] | None:
    """CPUs of ``--cpus``, or the last ``threads`` available ones; None where pinning is absent.

    Raises:
        OpenTransError: not a list of numbers.
    """
    from opentrans_kernels.bench.timing import choose_cpus
    from opentrans_kernels.errors import OpenTransError

    if text is None:
        return choose_cpus(threads)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise OpenTransError(
            f"--cpus {text!r} is not a list of CPU numbers. Write for example --cpus 0,1."
        ) from error


def command_of(options: argparse.Namespace) -> list[str]:
    """The command that was run, without the place its result was written to."""
    from opentrans_kernels.bench.environment import portable_words

    told = {str(options.json): Path(str(options.json)).name}
    return ["opentrans", *portable_words([told.get(word, word) for word in options.arguments])]


def show_canary(canary: dict[str, Any], out: Output) -> None:
    """Say so if the machine was disturbed."""
    for reason in canary["reasons"]:
        out.warn(f"DISTURBED machine: {reason}. Repeat the run when it is quiet.")


class Session:
    """The result of one command while it grows."""

    def __init__(
        self, kind: str, options: argparse.Namespace, out: Output, cpus: list[int] | None
    ) -> None:
        from opentrans_kernels.bench import canary
        from opentrans_kernels.bench.environment import environment_block, onednn_isa
        from opentrans_kernels.bench.schema import envelope

        self.options, self.out = options, out
        begin(out, f"opentrans bench {kind}")
        self.result: dict[str, Any] = {
            **envelope(kind, complete=False),
            **environment_block(),
            "threads": options.threads,
            "isa": options.isa,
            "onednn_isa": onednn_isa(),
            "pinned_cpus": cpus,
            "command": command_of(options),
            "failed_checks": [],
        }
        self._before = canary.look(threads=options.threads)
        self._look()

    def save(self) -> None:
        """Write what there is, if a file was asked for; marked as incomplete."""
        if self.options.json not in (None, "-"):
            write_atomically(self.options.json, to_json(self.result))

    def finish(self, *, complete: bool, failed: list[str]) -> int:
        """Write the whole result; returns the exit code."""
        self._look()
        self.result["complete"] = complete
        self.result["failed_checks"] = failed
        self.out.finish(self.result)
        show_canary(self.result["canary"], self.out)
        for line in failed:
            self.out.warn(line)
        if not complete:
            self.out.warn("interrupted: what was finished was kept")
            return INTERRUPTED
        return 1 if failed else 0

    def _look(self) -> None:
        from opentrans_kernels.bench import canary

        shares: dict[str, float] = {}
        if self.options.threads == 1:
            for row in self.result.get("rows", ()):
                shares.setdefault("all rows", 0.0)
                shares["all rows"] += row.get("contended_share", 0.0) / len(self.result["rows"])
        now = canary.look(threads=self.options.threads)
        self.result["canary"] = canary.verdict(self._before, now, shares=shares)
