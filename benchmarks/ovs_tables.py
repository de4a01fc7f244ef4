"""Rewrite the tables of docs/tiny-run.md, docs/fc-clip.md and docs/heads.md from the files that
``bench_ovs.py`` and ``opentrans bench model --system`` wrote to ``benchmarks/results/MACHINE/ovs``,
and those of ``bench_deform.py`` in ``benchmarks/results/attention``.

A part without a stored result keeps the table it has. Exit code 1 with ``--check`` if a table is
old, 2 for bad input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from markdown_tables import rewrite, table  # noqa: E402
from ovs_result import OURS, check_form  # noqa: E402

from opentrans_kernels.bench.derive import Beside, agreeing, median_round  # noqa: E402
from opentrans_kernels.bench.machines import machine_slug  # noqa: E402
from opentrans_kernels.bench.schema import Result, kind_of, read_json  # noqa: E402
from opentrans_kernels.bench.system_form import KIND as SYSTEM  # noqa: E402
from opentrans_kernels.bench.system_form import check_system  # noqa: E402
from opentrans_kernels.errors import OpenTransError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("whole", "backbone", "head")
PAGES = {"inference": "tiny-run.md", "text": "tiny-run.md", "fc-clip": "fc-clip.md"}
SYSTEMS_PAGE = "fc-clip.md"
ATTENTION, ATTENTION_PAGE = "attention", "heads.md"  # deformable, of bench_deform.py


def load(folder: Path) -> list[Result]:
    """Every result of ``bench_ovs.py`` below ``folder``/MACHINE/ovs, checked.

    Raises OpenTransError for one that has not the form, failed, was interrupted, or lies in the
    folder of another machine.
    """
    return [result for result in _stored(folder) if kind_of(result)[0] != SYSTEM]


def load_systems(folder: Path) -> list[Result]:
    """The same for results of ``opentrans bench model --system``."""
    return [result for result in _stored(folder) if kind_of(result)[0] == SYSTEM]


def _stored(folder: Path) -> list[Result]:
    found = []
    for path in sorted(folder.glob("*/ovs/*.json")):
        result = read_json(path)
        try:
            if kind_of(result)[0] == SYSTEM:
                check_system(result, path.name)
            else:
                check_form(result)
        except OpenTransError as error:
            raise OpenTransError(f"{path.name}: {error}") from error
        why = "was interrupted" if not result["complete"] else ""
        if result["failed_checks"]:
            why = f"failed: {result['failed_checks'][0]}"
        if (slug := machine_slug(result["machine"])) != path.parents[1].name:
            why = f"was measured on {slug} but lies in {path.parents[1].name}"
        if why:
            raise OpenTransError(f"{path.name} {why}. Measure it again, or move it elsewhere.")
        found.append(dict(result))
    return found


def system_table(result: Result) -> str:
    """Every side of one system, then its time by part."""
    size = f"{result['height']} x {result['width']}"
    rows = []
    dense = next(row for row in result["rows"] if row["name"] == result["baseline"])
    for row in result["rows"]:
        name = row["name"] + " (fastest dense)" * (row["name"] == result["baseline"])
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        ratio = "inexact"
        its, own = median_round(row, dense)
        if row["speedup"] is not None:
            ratio = _against(agreeing(its, own, row["speedup"]))
        error = f"{row['match']['error']:.1e}"
        rows.append((name, f"{own:.0f}", ratio, error, f"{row['argmax']:.2%}", peak))
    clock = "CPU" if result.get("clock", "cpu") == "cpu" else "wall"
    columns = (f"{clock} ms", "against the fastest dense, its ms", "error", "same class", "peak MB")
    parts = [
        (p["part"], f"{p['dense_ms']:.0f}", f"{p['ms']:.0f}", p["what"]) for p in result["parts"]
    ]
    words = [
        f"Errors against {result['reference']}, dense float32's own {result['dense_error']:.1e}."
    ]
    if (scaling := result.get("scaling")) is not None:
        ratio = scaling["ratio"]
        words.append(
            f"{scaling['name'].capitalize()}, {result['threads']} threads over one: "
            f"**{ratio['median']:.2f}x** ({ratio['q1']:.2f}-{ratio['q3']:.2f}), wall time."
        )
    words += [f"Not timed: {name}, {why}." for name, why in result["unavailable"].items()]
    return "\n\n".join(
        (
            table((f"{result['system']}, {size}", *columns), rows),
            table(("part of it", "eager ms", "our ms", "what was done"), parts),
            " ".join(words),
            f"`{shlex.join(result['command'])}`",
            _origin(result),
        )
    )


def attention_table(result: Result) -> str:
    """Deformable attention against ``grid_sample`` and against the peer, every case."""
    if result["failed_checks"]:
        raise OpenTransError(f"attention: {result['failed_checks'][0]}. Measure it again.")
    rows = []
    for row in result["rows"]:
        times = {name: f"{timing['cpu_ms']:.1f}" for name, timing in row["timings"].items()}
        cells = [f"{row['queries']:,}", str(row["d"]), row["pass"]]
        cells += [times.get(name, "-") for name in ("eager", "compiled", "peer", "ours")]
        cells += [_times(row[key]) if row[key] else "-" for key in ("speedup", "speedup_of_peer")]
        rows.append((*cells, f"{row['errors']['ours']:.1e}", f"{row['errors']['eager']:.1e}"))
    head = (
        "queries", "D", "pass", "`grid_sample` ms", "compiled ms", "package ms", "our ms",
        "over `grid_sample`", "over the package", "our error", "its error",
    )  # fmt: skip
    words = [
        result["machine"]["cpu"], f"{result['threads']} pinned thread, CPU time",
        f"torch {result['versions']['torch']}",
        f"median of {result['rows'][-1]['speedup']['n']} rounds",
        f"commit {str(result['source'].get('commit'))[:12]}",
    ]  # fmt: skip
    words += [] if result["complete"] else [f"stopped after {len(rows)} cases"]
    words += ["disturbed machine"] * result["canary"]["disturbed"]
    return f"{table(head, rows)}\n\n`{shlex.join(result['command'])}`\n\n{'; '.join(words)}."


def text_table(result: Result, part: dict[str, Any]) -> str:
    """Milliseconds of a training step, and how many times less with the cache."""
    fast, slow = (part["timings"][name]["cpu"] for name in ("cached", "encoder in every step"))
    title = (
        f"training step, {part['size']} pixels, batch {part['images_per_step']}, "
        f"{part['prompts']} prompts"
    )
    shown = agreeing(slow["median"], fast["median"], part["speedup"])
    rows = [
        ("text encoder in every step, as published", shown.slow(0)),
        ("cached", f"{shown.fast_ms:.0f} ({_times(shown.ratio)})"),
    ]
    return f"{table((title, 'CPU ms'), rows)}\n\n{_origin(result)}"


def model_table(result: Result, part: dict[str, Any]) -> str:
    """Milliseconds of every variant, whole and in parts, and Amdahl's law in words."""
    cells: dict[str, dict[str, str]] = {}
    for name, timing in part["timings"].items():
        column, _, variant = name.partition(": ")
        cells.setdefault(variant, {})[column] = f"{timing['cpu']['median']:.0f}"
    columns = [c for c in COLUMNS if any(c in row for row in cells.values())]
    best = {part["baseline"][c].partition(": ")[2] for c in columns if c in part["baseline"]}
    rows = []
    for variant in sorted(cells, key=lambda name: name.startswith(OURS)):
        label = f"{variant} (fastest dense)" if {variant} == best else variant
        rows.append((label, *(cells[variant].get(column, "") for column in columns)))
    medians = {name: timing["cpu"]["median"] for name, timing in part["timings"].items()}
    sides = {
        "whole": (part["baseline"]["whole"], part["accelerated"], part["speedup"]),
        "backbone": (part["baseline"]["backbone"], f"backbone: {OURS}", part["backbone_speedup"]),
    }
    ratios = {
        column: _against(agreeing(medians[dense], medians[ours], spread))
        for column, (dense, ours, spread) in sides.items()
    }
    label = "against the fastest dense, its ms"
    rows.append((label, *(ratios.get(column, "") for column in columns)))
    error = max(part["errors"].values(), key=lambda row: row["ours"] / row["limit"])
    words = [
        f"The backbone is {part['backbone_share_dense']:.0%} of the dense time, so by Amdahl's law "
        f"no backbone can make the whole more than {part['amdahl_bound']:.2f} times faster, and "
        f"this one should make it {part['amdahl_predicted']:.2f} times faster. The error nearest "
        f"its limit ({error['limit']:.1e}) is {error['ours']:.1e} of the largest value, dense "
        f"float32's own {error['dense']:.1e}."
    ]
    if part["speedup"]["median"] > part["amdahl_bound"]:
        words.append(
            "The measured ratio is above that bound, so it is noise to that extent: rounds of the "
            "whole model differ by more than the gain. Rely on the prediction."
        )
    words += [f"Not timed: {name}, {why}." for name, why in part["unavailable"].items()]
    if "deformable_attention" in part:
        words.append(f"Deformable attention: {part['deformable_attention']}.")
    title = f"{part['size']} x {part['size']}, CPU ms"
    return "\n\n".join((table((title, *columns), rows), " ".join(words), _origin(result)))


TABLES: dict[str, Callable[[Result, dict[str, Any]], str]] = {
    "inference": model_table,
    "text": text_table,
    "fc-clip": model_table,
}


def _against(shown: Beside) -> str:
    return f"{_times(shown.ratio)}, {shown.slow(0)}"


def _times(spread: dict[str, Any]) -> str:
    return f"**{spread['median']:.2f}x**, {spread['q1']:.2f}-{spread['q3']:.2f}"


def _origin(result: Result) -> str:
    source = result["source"] or {}
    threads = f"{result['threads']} pinned thread" + "s" * (result["threads"] > 1)
    words = [
        result["machine"]["cpu"],
        threads,
        f"torch {result['versions']['torch']}",
        f"synthetic mask {result['mask']['label']}"
        + (f", head {result['head_mask']['label']}" if "head_mask" in result else ""),
        f"median of {result['rounds']} rounds",
        f"commit {str(source.get('commit'))[:12]}",
        f"uncommitted changes: {source.get('dirty')}",
    ]
    if result["canary"]["disturbed"]:
        words.append("disturbed machine")
    return f"{'; '.join(words)}."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rewrite the tables of whole models.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    options = parser.parse_args(argv)
    old = 0
    try:
        results = load(options.results)
        systems = load_systems(options.results)
        attention = [
            read_json(path) for path in sorted((options.results / ATTENTION).glob("*.json"))
        ]
        for page in sorted({*PAGES.values(), *([ATTENTION_PAGE] if attention else [])}):
            made = {
                f"ovs-{name}": "\n\n".join(
                    TABLES[name](result, result["parts"][name])
                    for result in results
                    if name in result["parts"]
                )
                for name, home in PAGES.items()
                if home == page
            }
            if page == ATTENTION_PAGE:
                made["attention"] = "\n\n".join(map(attention_table, attention))
            if page == SYSTEMS_PAGE:
                made["systems"] = "\n\n".join(map(system_table, systems))
            file = options.docs / page
            before = file.read_text(encoding="utf-8")
            after = rewrite(before, {name: text for name, text in made.items() if text})
            old += before != after
            if before != after and not options.check:
                file.write_text(after, encoding="utf-8")
            missing = [name for name, text in made.items() if not text]
            state = "up to date" if before == after else "out of date" if options.check else "new"
            note = f"; no stored result for {', '.join(missing)}" if missing else ""
            sys.stdout.write(f"{page}: {state}{note}\n")
    except (OpenTransError, OSError) as error:
        sys.stderr.write(f"ovs_tables: {error}\n")
        return 2
    return int(options.check and old > 0)


if __name__ == "__main__":
    sys.exit(main())
