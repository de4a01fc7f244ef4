"""Rewrite the generated tables of README.md ("networks"), docs/performance.md ("trunk", "layers",
"limits", "crossover", "peers"), docs/sparse-linears.md ("linears") and
docs/vision-transformers.md ("tokens") from the JSON files that ``opentrans bench`` and
``bench_ovs.py`` wrote to ``benchmarks/results/MACHINE``, and docs/install.md ("settings") from the
package.

A table is what stands between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``. A result that
failed its checks, or lies in another machine's folder, is refused. Exit code 1 with ``--check`` if
a table is old, 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentrans_kernels import settings
from opentrans_kernels.bench.compare import OTHER_FOLDERS, load_result
from opentrans_kernels.bench.derive import beside, timed_variants
from opentrans_kernels.bench.machines import machine_slug
from opentrans_kernels.bench.schema import Result, kind_of
from opentrans_kernels.errors import OpenTransError

sys.path.insert(0, str(Path(__file__).resolve().parent))
import network_table  # noqa: E402
import ovs_tables  # noqa: E402
import performance_tables  # noqa: E402
import token_tables  # noqa: E402
import trained_tables  # noqa: E402
import training_tables  # noqa: E402
from markdown_tables import EMPTY, by_machine, origin, rewrite, table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TRUNK = "mask|input|threads|ISA|baseline|dense ms|ours ms|speed-up (quartiles)|error, dense's own"
LAYERS = "run|convolution|output|n|density|dense ms|sparse ms|speed-up"
SETTINGS = "variable|when|default|values|meaning"
SHAPE = ("cin", "cout", "kernel", "stride", "h_out", "w_out", "loses")
OTHERS = 4  # losing rows shown of the other runs, so that the page stays readable


def load_results(folder: Path) -> list[Result]:
    """Every result below ``folder``; trunk results first, in the order of the tables.

    Raises OpenTransError for a file that is no valid result, failed its checks, was interrupted,
    or lies in the folder of another machine.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        if set(path.relative_to(folder).parts[:-1]) & set(OTHER_FOLDERS):
            continue
        result = load_result(path)
        why = ""
        gated = kind_of(result)[0] != "training"  # whose checks are of time: losing rows stay
        if not result["complete"]:
            why = "was interrupted"
        elif result.get("exact") is False or (gated and result.get("failed_checks")):
            checks = "; ".join(result.get("failed_checks", ())) or "it is not exact"
            why = f"failed its checks ({checks})"
        if why:
            again = "Measure it again with 'opentrans bench', or move it elsewhere"
            raise OpenTransError(f"{path.name} {why}. {again}.")
        slug = machine_slug(result["machine"])
        if path.parent.name != slug:
            raise OpenTransError(
                f"{path.name} was measured on {slug} but lies in {path.parent.name}. Move it to "
                f"{folder.name}/{slug}."
            )
        found.append(result)
    trunks = [r for r in found if kind_of(r)[0] == "trunk"]
    trunks.sort(key=lambda r: (r["threads"], r["input"], _run(r)))
    return trunks + [r for r in found if kind_of(r)[0] != "trunk"]


def _run(result: Result) -> tuple[str, str, int, str]:
    """Mask, size, threads, instruction set."""
    mask = result["mask"]["label"].removesuffix(" (synthetic mask)")
    batch, _, height, width = result["input"]
    size = f"{height}" if height == width else f"{height}x{width}"
    size += f", batch {batch}" * (batch > 1)
    return mask, size, result["threads"], result["opentrans_cpu_capability"] or result["isa"]


def trunk_table(results: Sequence[Result]) -> str:
    """One row per result, and below them where the numbers come from."""
    rows = []
    for r in results:
        q1, q3 = r["speedup_spread"]["q1"], r["speedup_spread"]["q3"]
        name = f"{r['baseline']['name']} (of {len(timed_variants(r))})"
        shown = beside(r["baseline"], r["accelerated"], _spread(r))
        times = name, shown.slow(), f"{shown.fast_ms:.1f}"
        ratio = f"**{r['speedup']:.2f}x** ({q1:.2f}-{q3:.2f})"
        if r["canary"]["disturbed"]:
            ratio += ", disturbed machine"
        errors = f"{r['max_rel_err']:.1e}, {r['dense_own_rel_err']:.1e}"
        rows.append((r, (*_run(r), *times, ratio, errors)))
    return f"{by_machine(TRUNK.split('|'), rows)}\n\n{origin(results)}" if rows else EMPTY


def _spread(result: Result) -> dict[str, Any]:
    return {**result["speedup_spread"], "median": result["speedup"]}


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rewrite the generated tables.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--performance", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument(
        "--linears", type=Path, default=ROOT / "docs" / "sparse-linears.md", metavar="PAGE"
    )
    parser.add_argument(
        "--tokens", type=Path, default=ROOT / "docs" / "vision-transformers.md", metavar="PAGE"
    )
    parser.add_argument("--install", type=Path, default=ROOT / "docs" / "install.md")
    parser.add_argument("--training-docs", type=Path, metavar="DIR", help="its training pages too")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    options = parser.parse_args(argv)
    try:
        results = load_results(options.results)
        trunks = [r for r in results if kind_of(r)[0] == "trunk"]
        # Pages that do not name the network are about CLIP's.
        own = [r for r in trunks if ":" not in r["subject"]["arch"]]
        ops = [r for r in results if kind_of(r)[0] == "op"]
        tokens = [r for r in results if kind_of(r)[0] == "tokens"]
        models = [r for r in results if kind_of(r)[0] == "model"]
        rows = [(f"`{r.name}`", r.when, r.default, r.choices, r.doc) for r in settings.table({})]
        systems = ovs_tables.load_systems(options.results)
        pages = {
            options.readme: {"networks": network_table.networks_table(trunks, models, systems)},
            options.performance: {
                "trunk": trunk_table(own),
                "layers": layers_table(own),
                "limits": performance_tables.limits_table(own),
                "crossover": performance_tables.crossover_table(ops),
                "peers": performance_tables.peers_table(trunks),
            },
            options.linears: {"linears": performance_tables.linears_table(ops)},
            options.tokens: {"tokens": token_tables.tokens_table(tokens)},
            options.install: {"settings": table(SETTINGS.split("|"), rows)},
        }
        if options.training_docs or options.results == ROOT / "benchmarks" / "results":
            docs = options.training_docs or ROOT / "docs"
            made = training_tables.tables(options.results) | trained_tables.tables(options.results)
            pages |= {docs / name: content for name, content in made.items()}
        changed = []
        for page, content in pages.items():
            before = page.read_text(encoding="utf-8")
            after = rewrite(before, content)
            if after != before:
                changed.append((page, after))
        for figure, drawn in trained_tables.figures(options.results).items():
            pages[figure] = {}
            if not figure.exists() or figure.read_text(encoding="utf-8") != drawn:
                changed.append((figure, drawn))
        for page, after in () if options.check else changed:
            page.write_text(after, encoding="utf-8")
    except (OpenTransError, OSError) as error:
        sys.stderr.write(f"report_tables: {error}\n")
        return 2
    names = {page for page, _ in changed}
    for page in pages:
        state = "out of date" if options.check else "rewritten"
        state = state if page in names else "up to date"
        sys.stdout.write(f"{page.name}: {state}, {len(results)} results\n")
    return int(options.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
