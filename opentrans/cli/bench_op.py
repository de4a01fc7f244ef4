"""``opentrans bench op``: every kernel that runs here, on the shapes of CLIP's RN50 and at several
densities, the fastest dense operator beside it. Shows the density where sparse starts to win."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .bench_op_peers import (
    ops_with_peers,
    peer_failures,
    rounds_of,
    row_command,
    show_peer_rows,
    time_peers,
)
from .bench_rows import INEXACT, match_cell, show_repeats
from .bench_session import Session, add_limits, limit
from .options import add_json, add_size, input_size, positive
from .progress import steps
from .render import Output

SUMMARY = "every kernel on RN50's shapes by density, dense beside it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans bench op``."""
    add_limits(parser)
    add_size(parser)
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="images (default 1)")
    parser.add_argument("--ops", metavar="A,B,...", help="ops to time (default: all)")
    parser.add_argument("--backends", metavar="A,B,...", help="backends to time (default: all)")
    parser.add_argument(
        "--case", action="append", metavar="SHAPE",
        help="a shape to time, as the table names it; may be repeated (default: all)",
    )  # fmt: skip
    parser.add_argument("--densities", metavar="D,...", help="shares of weights kept")
    parser.add_argument("--rounds", type=positive, metavar="N", help="default 7, quick 5")
    parser.add_argument(
        "--peers", metavar="all|A,B,...",
        help="other engines to time on linear layers and MLPs: 'opentrans bench peers' lists and "
        "makes them",
    )  # fmt: skip
    parser.add_argument(
        "--peer-envs", metavar="DIR", help="where the peers' environments are (a cache directory)"
    )
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Measure and show; 1 if a row is inexact."""
    from opentrans_kernels.bench.peers.registry import chosen

    asked = _densities(options.densities)
    peers = chosen(options.peers, operators=True) if options.peers else []
    started = limit(options, out)
    if isinstance(started, int):
        return started
    from opentrans_kernels.bench import canary, ops
    from opentrans_kernels.bench.cases import DENSITIES, QUICK_DENSITIES
    from opentrans_kernels.bench.environment import portable_words

    names = _names(options.ops, list(ops.BUILDERS), "op")
    if peers:
        names = ops_with_peers(names)
    known = [row["backend"] for row in _records()]
    backends = _names(options.backends, known, "backend")
    densities = asked or (QUICK_DENSITIES if options.quick else DENSITIES)
    if options.quick and not names:
        names = ["sparse_conv2d", "sparse_bottleneck"]
    session = Session("op", options, out, started)
    result = session.result
    result |= {
        "rows": [],
        "skipped": ops.skipped_rows(names if options.ops else []),
        "input": [options.batch, 3, *input_size(options)],
    }
    result["ceilings"] = {
        "dense_gflops": result["canary"]["before"]["gflops"],
        "copy_gbs": canary.copy_gbs(threads=options.threads),
    }
    complete = True
    try:
        with steps(out, "bench op") as step:
            for case in ops.build_cases(
                input_size(options),
                ops=names,
                densities=densities,
                batch=options.batch,
                quick=options.quick,
                only=options.case or (),
            ):
                what = f"{case.op} {case.name}, density {case.asked:g}"
                step(what)
                rows = ops.measure_case(
                    case,
                    rounds=rounds_of(options),
                    backends=backends or (["cpu"] if options.quick else []),
                )
                for row in rows:
                    row["command"] = portable_words(row_command(options, row))
                result["rows"] += rows
                if peers:
                    complete = time_peers(
                        case, rows, options, peers, lambda said, what=what: step(f"{what}, {said}")
                    )
                session.save()
                if not complete:
                    break
    except KeyboardInterrupt:
        complete = False
    show(result, out, options)
    show_peer_rows(result["rows"], options, out)
    failed = peer_failures(result["rows"]) + [
        f"{row['op']} {row['backend']} {row['case']} at density {row['density_asked']:g} is "
        f"inexact: {row['error']:.1e} of its largest output, dense {row['dense_error']:.1e}"
        for row in result["rows"]
        if not row["exact"]
    ]
    return session.finish(complete=complete, failed=failed)


def show(result: dict[str, Any], out: Output, options: argparse.Namespace) -> None:
    """Speed-ups by density, one line per shape; then the crossovers and how to repeat a line."""
    from opentrans_kernels.bench.derive import crossovers

    rows = result["rows"]
    densities = sorted({row["density_asked"] for row in rows})
    out.heading(
        f"speed-up over the fastest dense operator by density, {result['threads']} thread(s), isa "
        f"{result['isa']}; below 1.00 dense wins"
    )
    out.text("spread: half the distance of a ratio's quartiles, in percent, the largest of a line")
    tables: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        lines = tables.setdefault((row["op"], row["backend"]), {})
        lines.setdefault(row["case"], []).append(row)
    heads = ("shape", "dense ms", *(f"{d:g}" for d in densities), "spread", "match")
    commands = []
    for (op, backend), lines in tables.items():
        out.text()
        cells = [_line(case, found, densities) for case, found in lines.items()]
        out.table(f"{op}, {backend}", heads, cells, right=range(1, len(heads) - 1))
        commands += [
            (f"{op} {backend} {case}", row_command(options, found[0], _asked(found)))
            for case, found in lines.items()
        ]
    found = [one for one in crossovers(rows) if one.backend != "reference"]
    if found:
        out.text()
        out.table(
            None,
            ("kind", "shape", "where sparse starts to win"),
            [[one.kind, one.case, one.verdict] for one in found],
            right=(),
        )
    for skipped in result["skipped"]:
        out.text(f"skipped: {skipped['backend']}: {skipped['reason']}")
    out.text()
    show_repeats(commands, out)


def _line(case: str, rows: list[dict[str, Any]], densities: list[float]) -> list[str]:
    """One shape of one backend: its ratios by density, their spread, and its worst match."""
    ratios = {row["density_asked"]: row["speedup"] for row in rows}
    known = [ratio for ratio in ratios.values() if ratio]
    texts = {d: f"{ratio['median']:.2f}" if ratio else INEXACT for d, ratio in ratios.items()}
    spread = max(((r["q3"] - r["q1"]) / 2 / r["median"] for r in known), default=None)
    worst = max((row["match"] for row in rows), key=lambda m: (not m["equal"], m["error"]))
    return [
        case,
        f"{rows[0]['dense_ms']:.3f}",
        *(texts.get(d, "") for d in densities),
        "" if spread is None else f"{spread:.1%}",
        str(match_cell(worst)),
    ]


def _asked(rows: list[dict[str, Any]]) -> list[float]:
    return sorted({row["density_asked"] for row in rows})


def _records() -> list[dict[str, str]]:
    from opentrans_kernels import dispatch

    return dispatch.backends()


def _names(text: str | None, known: list[str], what: str) -> list[str]:
    from opentrans_kernels.errors import OpenTransError

    found = [part.strip() for part in text.split(",")] if text else []
    wrong = [name for name in found if name not in known]
    if wrong:
        choices = ", ".join(dict.fromkeys(known))
        raise OpenTransError(f"{what} {wrong[0]!r} is not known. Choose among: {choices}.")
    return found


def _densities(text: str | None) -> list[float]:
    return numbers(text, float, "--densities", lambda d: 0 < d <= 1, "0.05,0.1,0.5")


def numbers(
    text: str | None, kind: Any, option: str, fits: Callable[[Any], bool], example: str
) -> list[Any]:
    """Numbers of a comma-separated option; empty for None.

    Raises:
        OpenTransError: not such a list.
    """
    from opentrans_kernels.errors import OpenTransError

    if text is None:
        return []
    try:
        found = [kind(part) for part in text.split(",")]
        if all(fits(one) for one in found):
            return found
    except ValueError:
        pass
    raise OpenTransError(f"{option} {text!r} holds something else. Write for example {example}.")
