"""What a result file must hold: the one place that knows its kinds, versions and required keys.

Every file says ``"schema": {"kind": ..., "version": ...}``. Version 1 are files of ``bench trunk``
from before kinds and the canary existed; they carry no ``schema`` and are recognised only to say
so. Keys beyond the required ones are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OpenTransError

VERSION = 2
Result = dict[str, Any]


@dataclass(frozen=True)
class Each:
    """A mapping from any text to values of one form."""

    form: Any


@dataclass(frozen=True)
class Maybe:
    """Missing, None, or a value of the form."""

    form: Any


@dataclass(frozen=True)
class Leaf:
    """A plain value: what it is called in messages, and the test."""

    words: str
    test: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


NUMBER = Leaf("a number", _is_number)
POSITIVE = Leaf("a number above 0", lambda v: _is_number(v) and v > 0)
SHARE = Leaf("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
COUNT = Leaf("a whole number of at least 0", lambda v: type(v) is int and v >= 0)
TEXT = Leaf("text", lambda v: isinstance(v, str))
FLAG = Leaf("true or false", lambda v: isinstance(v, bool))

SPREAD = {"median": NUMBER, "q1": NUMBER, "q3": NUMBER, "n": COUNT}
TIMING = {"ms": POSITIVE, "cpu_ms": NUMBER, "wall": SPREAD, "cpu": SPREAD, "contended_share": SHARE}
READING = {"wall_ms": SPREAD, "gflops": POSITIVE, "contended_share": SHARE}
CANARY = {
    "disturbed": FLAG,
    "reasons": [TEXT],
    "drift": NUMBER,
    "before": READING,
    "after": READING,
}
MACHINE = {"cpu": TEXT, "flags": [TEXT], "cpus": COUNT}
ENVIRONMENT = {
    "machine": MACHINE,
    "versions": {"torch": TEXT, "opentrans_kernels": TEXT},
    "source": Maybe({"commit": Maybe(TEXT), "dirty": Maybe(FLAG)}),
    "threads": COUNT,
    "isa": TEXT,
}
#: What every result has.
ENVELOPE = {
    "schema": {"kind": TEXT, "version": COUNT},
    "complete": FLAG,
    "canary": CANARY,
    **ENVIRONMENT,
}
#: Of rows since they say it; files from before are read without.
MATCH = Maybe({"equal": FLAG, "error": Maybe(NUMBER), "bound": NUMBER})
COMMAND = Maybe([TEXT])
LAYER = {
    "name": TEXT,
    "cin": COUNT,
    "cout": COUNT,
    "kernel": COUNT,
    "groups": Maybe(COUNT),
    "stride": COUNT,
    "h_out": COUNT,
    "w_out": COUNT,
    "density": SHARE,
    "nnz": COUNT,
    "dense_ms": POSITIVE,
    "sparse_ms": POSITIVE,
    "speedup": POSITIVE,
    "exact": FLAG,
    "loses": FLAG,
    "match": MATCH,
    "command": COMMAND,
}
#: part: of trunk results, since they say it.
SUBJECT = {"arch": TEXT, "weights": TEXT, "synthetic": FLAG, "part": Maybe(TEXT)}
MASK = {
    "label": TEXT,
    "synthetic": FLAG,
    "parameter_density": SHARE,
    "flop_density": SHARE,
}
#: A peer or dense variant: ``error`` if not available, else times, ratio and error.
SIDE = {"available": FLAG, "match": MATCH, "command": COMMAND}
STAGE = {
    "part": TEXT,
    "one_thread_ms": POSITIVE,
    "ms": POSITIVE,
    "speedup": SPREAD,
    "efficiency": POSITIVE,
}
SCALING = {
    "one_thread_ms": POSITIVE,
    "ms": POSITIVE,
    "speedup": SPREAD,
    "stages": Maybe([STAGE]),
}
TRUNK = {
    **ENVIRONMENT,
    "baseline": {"name": TEXT, **TIMING},
    "accelerated": TIMING,
    "variants": Each(SIDE),
    "speedup": POSITIVE,
    "speedup_spread": SPREAD,
    "thread_scaling": Maybe(SCALING),
    "median_round": Maybe({"baseline_ms": POSITIVE, "ms": POSITIVE}),
    "max_rel_err": NUMBER,
    "dense_own_rel_err": NUMBER,
    "exact": FLAG,
    "layers": [LAYER],
    "mask": MASK,
    "subject": SUBJECT,
    "input": [COUNT],
}
MACS = {"nominal": COUNT, "effective": COUNT, "executed": COUNT}
OP_ROW = {
    "op": TEXT,
    "backend": TEXT,
    "case": TEXT,
    "kind": TEXT,
    "cin": COUNT,
    "cout": COUNT,
    "kernel": COUNT,
    "stride": COUNT,
    "h_out": COUNT,
    "w_out": COUNT,
    "batch": COUNT,
    "density": SHARE,
    "density_asked": SHARE,
    "nnz": COUNT,
    "macs": MACS,
    "dense_kind": TEXT,
    "dense_ms": POSITIVE,
    "ms": POSITIVE,
    "speedup": Maybe(SPREAD),
    "exact": FLAG,
    "error": NUMBER,
    "dense_error": NUMBER,
    "match": MATCH,
    "command": COMMAND,
    "peers": Maybe(Each(SIDE)),
}
MODEL_ROW = {
    "part": TEXT,
    "batch": COUNT,
    "height": COUNT,
    "width": COUNT,
    "threads": COUNT,
    "dense_kind": TEXT,
    "dense_ms": POSITIVE,
    "ms": POSITIVE,
    "speedup": Maybe(SPREAD),
    "exact": FLAG,
    "macs": MACS,
    "memory": {"dense_peak_bytes": Maybe(COUNT), "peak_bytes": Maybe(COUNT)},
    "match": MATCH,
    "command": COMMAND,
}
FORMS: dict[str, Any] = {
    "trunk": {**ENVELOPE, **TRUNK, "peers": Each(SIDE)},
    "op": {**ENVELOPE, "rows": [OP_ROW], "skipped": [{"backend": TEXT, "reason": TEXT}]},
    "model": {**ENVELOPE, "subject": SUBJECT, "mask": MASK, "rows": [MODEL_ROW]},
    "alpha": {
        **ENVELOPE,
        "subject": TEXT,
        "sides": Each(
            {"ms": POSITIVE, "slower_than": Each(SPREAD), "match": MATCH, "command": COMMAND}
        ),
    },
    "training": {
        **ENVELOPE,
        "size": COUNT,
        "batch": COUNT,
        "results": [
            {
                "set": TEXT,
                "rows": [
                    {
                        "variant": TEXT,
                        "kept_mib": NUMBER,
                        "time_vs_baseline": SPREAD,
                        "match": MATCH,
                        "command": COMMAND,
                    }
                ],
            }
        ],
    },
}
KINDS = tuple(FORMS)


def envelope(kind: str, *, complete: bool = True) -> Result:
    """The keys that say what a file is."""
    return {"schema": {"kind": kind, "version": VERSION}, "complete": complete}


def kind_of(data: Any) -> tuple[str | None, int | None]:
    """(kind, version) that a parsed file claims; version 1 is recognised by its keys."""
    if not isinstance(data, Mapping):
        return None, None
    schema = data.get("schema")
    if isinstance(schema, Mapping):
        kind, version = schema.get("kind"), schema.get("version")
        return kind if isinstance(kind, str) else None, version if type(version) is int else None
    if {"baseline", "variants", "accelerated"} <= set(data):
        return "trunk", 1
    return None, None


def problems(value: Any, form: Any, path: str = "") -> Iterator[str]:
    """Sentences about everything in ``value`` that does not have the form."""
    here = path or "the file"
    if isinstance(form, Leaf):
        if not form.test(value):
            yield f"{here} is {_short(value)}, expected {form.words}"
    elif isinstance(form, Maybe):
        if value is not None:
            yield from problems(value, form.form, path)
    elif isinstance(form, list):
        if not isinstance(value, list):
            yield f"{here} is {_short(value)}, expected a list"
            return
        for index, item in enumerate(value):
            yield from problems(item, form[0], f"{path}[{index}]")
    elif not isinstance(value, Mapping):
        yield f"{here} is {_short(value)}, expected an object"
    elif isinstance(form, Each):
        for key, item in value.items():
            yield from problems(item, form.form, f"{path}.{key}" if path else str(key))
    else:
        for key, inner in form.items():
            where = f"{path}.{key}" if path else key
            if key not in value:
                if not isinstance(inner, Maybe):
                    yield f"{where} is missing"
            else:
                yield from problems(value[key], inner, where)


def check_result(data: Any, name: str) -> Result:
    """Return ``data`` if it is a result file of this version.

    Args:
        data: parsed JSON. name: the file, for messages.

    Raises:
        OpenTransError: what is wrong (the first three problems), why it matters, how to go on.
    """
    kind, version = kind_of(data)
    again = f"Measure it again with 'opentrans bench {kind or 'trunk'} ... --json {name}'"
    if kind is None or version is None:
        raise OpenTransError(
            f"{name} is no result of 'opentrans bench': it holds no schema kind and version. "
            f"{again}, or leave it out."
        )
    if kind not in FORMS:
        raise OpenTransError(
            f"{name} holds a result of kind {kind!r}; known are {', '.join(KINDS)}. It may come "
            "from a later version: update opentrans_kernels, or leave the file out."
        )
    if version > VERSION:
        raise OpenTransError(
            f"{name} has schema version {version}, this package reads {VERSION}: it was written "
            "by a later version. Update opentrans_kernels."
        )
    if version < VERSION:
        raise OpenTransError(
            f"{name} has schema version {version}, needed is {VERSION}: it was written by an "
            f"earlier version, without a look at the machine before and after. {again}."
        )
    found = list(problems(data, FORMS[kind]))
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise OpenTransError(
            f"{name} is no valid {kind} result of version {version}: "
            f"{'; '.join(found[:3])}{more}. It was cut off or edited. {again}."
        )
    return data


def read_json(path: str | Path) -> Any:
    """Parsed JSON of a file.

    Raises:
        CheckpointError: the file cannot be read. OpenTransError: it is not JSON.
    """
    from ..masks.limits import parse_json

    path = Path(path)
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}). Name a file that "
            "'opentrans bench ... --json FILE' wrote."
        ) from error
    except ValueError as error:
        raise OpenTransError(
            f"{path.name} is not JSON ({error}). Measure it again with 'opentrans bench'."
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
