"""``opentrans bench compare``: has anything become slower between two results of one machine?"""

from __future__ import annotations

import argparse
from typing import Any

from .bench_rows import match_cell, ratio_cell, show_repeats
from .options import add_json
from .render import Output

SUMMARY = "compare two results of one machine, case by case"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans bench compare``."""
    parser.add_argument("base", metavar="BASE", help="result file, or a directory of them")
    parser.add_argument("new", metavar="NEW", help="result file, or a directory of them")
    parser.add_argument(
        "--fail-if-slower",
        metavar="LIMIT",
        help="exit with 1 if a single case is slower by more than LIMIT (5%% or 0.05), or is "
        "missing in NEW",
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="cases missing in NEW are no failure"
    )
    parser.add_argument(
        "--all", action="store_true", help="show every case, not only the 20 that changed most"
    )
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Show the comparison; 1 if the gate is closed."""
    from opentrans_kernels.bench.compare import compare, load_results, parse_limit

    limit = parse_limit(options.fail_if_slower) if options.fail_if_slower else None
    found = compare(load_results([options.base]), load_results([options.new]))
    slower = found.regressions(limit) if limit is not None else []
    out.heading(f"{len(found.changes)} cases on {found.machine}, NEW against BASE")
    out.text("ratio: time of the dense side / our time within one run; higher is better")
    shown = found.changes
    if not options.all and len(shown) > 20:
        keep = {c.name for c in sorted(shown, key=lambda c: -abs(c.slower))[:20]}
        shown = tuple(c for c in shown if c.name in keep)
    rows = [change_row(change, limit) for change in shown]
    columns = ("case", "ratio before", "ratio now", "our time", "match", "")
    out.table(None, columns, rows, right=(1, 2, 3))
    out.text()
    show_repeats([(c.name, c.new.command) for c in shown if c.new.command], out)
    if len(shown) < len(found.changes):
        out.text(f"{len(found.changes) - len(shown)} cases that changed less: --all shows them")
    for name in found.missing:
        out.warn(f"{name} is in BASE only")
    if found.added:
        out.text(f"{len(found.added)} cases are in NEW only")
    for note in found.notes:
        out.warn(note)
    failed = [
        f"{change.name} is {change.slower:.1%} slower: {change.base.ratio:.3f}x before, "
        f"{change.new.ratio:.3f}x now"
        for change in slower
    ]
    if limit is not None and found.missing and not options.allow_missing:
        failed.append(
            f"{len(found.missing)} cases of BASE were not measured in NEW, for instance "
            f"{found.missing[0]!r}; --allow-missing accepts that"
        )
    payload: dict[str, Any] = {
        "machine": found.machine,
        "limit": limit,
        "changes": [change.to_dict() for change in found.changes],
        "missing": list(found.missing),
        "added": list(found.added),
        "notes": list(found.notes),
        "failed_checks": failed,
    }
    out.finish(payload)
    for line in failed:
        out.warn(line)
    if limit is not None and not failed:
        out.text(f"no case is slower by more than {limit:.1%}")
    return 1 if failed else 0


def change_row(change: Any, limit: float | None) -> list[Any]:
    """One line of the table."""
    words = f"{abs(change.slower):.1%} {'slower' if change.slower > 0 else 'faster'}"
    note = "quartiles overlap" if change.overlap else ""
    if limit is not None and change.slower > limit:
        note = f"REGRESSION{', ' * bool(note)}{note}"
    return [
        change.name,
        _ratio(change.base),
        _ratio(change.new),
        words,
        match_cell(change.new.match),
        note,
    ]


def _ratio(case: Any) -> str:
    return ratio_cell({"median": case.ratio, "q1": case.q1, "q3": case.q3}, 3)
