"""``opentrans bench op --peers``: other engines beside the rows of linear layers and MLPs, and the
command that repeats a row."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench_rows import show_repeats
from .bench_trunk import show_peers
from .render import Output

if TYPE_CHECKING:
    from opentrans_kernels.bench.op_case import Case

Row = dict[str, Any]


def rounds_of(options: argparse.Namespace) -> int:
    """Rounds of a case."""
    return options.rounds or (5 if options.quick else 7)


def row_command(
    options: argparse.Namespace,
    row: Row,
    densities: list[float] | None = None,
    peers: str | None = None,
) -> list[str]:
    """What measures ``row`` again, alone; with ``densities`` all of these; with ``peers`` also
    these."""
    from opentrans_kernels.bench.rows import command_words

    return command_words(
        ("opentrans", "bench", "op"),
        ops=row["op"],
        case=row["case"],
        backends=row["backend"],
        densities=",".join(f"{d:g}" for d in densities or [row["density_asked"]]),
        size=options.size,
        size_w=options.size_w,
        batch=options.batch,
        threads=options.threads,
        isa=options.isa,
        cpus=options.cpus,
        rounds=rounds_of(options),
        peers=peers,
        peer_envs=options.peer_envs if peers else None,
    )


def ops_with_peers(names: list[str]) -> list[str]:
    """The ops named, by default all that other engines can be given.

    Raises:
        OpenTransError: one that they cannot be given.
    """
    from opentrans_kernels.bench.linear_ops import LINEAR_OPS
    from opentrans_kernels.errors import OpenTransError

    for name in names:
        if name not in LINEAR_OPS:
            raise OpenTransError(
                f"op {name!r} is not timed against other engines, only {' and '.join(LINEAR_OPS)} "
                "are; convolutions are timed in their network by 'opentrans bench trunk --peers'. "
                "Leave --peers out, or name these with --ops."
            )
    return names or list(LINEAR_OPS)


def time_peers(
    case: Case,
    rows: list[Row],
    options: argparse.Namespace,
    names: list[str],
    tell: Callable[[str], None],
) -> bool:
    """Give the exact rows of our kernels ``peers``, each taking turns with that row's kernel.

    A row whose own side fails in its process gets ``peers_error`` instead. False if interrupted.

    Raises:
        OpenTransError: other engines cannot be given this op.
    """
    from opentrans_kernels.bench.environment import portable_words
    from opentrans_kernels.bench.peers.environments import default_home
    from opentrans_kernels.bench.peers.session import measure_peers
    from opentrans_kernels.bench.peers.work import operator_work
    from opentrans_kernels.errors import OpenTransError

    home = Path(options.peer_envs) if options.peer_envs else default_home()
    for row in rows:
        if row["backend"] == "reference" or not row["exact"]:
            continue
        work = operator_work(case, row["backend"])
        try:
            row["peers"], interrupted = measure_peers(
                work,
                case.reference,
                names,
                home=home,
                isa=options.isa,
                threads=options.threads,
                allowed=row["match"]["bound"],
                rounds=rounds_of(options),
                tell=tell,
            )
        except OpenTransError as failure:
            row["peers_error"] = str(failure)
            continue
        for name, peer in row["peers"].items():
            if peer["available"]:
                peer["command"] = portable_words(row_command(options, row, peers=name))
        if interrupted:
            return False
    return True


def peer_failures(rows: list[Row]) -> list[str]:
    """Sentences about rows whose peers could not be timed."""
    return [
        f"{row['op']} {row['case']} at density {row['density_asked']:g}: the peers were not timed: "
        f"{row['peers_error']}"
        for row in rows
        if "peers_error" in row
    ]


def show_peer_rows(rows: list[Row], options: argparse.Namespace, out: Output) -> None:
    """A table per row that has peers."""
    commands = []
    for row in rows:
        if not row.get("peers"):
            continue
        what = f"{row['op']} {row['backend']} {row['case']}, density {row['density_asked']:g}"
        show_peers(row["peers"], row["exact"], out, title=f"{what}, against other engines")
        commands += [
            (f"{what}, {name}", row_command(options, row, peers=name))
            for name, peer in row["peers"].items()
            if peer["available"]
        ]
    if commands:
        out.text()
        show_repeats(commands, out)
