"""Two results of one machine, case by case, on ratios: has anything become slower?

Times of two runs cannot be compared where the clock drifts. Each run therefore compares its own two
sides, ours and a dense one, and what is compared here are those ratios.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import OpenTransError
from .machines import machine_differences, machine_slug
from .schema import Result, check_result, kind_of, read_json
from .tokens_form import KIND as TOKENS
from .tokens_form import check_tokens, inexact

#: Results of scripts in ``benchmarks/``, which have forms of their own.
OTHER_FOLDERS = ("alpha", "trained", "training", "gpu", "ovs", "attention")


@dataclass(frozen=True)
class Case:
    """One ratio of a result: time of the yardstick / our time, so higher is better.

    ``match``: whether the answer was the dense one (see ``rows.matched``), None in files from
    before rows said so. ``command``: what measures it again: of the row, else of its whole file.
    """

    name: str
    ratio: float
    q1: float
    q3: float
    match: dict[str, Any] | None = None
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Change:
    """A case in both results. ``slower`` is the growth of our relative time, 0.05 for 5 %."""

    name: str
    base: Case
    new: Case

    @property
    def slower(self) -> float:
        """Positive: slower than before."""
        return self.base.ratio / self.new.ratio - 1

    @property
    def overlap(self) -> bool:
        """True if the quartile ranges of the two ratios overlap: perhaps noise."""
        return self.base.q1 <= self.new.q3 and self.new.q1 <= self.base.q3

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "base": asdict(self.base),
            "new": asdict(self.new),
            "slower": self.slower,
            "quartiles_overlap": self.overlap,
        }


@dataclass(frozen=True)
class Comparison:
    """All changes, worst first; cases that only one side has; remarks about the two runs."""

    machine: str
    changes: tuple[Change, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    notes: tuple[str, ...]

    def regressions(self, limit: float) -> list[Change]:
        """Changes slower by more than ``limit`` (0.05 for 5 %)."""
        return [change for change in self.changes if change.slower > limit]


def load_results(places: Iterable[str | Path]) -> dict[str, Result]:
    """Result files by name; a directory stands for every ``*.json`` below it, but not for those in
    folders of ``OTHER_FOLDERS``.

    Raises:
        OpenTransError: a bad file, an empty directory, or nothing given.
    """
    found: dict[str, Result] = {}
    for place in map(Path, places):
        files = [place]
        if place.is_dir():
            files = sorted(
                file
                for file in place.rglob("*.json")
                if not set(file.relative_to(place).parts[:-1]) & set(OTHER_FOLDERS)
            )
        if not files:
            raise OpenTransError(
                f"{place} holds no result files (*.json). Write some with "
                f"'opentrans bench trunk ... --json {place}/NAME.json'."
            )
        found.update({str(path): load_result(path) for path in files})
    if not found:
        raise OpenTransError("no result file was given. Name at least one file or directory.")
    return found


def load_result(path: str | Path) -> Result:
    """A result file of any kind that is compared. Raises OpenTransError for a bad one."""
    data, name = read_json(path), Path(path).name
    if kind_of(data)[0] == TOKENS:
        return dict(check_tokens(data, name))
    return check_result(data, name)


def one_machine(results: Mapping[str, Result]) -> str:
    """The machine's name, if all results come from one.

    Raises:
        OpenTransError: they come from different machines; says which and how they differ.
    """
    (first, start), *rest = results.items()
    for name, result in rest:
        differences = machine_differences(start["machine"], result["machine"])
        if differences:
            raise OpenTransError(
                f"{first} and {name} come from different machines ("
                f"{machine_slug(start['machine'])} and {machine_slug(result['machine'])}: "
                f"{'; '.join(differences[:2])}), so their times say nothing about each other. "
                "Measure both on one machine, and keep one folder per machine."
            )
    return machine_slug(start["machine"])


def compare(base: Mapping[str, Result], new: Mapping[str, Result]) -> Comparison:
    """Compare results by case.

    Args:
        base, new: file name -> result, as :func:`load_results` returns them.

    Raises:
        OpenTransError: different machines, no case in common, or a case that one side has twice.
    """
    machine = one_machine({**{f"BASE {k}": v for k, v in base.items()},
                           **{f"NEW {k}": v for k, v in new.items()}})  # fmt: skip
    before, after = _cases(base), _cases(new)
    changes = []
    for key in before.keys() & after.keys():
        mine, theirs = before[key], after[key]
        shared = [yardstick for yardstick in mine if yardstick in theirs]
        if shared:  # the base's fastest dense side comes first
            changes.append(Change(key, mine[shared[0]], theirs[shared[0]]))
    if not changes:
        raise OpenTransError(
            "the two results have no case in common: BASE has "
            f"{_some(before)}, NEW has {_some(after)}. Measure NEW with the options of BASE "
            "(arch, weights, mask, size, batch, threads, instruction set); they are in its "
            "'command'. Inexact results have no ratio and count as not measured."
        )
    matched = {change.name for change in changes}
    return Comparison(
        machine,
        tuple(sorted(changes, key=lambda change: -change.slower)),
        tuple(sorted(before.keys() - matched)),
        tuple(sorted(after.keys() - matched)),
        tuple(_notes(base, new)),
    )


def parse_limit(text: str) -> float:
    """``"5%"`` or ``"0.05"`` as 0.05.

    Raises:
        OpenTransError: not a share of at least 0.
    """
    number = text.strip()
    try:
        limit = float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise OpenTransError(f"{text!r} is not a limit. Write 5% or 0.05.")
    return limit


def _cases(results: Mapping[str, Result]) -> dict[str, dict[str, Case]]:
    """case -> yardstick -> ratio; the yardstick to prefer comes first."""
    found: dict[str, dict[str, Case]] = {}
    origin: dict[tuple[str, str], str] = {}
    for file, result in results.items():
        kind = result["schema"]["kind"]
        for name, yardstick, spread, row in _RATIOS[kind](result):
            first = origin.setdefault((name, yardstick), file)
            if yardstick in found.setdefault(name, {}):
                place = f"twice in {file}" if first == file else f"in {first} and in {file}"
                raise OpenTransError(
                    f"{name!r} against {yardstick} is {place}, so it is not clear which of the two "
                    "to compare. Keep one of them: name a single file, or move the other out of "
                    "the directory."
                )
            words = row.get("command") or result.get("command", ())
            case = Case(
                name, spread["median"], spread["q1"], spread["q3"], row.get("match"), tuple(words)
            )
            found[name][yardstick] = case
    return found


def run_label(result: Result) -> str:
    """Mask, size, batch, threads and instruction set of a result, as far as it has them."""
    parts = []
    if "mask" in result:
        parts.append(str(result["mask"]["label"]).removesuffix(" (synthetic mask)"))
    if "input" in result:
        batch, _, height, width = result["input"]
        parts += [f"{height}" if height == width else f"{height}x{width}"]
        parts += [f"batch {batch}"] * (batch > 1)
    parts += [f"{result['threads']} t", result.get("opentrans_cpu_capability") or result["isa"]]
    return ", ".join(parts)


def _case_label(result: Result) -> str:
    """:func:`run_label` behind arch and weights: other networks are other cases."""
    if "subject" not in result:
        return run_label(result)
    subject = result["subject"]
    return f"{subject['arch']}, {subject['weights']}, {run_label(result)}"


def _trunk_ratios(result: Result) -> Iterable[tuple[str, str, Any, Mapping[str, Any]]]:
    label = f"trunk {_case_label(result)}"
    best = result["baseline"]["name"]
    variants = result["variants"]
    for name in sorted(variants, key=lambda one: one != best):
        if variants[name]["available"] and result["exact"]:  # a wrong answer has no speed
            match = result["accelerated"].get("match")
            row = {"match": match, "command": variants[name].get("command")}
            yield label, name, variants[name]["speedup_of_accelerated"], row
    for row in result["layers"]:
        if not row["exact"]:
            continue
        ratio = row["speedup"]
        spread = {
            "median": ratio,
            "q1": row.get("speedup_q1", ratio),
            "q3": row.get("speedup_q3", ratio),
        }
        yield f"{label}: {row['name']}", "oneDNN", spread, row


def _row_ratios(result: Result) -> Iterable[tuple[str, str, Any, Mapping[str, Any]]]:
    kind, label = result["schema"]["kind"], _case_label(result)
    for row in result["rows"]:
        if row["speedup"] is None or not row["exact"]:
            continue
        if kind == "op":
            what = f"{row['op']} {row['backend']} {row['case']} density {row['density_asked']:g}"
        else:
            what = f"{row['part']} {row['height']}x{row['width']}, {row['threads']} t"
        yield f"{kind} {label}: {what}, batch {row['batch']}", "dense", row["speedup"], row


def _alpha_ratios(result: Result) -> Iterable[tuple[str, str, Any, Mapping[str, Any]]]:
    if not result.get("exact", True):
        return
    label = ", ".join(filter(None, [result.get("subject"), f"{result['threads']} t"]))
    for peer, side in result["sides"].items():
        for ours, spread in side["slower_than"].items():
            yield f"alpha {label}: {ours}", peer, spread, result["sides"].get(ours, {})


def _training_ratios(result: Result) -> Iterable[tuple[str, str, Any, Mapping[str, Any]]]:
    shape = f"{result['size']}, batch {result['batch']}, {result['threads']} t"
    if "mask" in result:
        shape = f"mask {result['mask']}, {shape}"
    for one in result["results"]:
        for row in one["rows"]:
            if row["variant"] != "baseline":
                time = row["time_vs_baseline"]
                inverse = {"median": 1 / time["median"], "q1": 1 / time["q3"], "q3": 1 / time["q1"]}
                name = f"training {shape}: {one['set']}, {row['variant']}"
                yield name, "baseline", inverse, row


def _token_ratios(result: Result) -> Iterable[tuple[str, str, Any, Mapping[str, Any]]]:
    plan = result["plan"]
    told = [f"{key} {plan[key]}" for key in ("alpha", "r", "keep") if plan.get(key) is not None]
    told += ["grid " + "x".join(map(str, plan["grid"]))] if plan.get("grid") else []
    system = f"{result['system']} {result['decoder']}, {result['classes']} classes"
    size = f"{result['height']}x{result['width']}"
    mask = result.get("mask")
    run = [f"{result['threads']} t", result.get("opentrans_cpu_capability") or result["isa"]]
    parts = [system, size, plan["method"], *told, *([mask["label"]] if mask else []), *run]
    label = ", ".join(parts)
    for row in result["rows"]:
        if row["name"] != "eager" and not inexact(row):
            yield f"tokens {label}: {row['name']}", "eager", row["over_eager"], row


_RATIOS = {
    "tokens": _token_ratios,
    "trunk": _trunk_ratios,
    "op": _row_ratios,
    "model": _row_ratios,
    "alpha": _alpha_ratios,
    "training": _training_ratios,
}


def _notes(base: Mapping[str, Result], new: Mapping[str, Result]) -> Iterable[str]:
    for side, results in (("BASE", base), ("NEW", new)):
        for name, result in results.items():
            if result["canary"]["disturbed"]:
                reasons = "; ".join(result["canary"]["reasons"])
                yield f"{side} {name} was taken on a disturbed machine: {reasons}"
            if not result["complete"]:
                yield f"{side} {name} was interrupted and holds only what was finished"
            wrong = _inexact(result)
            if wrong:
                yield f"{side} {name} is inexact, without a ratio: {wrong}"
    versions = [
        {(key, value) for result in results.values() for key, value in result["versions"].items()}
        for results in (base, new)
    ]
    for key in sorted({key for key, _ in versions[0] ^ versions[1]}):
        old, now = (
            ", ".join(sorted(str(v) for k, v in side if k == key)) or "none" for side in versions
        )
        yield f"{key} differs: {old} before, {now} after"


def _inexact(result: Result) -> str:
    """The inexact parts of a result, counted; empty when there are none."""
    rows = [*result.get("layers", ()), *result.get("rows", ())]
    count = sum(inexact(row) if "difference" in row else not row["exact"] for row in rows)
    parts = [] if result.get("exact", True) else ["the whole result"]
    parts += [f"{count} of {len(rows)} rows"] * (count > 0)
    return ", ".join(parts)


def _some(names: Iterable[str]) -> str:
    shown: Sequence[str] = sorted(names)
    return f"{len(shown)} cases such as {shown[0]!r}" if shown else "none"
