"""Rewrite the generated tables of README.md: "trunk" and "layers" from the JSON files that
``opentrans bench trunk`` wrote to ``benchmarks/results``, "settings" from the package.

A table is what stands between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``. A result that
failed its checks is refused. Exit code 1 with ``--check`` if a table is old, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentrans_kernels import settings
from opentrans_kernels.errors import OpenTransError

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
EMPTY = "No results are stored yet."
NEEDED = ("baseline", "variants", "accelerated", "speedup", "exact", "layers", "mask", "source")
TRUNK = "mask|input|threads|ISA|baseline|dense ms|ours ms|speed-up (quartiles)|error, dense's own"
LAYERS = "run|convolution|output|n|density|dense ms|sparse ms|speed-up"
ORIGIN = "CPU|torch|commit|uncommitted changes|weights|masks"
SETTINGS = "variable|when|default|values|meaning"
SHAPE = ("cin", "cout", "kernel", "stride", "h_out", "w_out", "loses")
OTHERS = 4  # losing rows shown of the other runs, so that the README stays readable


def load_results(folder: Path) -> list[Result]:
    """Every trunk benchmark in ``folder``, ordered. Raises OpenTransError for anything else."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OpenTransError(f"{path.name} is not JSON ({error}). Measure it again.") from error
        missing = [k for k in NEEDED if k not in result] if isinstance(result, dict) else NEEDED
        if missing or not result["exact"] or result.get("failed_checks"):
            why = f"lacks {', '.join(missing)}" if missing else "failed its checks"
            fix = "Measure it again with 'opentrans bench trunk', or move it elsewhere"
            raise OpenTransError(f"{path.name} {why}. {fix}.")
        found.append(result)
    return sorted(found, key=lambda r: (r["threads"], r["input"], _run(r)))


def _run(result: Result) -> tuple[str, str, int, str]:
    """Mask, size, threads, instruction set."""
    mask = result["mask"]["label"].removesuffix(" (synthetic mask)")
    batch, _, height, width = result["input"]
    size = f"{height}" if height == width else f"{height}x{width}"
    size += f", batch {batch}" * (batch > 1)
    return mask, size, result["threads"], result["opentrans_cpu_capability"] or result["isa"]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; cells may not break it."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def trunk_table(results: Sequence[Result]) -> str:
    """One row per result, and below them where the numbers come from."""
    rows, facts = [], []
    for r in results:
        q1, q3 = r["speedup_spread"]["q1"], r["speedup_spread"]["q3"]
        ran = sum("ms" in variant for variant in r["variants"].values())
        name = f"{r['baseline']['name']} (of {ran})"
        times = name, f"{r['baseline']['ms']:.1f}", f"{r['accelerated']['ms']:.1f}"
        ratio = f"**{r['speedup']:.2f}x** ({q1:.2f}-{q3:.2f})"
        errors = f"{r['max_rel_err']:.1e}, {r['dense_own_rel_err']:.1e}"
        rows.append((*_run(r), *times, ratio, errors))
        source = r["source"] or {}
        commit = str(source.get("commit"))[:12], str(source.get("dirty"))
        kind = "synthetic" if r["mask"]["synthetic"] else "from files"
        weights = r["subject"]["weights"]
        facts.append((r["machine"]["cpu"], r["versions"]["torch"], *commit, weights, kind))
    parts = zip(ORIGIN.split("|"), zip(*facts, strict=True), strict=False)
    origin = "; ".join(f"{name}: {', '.join(sorted(set(values)))}" for name, values in parts)
    return f"{table(TRUNK.split('|'), rows)}\n\n{origin}." if rows else EMPTY


def layer_rows(result: Result) -> list[tuple[bool, float, tuple[object, ...]]]:
    """(loses, gain in ms, cells); layers of equal shape are summed, losers apart from winners."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result["layers"]:
        groups.setdefault(tuple(row[key] for key in SHAPE), []).append(row)
    mask, size, threads, isa = _run(result)
    found = []
    for (cin, cout, kernel, stride, height, width, loses), rows in groups.items():
        dense, sparse = (sum(row[key] for row in rows) for key in ("dense_ms", "sparse_ms"))
        density = sum(row["nnz"] for row in rows) / (len(rows) * cin * cout * kernel**2)
        loses = loses or dense < sparse
        ratio = f"**{dense / sparse:.2f}x loses**" if loses else f"{dense / sparse:.2f}x"
        shape = f"{cin}->{cout} k{kernel}" + f" s{stride}" * (stride > 1)
        times = f"{density:.3f}", f"{dense:.2f}", f"{sparse:.2f}", ratio
        cells = (
            f"{mask}, {size}, {threads} t, {isa}",
            shape,
            f"{height}x{width}",
            len(rows),
            *times,
        )
        found.append((loses, dense - sparse, cells))
    return found


def layers_table(results: Sequence[Result]) -> str:
    """All layers of one result (global:0.90 if there), then the losing layers of the others."""
    measured = sorted(
        (r for r in results if r["layers"]), key=lambda r: _run(r)[0] != "global:0.90"
    )
    if not measured:
        return EMPTY
    others = [row for r in measured[1:] for row in layer_rows(r) if row[0]]
    others.sort(key=lambda row: row[1])
    rows = [cells for _, _, cells in [*layer_rows(measured[0]), *others[:OTHERS]]]
    hidden = len(others) - OTHERS
    more = f"\n\n{hidden} losing rows of further runs are in the JSON files." if hidden > 0 else ""
    return table(LAYERS.split("|"), rows) + more


def rewrite(text: str, tables: dict[str, str]) -> str:
    """``text`` with every table replaced. Raises OpenTransError if a marker is not there once."""
    for name, content in tables.items():
        start, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise OpenTransError(f"the README must hold {start} and {end} once each. Add them.")
        block, pattern = f"{start}\n{content}\n{end}", f"{re.escape(start)}.*?{re.escape(end)}"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rewrite the generated tables of README.md.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    options = parser.parse_args(argv)
    try:
        results = load_results(options.results)
        rows = [(f"`{r.name}`", r.when, r.default, r.choices, r.doc) for r in settings.table({})]
        tables = {"trunk": trunk_table(results), "layers": layers_table(results)}
        tables["settings"] = table(SETTINGS.split("|"), rows)
        before = options.readme.read_text(encoding="utf-8")
        after = rewrite(before, tables)
        if after != before and not options.check:
            options.readme.write_text(after, encoding="utf-8")
    except (OpenTransError, OSError) as error:
        sys.stderr.write(f"report_tables: {error}\n")
        return 2
    state = "up to date" if after == before else "out of date" if options.check else "rewritten"
    sys.stdout.write(f"{options.readme.name}: {state}, {len(results)} results\n")
    return int(options.check and after != before)


if __name__ == "__main__":
    sys.exit(main())
