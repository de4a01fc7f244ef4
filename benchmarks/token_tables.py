"""The generated table of docs/vision-transformers.md: segmenters with fewer tokens, and with sparse
linear layers, beside what the same work buys otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_tables import EMPTY, by_machine, origin

from opentrans_kernels.bench.machines import machine_slug

Result = Mapping[str, Any]
TOKENS = "network, input|side|CPU ms|over the fastest dense (quartiles)|GMAC|less work|peak MB"


def tokens_table(results: Sequence[Result]) -> str:
    """Every side of every run, losing ones marked; what could not be timed, and the share of
    reducing, below."""
    order = ("system", "height", "width")
    results = sorted(results, key=lambda r: (*(r[key] for key in order), r["plan"]["method"]))
    rows = [
        (result, (_network(result), *_cells(result, row)))
        for result in results
        for row in result["rows"]
    ]
    if not rows:
        return EMPTY
    several = len({machine_slug(result["machine"]) for result in results}) > 1
    below = " ".join(_below(result, several) for result in results)
    return f"{by_machine(TOKENS.split('|'), rows)}\n\n{below} {_origin(results)}"


def _origin(results: Sequence[Result]) -> str:
    # A run without a mask has none that could come from anywhere.
    unmasked = {"synthetic": True}
    return origin([{**result, "mask": result.get("mask") or unmasked} for result in results])


def _network(result: Result) -> str:
    name = f"{result['system']}, {result['height']}x{result['width']}"
    if not (mask := result.get("mask")):
        return name
    # Files from before describe the masks, the recipe at the end.
    recipe = re.search(r"spec: ([^;]+)", mask["label"])
    return f"{name}, {recipe[1] if recipe else mask['label'].split(' (')[0]}"


def _cells(result: Result, row: Mapping[str, Any]) -> tuple[str, ...]:
    plan, name = result["plan"], row["name"]
    if row["kind"] == "reduced":
        values = ((key, plan.get(key)) for key in ("alpha", "r", "keep"))
        told = [f"{key} {value}" for key, value in values if value is not None]
        told += ["{}x{}".format(*plan["grid"])] if plan.get("grid") else []
        name = ", ".join([name, *told])
    elif name.startswith("smaller") and result.get("smaller"):
        name += ", {}x{}".format(*result["smaller"])
    elif name.startswith("fewer") and result.get("fewer"):
        name += f", {result['fewer']}"
    macs, work, peak = (row.get(key) for key in ("macs", "work", "peak_bytes"))
    spread, fastest = row["speedup"], row["name"] == result["baseline"]
    loses = " loses" * (spread["median"] < 1 and not fastest)
    # Of two rounds the quartiles of files from before lay above the median.
    low, high = min(spread["q1"], spread["median"]), max(spread["q3"], spread["median"])
    ratio = f"**{spread['median']:.2f}x{loses}** ({low:.2f}-{high:.2f})"
    return (
        name,
        f"{row['cpu_ms']:.0f}",
        "the fastest dense" if fastest else ratio,
        "" if macs is None else f"{macs / 1e9:.1f}",
        "" if work is None else f"{1 / work:.2f}x",
        "" if peak is None else f"{peak / 1e6:.0f}",
    )


def _below(result: Result, several: bool) -> str:
    said = [f"{part['part']} takes {part['share']:.1%}" for part in result["parts"]]
    said += [f"{name} was not timed: {why}" for name, why in result["unavailable"].items()]
    said += ["a disturbed machine"] if result["canary"]["disturbed"] else []
    threads = result["threads"]
    told = f"{threads} thread{'s' * (threads != 1)}, {result['rounds']} rounds"
    where = _network(result) + f" on {machine_slug(result['machine'])}" * several
    return f"{where}: {'; '.join([told, *said])}."
