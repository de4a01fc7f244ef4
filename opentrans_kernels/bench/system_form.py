"""The form of what ``opentrans bench model --system`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import OpenTransError
from .schema import (
    COUNT,
    ENVELOPE,
    FLAG,
    NUMBER,
    POSITIVE,
    SHARE,
    SPREAD,
    TEXT,
    VERSION,
    Each,
    Leaf,
    Maybe,
    kind_of,
    problems,
)

__all__ = ["KIND", "check_sides", "check_system"]

KIND = "system"
CLOCK = Leaf("cpu or wall", lambda v: v in ("cpu", "wall"))
SYSTEM_ROW = {
    "name": TEXT,
    "ours": FLAG,
    "ms": POSITIVE,
    "cpu_ms": POSITIVE,
    "wall": SPREAD,
    "speedup": Maybe(SPREAD),
    "baseline_cpu_ms": Maybe(POSITIVE),  # of files from before, beside cpu_ms of the same round
    "median_round": Maybe({"baseline_ms": POSITIVE, "ms": POSITIVE}),
    "match": {"equal": FLAG, "error": Maybe(NUMBER), "bound": NUMBER},
    "argmax": SHARE,
    "peak_bytes": Maybe(COUNT),
}
FORM = {
    **ENVELOPE,
    "command": [TEXT],
    "failed_checks": [TEXT],
    "mask": {"label": TEXT, "synthetic": FLAG},
    "system": TEXT,
    "queries": Maybe(COUNT),
    "classes": COUNT,
    "height": COUNT,
    "width": COUNT,
    "rounds": COUNT,
    "reference": TEXT,
    "dense_error": NUMBER,
    "baseline": TEXT,
    "clock": Maybe(CLOCK),  # files from before: cpu
    "scaling": Maybe({"name": TEXT, "one_thread_ms": POSITIVE, "ms": POSITIVE, "ratio": SPREAD}),
    "unavailable": Each(TEXT),
    "accelerated_layers": COUNT,
    "head": {"replaced": COUNT, "left": [TEXT], "done": Maybe([TEXT])},
    "rows": [SYSTEM_ROW],
    "parts": [{"part": TEXT, "dense_ms": NUMBER, "ms": NUMBER, "what": TEXT}],
}


def check_system(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The result, if it has the form. Raises OpenTransError with the first three faults.

    name: of its file, for messages.
    """
    return check_sides(result, name, FORM, KIND, "opentrans bench model --system")


def check_sides(
    result: Mapping[str, Any], name: str, form: Any, kind: str, command: str
) -> Mapping[str, Any]:
    """A result of sides of which one is the baseline, if it has the form and is of the kind.

    Raises OpenTransError with the first three faults; ``command`` measures it.
    """
    found = list(problems(result, form))
    if (own := kind_of(result)) != (kind, VERSION):
        found.insert(0, f"kind and version are {own}, expected {(kind, VERSION)}")
    if not found and not any(row["name"] == result["baseline"] for row in result["rows"]):
        found.append(f"baseline is {result['baseline']!r}, which is no row")
    if found:
        raise OpenTransError(
            f"{name} is no valid result of '{command}': {'; '.join(found[:3])}. Measure it again "
            f"with --json {name}."
        )
    return result
