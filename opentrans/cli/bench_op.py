"""``opentrans bench op``: every kernel that runs here, on the shapes of CLIP's RN50 and at several
densities, the fastest dense operator beside it. Shows the density where sparse starts to win."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

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
    parser.add_argument("--densities", metavar="D,...", help="shares of weights kept")
    parser.add_argument("--rounds", type=positive, metavar="N", help="default 7, quick 5")
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Measure and show; 1 if a row is inexact."""
    asked = _densities(options.densities)
    started = limit(options, out)
    if isinstance(started, int):
        return started
    from opentrans_kernels.bench import canary, ops
    from opentrans_kernels.bench.cases import DENSITIES, QUICK_DENSITIES

    names = _names(options.ops, list(ops.BUILDERS), "op")
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
            ):
                step(f"{case.op} {case.name}, density {case.asked:g}")
                result["rows"] += ops.measure_case(
                    case,
                    rounds=options.rounds or (5 if options.quick else 7),
                    backends=backends or (["cpu"] if options.quick else []),
                )
                session.save()
    except KeyboardInterrupt:
        complete = False
    show(result, out)
    failed = [
        f"{row['op']} {row['backend']} {row['case']} at density {row['density_asked']:g} is "
        f"inexact: {row['error']:.1e} of its largest output, dense {row['dense_error']:.1e}"
        for row in result["rows"]
        if not row["exact"]
    ]
    return session.finish(complete=complete, failed=failed)


def show(result: dict[str, Any], out: Output) -> None:
    """Speed-ups by density, one line per shape; then the crossovers."""
    from opentrans_kernels.bench.derive import crossovers

    rows = result["rows"]
    densities = sorted({row["density_asked"] for row in rows})
    out.heading(
        f"speed-up over the fastest dense operator by density, {result['threads']} thread(s), isa "
        f"{result['isa']}; below 1.00 dense wins"
    )
    lines: dict[tuple[str, ...], dict[float, str]] = {}
    dense: dict[tuple[str, ...], float] = {}
    for row in rows:
        key = row["op"], row["backend"], row["case"]
        ratio = row["speedup"]
        text = f"{ratio['median']:.2f}" if ratio else "inexact"
        lines.setdefault(key, {})[row["density_asked"]] = text
        dense.setdefault(key, row["dense_ms"])
    table = [
        [*key, f"{dense[key]:.3f}", *(found.get(d, "") for d in densities)]
        for key, found in lines.items()
    ]
    heads = ("op", "backend", "shape", "dense ms", *(f"{d:g}" for d in densities))
    out.table(None, heads, table, right=range(3, len(heads)))
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
