"""Markdown tables of the generated parts of the documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from opentrans_kernels.bench.machines import machine_slug
from opentrans_kernels.errors import OpenTransError

EMPTY = "No results are stored yet."
ORIGIN = ("CPU", "torch", "commit", "uncommitted changes", "weights", "masks")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; cells may not break it."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def by_machine(
    header: Sequence[str], rows: Sequence[tuple[Mapping[str, Any], Sequence[object]]]
) -> str:
    """A table of (result, cells); rows of several machines get a column that names theirs."""
    machines = [machine_slug(result["machine"]) for result, _ in rows]
    if len(set(machines)) < 2:
        return table(header, [cells for _, cells in rows])
    named = [(*cells, at) for (_, cells), at in zip(rows, machines, strict=True)]
    return table([*header, "machine"], named)


def origin(results: Sequence[Mapping[str, Any]]) -> str:
    """Where the numbers of all ``results`` come from, in one line."""
    facts = []
    for result in results:
        source = result.get("source") or {}
        weights = result.get("subject", result).get("weights", "synthetic")
        facts.append(
            (
                result["machine"]["cpu"],
                result["versions"]["torch"],
                str(source.get("commit"))[:12],
                str(source.get("dirty")),
                weights,
                "synthetic" if result["mask"]["synthetic"] else "from files",
            )
        )
    parts = zip(ORIGIN, zip(*facts, strict=True), strict=False)
    return "; ".join(f"{name}: {', '.join(sorted(set(values)))}" for name, values in parts) + "."


def rewrite(text: str, tables: dict[str, str]) -> str:
    """``text`` with every table replaced. Raises OpenTransError if a marker is not there once."""
    for name, content in tables.items():
        start, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise OpenTransError(f"the page must hold {start} and {end} once each. Add them.")
        block, pattern = f"{start}\n{content}\n{end}", f"{re.escape(start)}.*?{re.escape(end)}"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text
