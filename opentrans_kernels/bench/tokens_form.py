"""The form of what ``opentrans bench tokens`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .schema import (
    COUNT,
    ENVELOPE,
    FLAG,
    NUMBER,
    POSITIVE,
    SHARE,
    SPREAD,
    TEXT,
    Each,
    Leaf,
    Maybe,
)
from .system_form import check_sides

__all__ = ["EXACT", "KIND", "check_tokens", "inexact"]

KIND = "tokens"
#: Difference of a side that computes the dense network, relative to its largest logit.
EXACT = 1e-3
SIZE = Leaf(
    "height and width",
    lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(map(COUNT.test, v)),
)
ROW = {
    "name": TEXT,
    "kind": TEXT,
    "ms": POSITIVE,
    "cpu_ms": POSITIVE,
    "wall": SPREAD,
    "contended_share": SHARE,
    "speedup": SPREAD,
    "over_eager": SPREAD,
    "macs": Maybe(COUNT),
    "work": Maybe(POSITIVE),
    "difference": NUMBER,
    "same_class": SHARE,
    "peak_bytes": Maybe(COUNT),
}
FORM = {
    **ENVELOPE,
    "command": [TEXT],
    "failed_checks": [TEXT],
    "system": TEXT,
    "decoder": TEXT,
    "weights": TEXT,
    "classes": COUNT,
    "height": COUNT,
    "width": COUNT,
    "plan": {
        "method": TEXT,
        "alpha": Maybe(COUNT),
        "r": Maybe(COUNT),
        "keep": Maybe(SHARE),
        "grid": Maybe(SIZE),
    },
    "rounds": COUNT,
    "baseline": TEXT,
    "smaller": Maybe(SIZE),
    "fewer": Maybe(COUNT),
    "kept": Maybe(SHARE),
    "mask": Maybe({"label": TEXT, "synthetic": FLAG}),
    "replaced": Maybe(Each(COUNT)),
    "unavailable": Each(TEXT),
    "rows": [ROW],
    "parts": [{"part": TEXT, "cpu_ms": POSITIVE, "share": SHARE}],
}


def check_tokens(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The result, if it has the form. Raises OpenTransError with the first three faults.

    name: of its file, for messages.
    """
    return check_sides(result, name, FORM, KIND, "opentrans bench tokens")


def inexact(row: Mapping[str, Any]) -> bool:
    """Whether a side that should compute the dense network computes something else."""
    return row["kind"] in ("dense", "exact") and not row["difference"] <= EXACT
