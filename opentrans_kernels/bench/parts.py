"""Where a whole model's time goes, part by part, dense and accelerated in turns.

Parts are modules: the trunk, then the modules that hold recognised parts of a head, then what is
beside them. They are timed by hooks that belong to the process, not to a module, so no module is
taken for one with hooks of its own and every fast path stays on. A part's time is without the parts
inside it; what is left of the whole is a line of its own. All lines are of one round, that whose
whole gained the median, so they add up to the whole and their ratios belong to it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..errors import OpenTransError
from ..heads import HeadPart, HeadReport
from .timing import median_pair

__all__ = ["PartTimes", "Toggle", "boundaries", "part_ratio", "time_parts", "trunk_path"]

REST, WHOLE = "the rest, after the head too", "the whole"
SMALL = 0.01  # of the whole, on either side: a part below it belongs to the rest


class Toggle:
    """Puts replacements of an accelerated model out of the way and back, in no time.

    paths: which; None: all that are there.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str] | None = None) -> None:
        # The outer ones first: inner ones are children of their replacements.
        self._places = [
            (_parent(model, path), path.rpartition(".")[2], module)
            for path, module in model.named_modules()
            if path and "opentrans_original" in vars(module) and (paths is None or path in paths)
        ]

    def dense(self) -> None:
        """The original modules."""
        for parent, key, module in reversed(self._places):
            original = module.opentrans_original
            if isinstance(module, HeadPart):  # whose inner parts are originals by now
                original._modules.update(module._modules)
            parent._modules[key] = original

    def accelerated(self) -> None:
        """The replacements."""
        for parent, key, module in self._places:
            parent._modules[key] = module


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def trunk_path(tower: str, head: Sequence[str], model: nn.Module) -> str:
    """The outermost module around ``tower`` that holds no path of ``head`` and is not the model.

    Trees walk a tower attribute by attribute, so what is called is something around it.
    """
    steps = tower.split(".") if tower else []
    # A part around the tower, FC-CLIP's backbone, is the head's in one of its methods alone.
    head = [part for part in head if not f"{tower}.".startswith(f"{part}.")]
    for length in range(1, len(steps) + 1):
        path = ".".join(steps[:length])
        if any(part == path or part.startswith(f"{path}.") for part in head):
            continue
        # Where nothing of the head is known, the name tells where it starts.
        child = steps[length] if length < len(steps) else ""
        if head or child in ("", "clip_model", "tower", "visual") or not _has_siblings(model, path):
            return path
    return tower


def _has_siblings(model: nn.Module, path: str) -> bool:
    """Whether several children have parameters."""
    module = model.get_submodule(path)
    return sum(1 for child in module.children() if next(child.parameters(), None) is not None) > 1


def boundaries(model: nn.Module, tower: str, head: Sequence[str]) -> dict[str, str]:
    """Path of a module that is timed -> the row it counts for.

    tower: path of the trunk. head: paths of recognised parts.
    """
    trunk = trunk_path(tower, head, model)
    rows = {trunk: "trunk"} if trunk else {}

    def holds(path: str) -> bool:
        return any(part.startswith(f"{path}.") for part in head)

    def walk(path: str, module: nn.Module, may_split: bool) -> None:
        for key, child in module.named_children():
            inner = f"{path}.{key}" if path else key
            if inner == trunk:
                continue
            around = trunk.startswith(f"{inner}.")
            rows[inner] = inner
            if around or (may_split and holds(inner) and _has_siblings(model, inner)):
                walk(inner, child, around)
            else:
                _groups(rows, inner, head)

    walk("", model, True)
    return rows


def _groups(rows: dict[str, str], path: str, head: Sequence[str]) -> None:
    """Recognised parts below ``path`` that are the items of a list: one row per list."""
    lists: dict[str, list[str]] = {}
    for part in head:
        above, _, key = part.rpartition(".")
        if key.isdigit() and part.startswith(f"{path}."):
            lists.setdefault(above, []).append(part)
    for above, items in lists.items():
        if len(items) > 1:
            rows |= dict.fromkeys(items, above)


@dataclass
class PartTimes:
    """Milliseconds of every row and round; ``done`` says what was accelerated there."""

    dense: dict[str, list[float]] = field(default_factory=dict)
    accelerated: dict[str, list[float]] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[str, float, float, str]]:
        """(part, dense ms, accelerated ms, what was done) of one round; the last is the whole."""
        wholes = list(zip(self.dense[WHOLE], self.accelerated[WHOLE], strict=True))
        pair = median_pair(*zip(*wholes, strict=True))
        at = wholes.index((pair.slow_ms, pair.fast_ms))
        for name in self.dense:
            yield name, self.dense[name][at], self.accelerated[name][at], self.done.get(name, "")

    def fold(self) -> None:
        """Move small parts of which nothing was accelerated into the rest."""
        sides = (self.dense, self.accelerated)
        for name in [n for n in self.dense if n not in (REST, WHOLE) and n not in self.done]:
            if all(sum(side[name]) < SMALL * sum(side[WHOLE]) for side in sides):
                for side in sides:
                    small = side.pop(name)
                    side[REST] = [a + b for a, b in zip(side[REST], small, strict=True)]

    def to_dict(self) -> list[dict[str, Any]]:
        """Rows for JSON."""
        keys = ("part", "dense_ms", "ms", "what")
        return [dict(zip(keys, row, strict=True)) for row in self.rows()]

    def __str__(self) -> str:
        rows = list(self.rows())
        width = max(len(row[0]) for row in rows)
        lines = [f"{'part':<{width}}  {'dense ms':>9}  {'our ms':>9}  {'ratio':>6}  done"]
        lines += [
            f"{part:<{width}}  {dense:9.1f}  {ours:9.1f}  {part_ratio(dense, ours):>6}  {what}"
            for part, dense, ours, what in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def part_ratio(dense: float, ours: float) -> str:
    """``2.50x``; nothing for a part that is called on one side only."""
    return f"{dense / ours:.2f}x" if dense > 0 and ours > 0 else ""


def time_parts(
    model: nn.Module,
    call: Callable[[], object],
    tower: str,
    report: HeadReport | None = None,
    *,
    rounds: int = 3,
) -> PartTimes:
    """Time an accelerated model's parts, dense and accelerated in turns.

    Args:
        model: accelerated, in eval mode; left accelerated. tower: path of its trunk.
        call: runs the model once on an example, such as ``lambda: model(images)``.
        report: of the head; its parts become rows.
        rounds: calls of either side, after one that is not counted.

    Raises:
        OpenTransError: fewer than one round. What ``call`` raises is passed on.
    """
    if rounds < 1:
        raise OpenTransError(f"rounds={rounds} must be 1 or more.")
    head = [part.path for part in report.parts] if report is not None else []
    rows = boundaries(model, tower, head)
    toggle = Toggle(model)
    found = PartTimes(done=_done(model, rows, report))
    calls: dict[str, list[dict[str, float]]] = {"dense": [], "ours": []}
    try:
        for _ in range(rounds + 1):
            for side, switch in (("dense", toggle.dense), ("ours", toggle.accelerated)):
                switch()
                calls[side].append(_one_call(model, rows, call))
    finally:
        toggle.accelerated()
    # Some are called on one side only: what is made once per size, say.
    names = dict.fromkeys(name for side in calls.values() for once in side[1:] for name in once)
    for name in [*(name for name in names if name not in (REST, WHOLE)), REST, WHOLE]:
        found.dense[name], found.accelerated[name] = (
            [once.get(name, 0.0) for once in calls[side][1:]] for side in ("dense", "ours")
        )
    found.fold()
    return found


def _done(model: nn.Module, rows: dict[str, str], report: HeadReport | None) -> dict[str, str]:
    done: dict[str, str] = {}
    trunk = next((path for path, row in rows.items() if row == "trunk"), None)
    if trunk is not None:
        count = sum(
            "opentrans_original" in vars(module) and not isinstance(module, HeadPart)
            for module in model.get_submodule(trunk).modules()
        )
        done["trunk"] = f"{count} parts accelerated" if count else ""
    counts: dict[str, Counter[str]] = {}
    for part in report.replaced if report is not None else ():
        outer = [path for path in rows if part.path == path or part.path.startswith(f"{path}.")]
        if outer:
            row = rows[max(outer, key=len)]
            # What is fast about a part around the trunk is called when the head is done.
            row = REST if row == "trunk" else row
            counts.setdefault(row, Counter())[part.kind] += 1
    for row, kinds in counts.items():
        done[row] = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return done


def _one_call(
    model: nn.Module, rows: dict[str, str], call: Callable[[], object]
) -> dict[str, float]:
    """Milliseconds of every row without the rows inside it, of the rest, and of the whole."""
    known = {id(model.get_submodule(path)): row for path, row in rows.items()}
    spent = dict.fromkeys(rows.values(), 0.0)
    stack: list[list[float]] = []  # start, and the time of parts inside

    def enter(module: nn.Module, _inputs: Any) -> None:
        if id(module) in known:
            stack.append([time.perf_counter(), 0.0])

    def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
        if id(module) in known:
            start, inside = stack.pop()
            whole = time.perf_counter() - start
            spent[known[id(module)]] += 1e3 * (whole - inside)
            if stack:
                stack[-1][1] += whole

    handles = [
        torch_module.register_module_forward_pre_hook(enter),
        torch_module.register_module_forward_hook(leave),
    ]
    try:
        with torch.no_grad():
            began = time.perf_counter()
            call()
            whole = 1e3 * (time.perf_counter() - began)
    finally:
        for handle in handles:
            handle.remove()
    spent = {name: value for name, value in spent.items() if value > 0}
    return {**spent, REST: max(0.0, whole - sum(spent.values())), WHOLE: whole}
