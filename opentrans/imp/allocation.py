"""How the weights to remove are shared out over the layers.

The score of a weight is its magnitude over ``worth ** strength``, where worth is what a zero in its
layer saves, relative to the mean over layers. Removing a weight ``w`` disturbs the output by about
``w ** 2`` (second order), and gains its worth, so with ``strength`` 1/2 the ranking is the one by
disturbance per gain.

=========  ==========================================================================
global     worth 1: the published rule, one threshold for all layers
uniform    every layer gives the same share of its remaining weights
macs       worth = output pixels of the layer: multiply-adds per image
latency    worth = milliseconds, from the cost model of the plan (``cost``)
=========  ==========================================================================

A weighted ranking could empty the layers with the most pixels, and a ranking of whole channels
those with the largest fan-in, whose means are small. ``floor`` keeps every layer above a share of
the density of the whole network in that round; what it may not give, the others do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from opentrans_kernels.errors import PlanError

from .cost import LEAST_WORTH, LayerCost
from .patterns import Pattern
from .select import shares, smallest, smallest_units

ALLOCATIONS = ("global", "uniform", "macs", "latency")
FLOOR = 0.2  # of the network's density


@dataclass(frozen=True)
class Allocation:
    """One of ``ALLOCATIONS``.

    strength: exponent of the worth, at least 0 (0 is global).
    floor: least density of a layer as a share of the network's, 0 to 1; None: 0 for the published
    rule ("global" or "uniform", single weights), else 0.2. Raises PlanError for a value that is not
    possible.
    """

    name: str = "global"
    strength: float = 0.5
    floor: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ALLOCATIONS:
            raise PlanError(
                f"allocation={self.name!r} is not known. Use one of {', '.join(ALLOCATIONS)}."
            )
        if not 0.0 <= self.strength < math.inf:
            raise PlanError(f"strength={self.strength!r} must be a number of at least 0.")
        if self.floor is not None and not 0.0 <= self.floor <= 1.0:
            raise PlanError(
                f"floor={self.floor!r} is a share of the network's density and must lie between 0 "
                "and 1."
            )

    @property
    def weighted(self) -> bool:
        """Whether layers differ in worth, so that their output sizes are needed."""
        return self.name in ("macs", "latency")

    def least(self, pattern: Pattern) -> float:
        """The floor in force."""
        if self.floor is not None:
            return self.floor
        return FLOOR if self.weighted or not pattern.single else 0.0

    def factors(
        self,
        alive: Mapping[str, int],
        costs: Mapping[str, LayerCost] | None,
        goal: float,
    ) -> dict[str, float]:
        """Layer -> what its magnitudes are multiplied by.

        alive: live weights per layer; costs: needed if ``weighted``; goal: density of the whole
        network after the last round, towards which the worth of a zero is taken.
        """
        if not self.weighted:
            return dict.fromkeys(alive, 1.0)
        if costs is None:
            raise PlanError(f"allocation={self.name!r} needs the cost of each layer. Pass costs.")
        worth = {}
        for name, count in alive.items():
            cost = costs[name]
            if self.name == "macs":
                worth[name] = float(cost.pixels)
            else:
                worth[name] = cost.worth(count, goal * cost.numel) if count > 1 else 0.0
        mean = sum(worth.values()) / len(worth)
        if mean <= 0:
            return dict.fromkeys(alive, 1.0)
        return {n: max(w / mean, LEAST_WORTH) ** -self.strength for n, w in worth.items()}


@dataclass(frozen=True)
class Removal:
    """Weights that a round removes: bool per layer; threshold: the largest score removed."""

    removed: dict[str, torch.Tensor]
    threshold: float


def choose(
    weights: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    count: int,
    *,
    allocation: Allocation,
    pattern: Pattern,
    factors: Mapping[str, float],
) -> Removal:
    """The ``count`` live weights of lowest score, over all layers.

    Args:
        weights: layer -> [Cout, Cin, k, k], any floating dtype (ranked in float32), finite.
        masks: layer -> bool of that shape, True where a weight is left. Not changed.
        count: weights to remove, fewer than are left. Patterns whose units hold more than one
            weight remove the fewest units that hold ``count``; with "uniform" at most ``count``.

    Raises PlanError if the floors leave fewer than ``count`` weights to remove.
    """
    layers = _Layers(weights, masks, pattern, factors)
    alive = {name: int(torch.count_nonzero(mask)) for name, mask in masks.items()}
    total = sum(mask.numel() for mask in masks.values())
    density = (sum(alive.values()) - count) / total
    least = allocation.least(pattern)
    limits = {
        name: max(0, alive[name] - max(math.ceil(least * density * mask.numel()), least > 0))
        for name, mask in masks.items()
    }
    if sum(limits.values()) < count:
        raise PlanError(
            f"{count} weights are to be removed, but floor={least} leaves only "
            f"{sum(limits.values())} of {sum(alive.values())}. Use a lower floor."
        )
    if allocation.name == "uniform":
        quotas = dict(zip(alive, shares(count, list(alive.values())), strict=True))
        # Whole units above the quota of every layer would add up; the rest is due the next round.
        parts = [layers.take([name], quota, at_most=True) for name, quota in quotas.items()]
    else:
        parts = _within_limits(layers, list(alive), count, limits)
    removed: dict[str, torch.Tensor] = {}
    for part in parts:
        removed.update(part.removed)
    ordered = {name: removed[name] for name in masks}
    return Removal(ordered, max((part.threshold for part in parts), default=0.0))


def _within_limits(
    layers: _Layers, names: list[str], count: int, limits: Mapping[str, int]
) -> list[Removal]:
    """One ranking over all layers; a layer at its limit gives that many, the others the rest."""
    full: list[Removal] = []
    while True:
        part = layers.take(names, count)
        over = [n for n in names if int(torch.count_nonzero(part.removed[n])) > limits[n]]
        # A single unit may hold more than the limit; such a layer gives nothing more.
        if not over:
            return [*full, part]
        for name in over:
            own = layers.take([name], limits[name], at_most=True)
            full.append(own)
            count -= int(torch.count_nonzero(own.removed[name]))
            names = [n for n in names if n != name]
        if not names:
            return full


class _Layers:
    """Scores of all layers, computed when they are asked for."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        masks: Mapping[str, torch.Tensor],
        pattern: Pattern,
        factors: Mapping[str, float],
    ) -> None:
        self.weights, self.masks, self.pattern, self.factors = weights, masks, pattern, factors

    def magnitude(self, name: str) -> torch.Tensor:
        return self.weights[name].detach().float().abs() * self.factors[name]

    def take(self, names: list[str], count: int, at_most: bool = False) -> Removal:
        """The lowest scores among the layers ``names``; ``at_most``: never more than ``count``."""
        if self.pattern.single:
            return self._single(names, count)
        units = [self.pattern.units(self.magnitude(n), self.masks[n]) for n in names]
        marked, threshold = smallest_units([u[0] for u in units], [u[1] for u in units], count)
        if at_most:
            for mark, (score, size) in zip(marked, units, strict=True):
                if int(size[mark].sum()) > count:
                    mark[score.masked_fill(~mark, -1).argmax()] = False
        removed = {
            name: self.pattern.expand(mark, self.masks[name].shape) & self.masks[name]
            for name, mark in zip(names, marked, strict=True)
        }
        return Removal(removed, threshold)

    def _single(self, names: list[str], count: int) -> Removal:
        first = {}
        for name in names:
            extra = self.pattern.surplus(self.magnitude(name), self.masks[name])
            if extra is not None:
                first[name] = extra
        sizes = sum(int(torch.count_nonzero(extra)) for extra in first.values())
        before = min(count, sizes)
        removed: dict[str, torch.Tensor] = {}
        threshold = 0.0
        if before:
            taken, threshold = self._rank(names, first, before)
            removed = dict(zip(names, taken, strict=True))
        if count > before:
            rest = {n: self.masks[n] & ~removed[n] if removed else self.masks[n] for n in names}
            taken, threshold = self._rank(names, rest, count - before)
            pairs = zip(names, taken, strict=True)
            removed = {n: t | removed[n] if removed else t for n, t in pairs}
        return Removal(removed or {n: torch.zeros_like(self.masks[n]) for n in names}, threshold)

    def _rank(
        self, names: list[str], eligible: Mapping[str, torch.Tensor], count: int
    ) -> tuple[list[torch.Tensor], float]:
        def scores(index: int) -> torch.Tensor:
            name = names[index]
            return self.magnitude(name).masked_fill(~eligible[name], torch.inf)

        return smallest(scores, count, len(names))
