"""Freeze rules as data: one row of :data:`RULES` is a rule. A new rule is a function and a row.

Direction: a small alpha is a slow decay, a heavy tail, a well-trained layer, and that is what is
frozen; a large alpha trains on.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opentrans_kernels.errors import PlanError


@dataclass(frozen=True)
class Unit:
    """One module a rule decides about.

    kind: "conv", "linear" or "other" (norms and parameters outside layers; only ``prefix`` and
        ``list`` reach those).
    kernel: kernel size of a convolution, else ().
    alphas: what was measured, one value per matrix: {"": 2.3}, or {"q": .., "k": .., "v": ..} for
        a fused attention projection; empty if the rule uses no alpha or none was measured.
    notes: why an alpha is undefined or ambiguous.
    """

    name: str
    kind: str
    kernel: tuple[int, ...] = ()
    alphas: Mapping[str, float] = field(default_factory=dict)
    notes: str = ""


@dataclass(frozen=True)
class Request:
    """What a rule sees: the units in network order, its options, and multiply-adds on demand."""

    units: Sequence[Unit]
    options: Mapping[str, Any]
    macs: Callable[[], Mapping[str, int]]

    @property
    def layers(self) -> list[Unit]:
        """Convolutions and linear layers."""
        return [unit for unit in self.units if unit.kind != "other"]


@dataclass
class Choice:
    """frozen: unit -> why. kept: unit -> why it trains. threshold: the cut, where there is one."""

    frozen: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    threshold: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FreezeRule:
    """One row of :data:`RULES`.

    options: keyword arguments of ``freeze_plan`` the rule reads; the first is its argument in the
        short form ``name:argument``.
    """

    name: str
    summary: str
    choose: Callable[[Request], Choice]
    needs_alphas: bool = False
    options: tuple[str, ...] = ()


def known_alphas(units: Sequence[Unit]) -> list[tuple[float, str, str]]:
    """(alpha, unit, part) of every comparable alpha, in order; NaN and -1 are no alphas."""
    return [
        (alpha, unit.name, part)
        for unit in units
        for part, alpha in unit.alphas.items()
        if alpha >= 0
    ]


def median_of(values: Sequence[float]) -> float:
    """Median, the mean of the two middle values for an even count; NaN for none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _compare(request: Request, below: bool, no_fit_is_small: bool = False) -> Choice:
    """Freeze units all of whose parts lie strictly on one side of the median.

    no_fit_is_small: take the 0 that published tools return without a fit for a small alpha, as
        they do.
    """
    threshold = median_of([alpha for alpha, _, _ in known_alphas(request.layers)])
    choice = Choice(threshold=threshold)
    word = "<" if below else ">"
    for unit in request.layers:
        if not unit.alphas:
            choice.kept[unit.name] = "no alpha was measured"
            continue
        sides = {}
        for part, alpha in unit.alphas.items():
            if not alpha > 0 and not (no_fit_is_small and alpha == 0):
                sides[part] = None
            else:
                sides[part] = alpha < threshold if below else alpha > threshold
        values = ", ".join(
            f"{'alpha' if not part else f'alpha of {part}'} {alpha:.4g}"
            for part, alpha in unit.alphas.items()
        )
        if None in sides.values():
            why = f" ({unit.notes})" if unit.notes else ""
            choice.kept[unit.name] = f"{values}: undefined{why}, never frozen"
        elif all(sides.values()):
            choice.frozen[unit.name] = f"{values} {word} the median {threshold:.4g}"
        elif any(sides.values()):
            parts = ", ".join(part for part, side in sides.items() if not side)
            choice.kept[unit.name] = f"{values}: part {parts} is not {word} {threshold:.4g}"
        else:
            choice.kept[unit.name] = f"{values} is not {word} the median {threshold:.4g}"
    return choice


def _median(request: Request) -> Choice:
    return _compare(request, below=True)


def _above_median(request: Request) -> Choice:
    return _compare(request, below=False)


def _opentrans(request: Request) -> Choice:
    return _compare(request, below=True, no_fit_is_small=True)


def _share(request: Request, default: float | None) -> float:
    ratio = request.options.get("ratio", default)
    if ratio is None or not 0 < ratio < 1:
        raise PlanError(
            f"ratio {ratio} is not a share between 0 and 1. Pass for example ratio=0.5."
        )
    return float(ratio)


def _ratio(request: Request) -> Choice:
    ratio = _share(request, None)
    fitted = [entry for entry in known_alphas(request.layers) if entry[0] > 0]
    known = sorted(fitted, key=lambda entry: entry[0])  # stable: equal ones in network order
    chosen = {(name, part) for _, name, part in known[: round(ratio * len(known))]}
    cut = known[len(chosen) - 1][0] if chosen else math.nan
    choice = Choice(threshold=cut)
    what = f"the {len(chosen)} smallest of {len(known)}"
    for unit in request.layers:
        values = ", ".join(f"{alpha:.4g}" for alpha in unit.alphas.values())
        if unit.alphas and all((unit.name, part) in chosen for part in unit.alphas):
            choice.frozen[unit.name] = f"alpha {values} is one of {what}"
        elif any(not alpha > 0 for alpha in unit.alphas.values()):
            choice.kept[unit.name] = f"alpha {values}: undefined ({unit.notes}), never frozen"
        else:
            choice.kept[unit.name] = f"alpha {values} is not one of {what}"
    return choice


def _random(request: Request) -> Choice:
    """Equal count, or equal multiply-adds, drawn by Python's generator: the same everywhere."""
    seed = request.options.get("seed")
    match = request.options.get("match", "count")
    if not isinstance(seed, int):
        raise PlanError(
            "rule 'random' without a seed cannot be repeated. Pass seed=0, and report results "
            "over several seeds."
        )
    if match not in ("count", "macs"):
        raise PlanError(f"match={match!r} is unknown. Pass match='count' or match='macs'.")
    names = [unit.name for unit in request.layers]
    like = request.options.get("like")
    if like is not None and not set(like) <= set(names):
        foreign = ", ".join(sorted(set(like) - set(names))[:3])
        raise PlanError(
            f"the plan given as like= freezes layers that are not among these: {foreign}. Pass a "
            "plan made for this model and these layers."
        )
    share = _share(request, 0.5)
    draw = random.Random(seed)
    if match == "count":
        count = len(like) if like is not None else int(share * len(names))
        picked = set(draw.sample(names, count))
        why = f"drawn with seed {seed}, {count} of {len(names)} layers"
        notes = []
    else:
        macs = request.macs()
        total = sum(macs.get(name, 0) for name in names)
        target = sum(macs.get(n, 0) for n in like) if like is not None else share * total
        picked = _draw_macs(draw, names, macs, target)
        got = sum(macs.get(name, 0) for name in picked)
        why = f"drawn with seed {seed} to match multiply-adds"
        notes = [
            f"{len(picked)} layers with {got / 1e6:.1f} MMAC forward, asked for {target / 1e6:.1f}"
        ]
    return Choice(
        {name: why for name in names if name in picked},
        {name: f"not {why}" for name in names if name not in picked},
        notes=notes,
    )


def _draw_macs(
    draw: random.Random, names: Sequence[str], macs: Mapping[str, int], target: float
) -> set[str]:
    """The first random order whose greedy filling comes within 1 % of ``target``, else the best."""
    best: tuple[float, set[str]] = (math.inf, set())
    for _ in range(200):
        left, picked = target, set()
        for name in draw.sample(names, len(names)):
            if macs.get(name, 0) <= left:
                picked.add(name)
                left -= macs.get(name, 0)
        if left < best[0]:
            best = (left, picked)
        if left <= 0.01 * target:
            break
    return best[1]


def _all_3x3(request: Request) -> Choice:
    choice = Choice()
    for unit in request.layers:
        size = "x".join(map(str, unit.kernel)) or "linear"
        if unit.kernel == (3, 3):
            choice.frozen[unit.name] = "3x3 convolution"
        else:
            choice.kept[unit.name] = f"{size}, not 3x3"
    return choice


def _prefix(request: Request) -> Choice:
    until = request.options.get("until")
    names = [unit.name for unit in request.units]
    inside = [i for i, name in enumerate(names) if name == until or name.startswith(f"{until}.")]
    if not until or not inside:
        paths = {name.rsplit(".", n)[0] for name in names for n in range(name.count(".") + 1)}
        raise PlanError(
            f"rule 'prefix' needs until= the name of the last module to freeze; {until!r} is none "
            f"with parameters.{suggest(str(until), paths)} Write for example until='layer2'."
        )
    last = inside[-1]
    return Choice(
        {name: f"at or before {until} in execution order" for name in names[: last + 1]},
        {name: f"after {until}" for name in names[last + 1 :]},
    )


def _list(request: Request) -> Choice:
    wanted = request.options.get("layers")
    if isinstance(wanted, str) or not wanted:
        raise PlanError(
            f"rule 'list' needs layers= a list of module names, got {wanted!r}. Pass for example "
            "layers=['layer1.0.conv1']."
        )
    names = [unit.name for unit in request.units]
    unknown = [name for name in wanted if name not in set(names)]
    if unknown:
        raise PlanError(
            f"{len(unknown)} of {len(wanted)} listed layers are no modules with parameters of "
            f"this model: {', '.join(unknown[:5])}.{suggest(unknown[0], names)} Names match "
            "exactly and in full, as in model.named_modules()."
        )
    return Choice(
        {name: "listed" for name in names if name in set(wanted)},
        {name: "not listed" for name in names if name not in set(wanted)},
    )


def suggest(name: str, names: Collection[str]) -> str:
    """ " Did you mean ...?" for the nearest of ``names``, or ""."""
    close = difflib.get_close_matches(name, sorted(names), n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


RULES: dict[str, FreezeRule] = {
    rule.name: rule
    for rule in (
        FreezeRule("median", "alpha strictly below the median", _median, True),
        FreezeRule("ratio", "the given share of layers, smallest alpha first", _ratio, True,
                   ("ratio",)),
        FreezeRule("above_median", "alpha*, the control: alpha strictly above the median",
                   _above_median, True),
        FreezeRule("random", "drawn with a seed, at equal count or equal multiply-adds", _random,
                   False, ("seed", "ratio", "like", "match")),
        FreezeRule("all_3x3", "every 3x3 convolution", _all_3x3),
        FreezeRule("prefix", "everything up to a named module", _prefix, False, ("until",)),
        FreezeRule("list", "exactly the named modules", _list, False, ("layers",)),
        FreezeRule("opentrans", "as published: names by prefix, all other parameters train again",
                   _opentrans, True),
    )
}  # fmt: skip
