"""The generated tables of docs/training.md, docs/finetuning.md and docs/pruning.md, made from
``benchmarks/results/training/*.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_tables import EMPTY, table

from opentrans_kernels.bench.schema import read_json
from opentrans_kernels.errors import OpenTransError

Result = Mapping[str, Any]
FOLDER = "training"
PAGES = {
    "memory": "training.md",
    "step": "training.md",
    "optimizer": "finetuning.md",
    "allocation": "pruning.md",
}
MEMORY = "frozen convolutions|baseline|`skip_frozen`|of baseline|affine: baseline|`skip_frozen`"
STEP = "frozen|variant|CPU ms|of its baseline (quartiles)|of frozen norms|speed-up"
OPTIMIZER = "optimizer|frozen|state MB|index MB|cpu ms|against the fastest dense"
ALLOCATION = (
    "rule|MACs left|over `global` (quartiles)|sum of magnitudes left|sum of squares left|"
    "emptiest layer"
)
SETS = {
    "none": "none",
    "published": 'the 27 of the released code ("published")',
    "odd": 'every second, from the second ("odd", 27)',
    "even": 'every second, from the first ("even", 28)',
    "3x3": 'all nineteen 3x3 ("3x3")',
    "first27": 'the first 27 ("first27")',
    "stem-layer2": 'stem, layer1, layer2 ("stem-layer2", 26)',
    "last28": 'the last 28 ("last28")',
}


def load(folder: Path) -> dict[str, list[Result]]:
    """Kind -> results of it, in the order of their file names.

    Raises OpenTransError for a file of another form, one that was interrupted, or one whose
    exactness checks failed.
    """
    found: dict[str, list[Result]] = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        result = read_json(path)
        kind = result.get("schema", {}).get("kind") if isinstance(result, Mapping) else None
        if kind not in ("training", "masked optimizer", "allocation"):
            raise OpenTransError(
                f"{path.name} is not a result of the training benchmarks. Move it elsewhere."
            )
        # The checks of a training step are of time and memory: rows that lose are shown.
        failed = kind != "training" and result.get("failed_checks")
        if not result.get("complete") or failed:
            why = "failed its checks" if result.get("complete") else "was interrupted"
            raise OpenTransError(f"{path.name} {why}. Measure it again, or move it elsewhere.")
        found.setdefault(kind, []).append(result)
    return found


def tables(folder: Path) -> dict[str, dict[str, str]]:
    """Page name -> table name -> Markdown."""
    results = load(folder)
    made = {
        "memory": memory_table(results.get("training", ())),
        "step": step_table(results.get("training", ())),
        "optimizer": optimizer_table(results.get("masked optimizer", ())),
        "allocation": allocation_table(results.get("allocation", ())),
    }
    pages: dict[str, dict[str, str]] = {}
    for name, content in made.items():
        pages.setdefault(PAGES[name], {})[name] = content
    return pages


def memory_table(results: Sequence[Result]) -> str:
    """MiB kept for backward per freeze set; deterministic."""
    rows = {}
    for one in _sets(results):
        kept = {row["variant"]: row["kept_mib"] for row in one["rows"]}
        base, ours = kept["baseline"], kept["skip"]
        cells = SETS[one["set"]], f"{base:.1f}", f"**{ours:.1f}**", f"{ours / base:.2f}"
        affine = (kept["baseline, affine trains"], kept["skip, affine trains"])
        rows[one["set"]] = (*cells, *(f"{value:.1f}" for value in affine))
    return table(MEMORY.split("|"), [rows[name] for name in SETS if name in rows]) or EMPTY


def step_table(results: Sequence[Result]) -> str:
    """Time of a step of every variant, losing ones included, and where the numbers come from."""
    if not results:
        return EMPTY
    rows = []
    for one in _sets(results):
        for row in one["rows"]:
            ratio = row["time_vs_baseline"]
            loses = ratio["median"] > 1 and not row["variant"].startswith("baseline")
            rows.append(
                (
                    one["set"],
                    row["variant"],
                    f"{row['cpu_ms']['median']:.0f}",
                    f"{ratio['median']:.3f} ({ratio['q1']:.3f}-{ratio['q3']:.3f})"
                    + ", **loses**" * loses,
                    f"{row['time_vs_frozen_norms']['median']:.3f}",
                    f"{1 / ratio['median']:.2f}x",
                )
            )
    return f"{table(STEP.split('|'), rows)}\n\n{origin(results)}"


def optimizer_table(results: Sequence[Result]) -> str:
    """State and time of the optimizers."""
    if not results:
        return EMPTY
    rows = []
    for result in results:
        for name, row in result["rows"].items():
            ratio = row["speedup_cpu"]
            rows.append(
                (
                    name,
                    result["freeze"],
                    f"{row['state_bytes'] / 1e6:.1f}",
                    f"{row['index_bytes'] / 1e6:.1f}",
                    f"{row['cpu_ms']:.1f}",
                    f"{ratio['median']:.2f}x ({ratio['q1']:.2f}-{ratio['q3']:.2f})"
                    + ", **loses**" * (ratio["median"] < 1 and not name.startswith("dense")),
                )
            )
    return f"{table(OPTIMIZER.split('|'), rows)}\n\n{origin(results)}"


def allocation_table(results: Sequence[Result]) -> str:
    """The same number of zeros in other places."""
    if not results:
        return EMPTY
    rows = []
    for row in (row for result in results for row in result["rows"]):
        gain = row["speedup"]
        rows.append(
            (
                row["rule"],
                f"{row['macs_kept']:.3f}",
                f"{gain['median']:.2f}x ({gain['q1']:.2f}-{gain['q3']:.2f})",
                f"{row['magnitude_kept']:.3f}",
                f"{row['squares_kept']:.3f}",
                f"{row['least_density']:.4f}",
            )
        )
    return f"{table(ALLOCATION.split('|'), rows)}\n\n{origin(results)}"


def origin(results: Sequence[Result]) -> str:
    """Machine, versions, commit and whether somebody else used the machine, in a sentence."""
    parts = {
        "CPU": {r["machine"]["cpu"] for r in results},
        "threads": {str(r["threads"]) for r in results},
        "torch": {r["versions"]["torch"] for r in results},
        "commit": {str((r["source"] or {}).get("commit"))[:12] for r in results},
        "uncommitted changes": {str((r["source"] or {}).get("dirty")) for r in results},
        "disturbed machine": {str(r["canary"]["disturbed"]) for r in results},
    }
    return "; ".join(f"{name}: {', '.join(sorted(found))}" for name, found in parts.items()) + "."


def _sets(results: Sequence[Result]) -> list[Mapping[str, Any]]:
    """Freeze sets of all runs; of one that was measured twice the last file counts."""
    found = {one["set"]: one for result in results for one in result["results"]}
    return [found[name] for name in SETS if name in found]
