"""A plan record from a file: every field has its type and range, and the parts fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from ..errors import PlanError
from ..masks.limits import brief

KINDS = ("dense", "compact", "winograd", "sparse")
PLANAR = ("winograd", "sparse")  # kinds whose outputs are in the layout of the kernels
ROLES = ("stem", "block", "loose", "linear", "mlp", "attention")
LARGEST = 2**53  # a whole number that JSON of any program keeps exactly


def text(value: Any) -> bool:
    return isinstance(value, str)


def whole(least: int, most: int = LARGEST) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def number(most: float) -> Callable[[Any], bool]:
    return lambda value: (  # false for NaN
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
    )


def time_or_none(value: Any) -> bool:
    return value is None or number(LARGEST)(value)


def list_of(check: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list)
        and (length is None or len(value) == length)
        and all(check(one) for one in value)
    )


UNIT = {
    "name": text,
    "role": ROLES.__contains__,
    "kind": KINDS.__contains__,
    "density": number(1),
    "reason": text,
    **dict.fromkeys(("dense_ms", "compact_ms", "sparse_ms", "winograd_ms"), time_or_none),
}
ROW = {
    **dict.fromkeys(("unit", "name"), text),
    "kind": KINDS.__contains__,
    **dict.fromkeys(("cin", "cout", "kernel", "stride", "numel"), whole(1)),
    **dict.fromkeys(("h_out", "w_out", "nnz"), whole(0)),
    **dict.fromkeys(("nominal_macs", "effective_macs", "executed_macs"), whole(0)),
    "predicted_ms": time_or_none,
}
PLAN = {
    **dict.fromkeys(("architecture", "masks_hash", "masks_label", "isa", "torch"), text),
    "input_size": list_of(whole(1, 2**16), 2),
    "batch": whole(1, 2**20),
    "threads": whole(1, 2**16),
    "measured": lambda value: isinstance(value, bool),
    "units": lambda value: isinstance(value, list),
    "rows": lambda value: isinstance(value, list),
    "notes": list_of(text),
    "totals": lambda value: isinstance(value, Mapping),
}


def checked(
    what: str, kind: type, record: Any, checks: Mapping[str, Callable[[Any], bool]]
) -> dict[str, Any]:
    """The fields of dataclass ``kind`` in ``record``. Raises PlanError naming one that is off."""
    if not isinstance(record, Mapping):
        raise _no_plan(f"{what} is {brief(record)}")
    found = {}
    for one in fields(kind):
        if one.name not in record:
            if one.default is MISSING and one.default_factory is MISSING:
                raise _no_plan(f"{what} lacks {one.name!r}")
            continue
        value = record[one.name]
        try:
            valid = checks[one.name](value)
        except TypeError:  # something that cannot be compared or looked up
            valid = False
        if not valid and one.name == "kind":
            raise PlanError(
                f"{what}: unknown kind {brief(value)}; known are {', '.join(KINDS)}. Make the plan "
                "again."
            )
        if not valid:
            raise _no_plan(f"{one.name!r} of {what} is {brief(value)}")
        found[one.name] = value
    return found


def check_parts(units: tuple[Any, ...], rows: tuple[Any, ...]) -> None:
    """Raise PlanError unless names are unique and every row belongs to a unit of its kind."""
    kinds = {unit.name: unit.kind for unit in units}
    if len(kinds) != len(units) or len({row.name for row in rows}) != len(rows):
        raise _no_plan("a layer is there twice")
    for row in rows:
        if kinds.get(row.unit) != row.kind:
            raise _no_plan(
                f"row {row.name!r} is {row.kind}, its unit {row.unit!r} {kinds.get(row.unit)}"
            )
        if row.nnz > row.numel:
            raise _no_plan(f"row {row.name!r} has {row.nnz} nonzeros of {row.numel} weights")


def _no_plan(why: str) -> PlanError:
    return PlanError(f"this is not a plan record ({why}). Pass what Plan.to_dict() returned.")
