"""What a token reduction does: one frozen record for all methods, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..errors import PlanError

__all__ = ["METHODS", "TokenPlan"]

METHODS = ("cluster", "pool", "tome", "evit", "act")
#: Option -> methods it means something to. Those that are not here belong to all.
_BELONGS = {
    "alpha": ("cluster", "pool", "tome", "act"),
    "grid": ("cluster", "pool"),
    "iters": ("cluster",),
    "window": ("cluster",),
    "temperature": ("cluster",),
    "k": ("cluster",),
    "norm": ("cluster",),
    "r": ("tome",),
    "keep": ("evit",),
    "at": ("evit",),
    "projections": ("act",),
    "cell": ("act",),
    "seed": ("act",),
    "expand": ("cluster", "pool", "tome", "evit"),
    "taps": ("cluster", "pool", "tome", "evit"),
}


@dataclass(frozen=True)
class TokenPlan:
    """How tokens are reduced, and how the full map comes back.

    Args:
        method: "cluster" (soft k-means on a grid, weights to return), "pool" (average pool,
            bilinear back), "tome" (merge ``r`` similar tokens per block), "evit" (keep what the
            class token attends to, fuse the rest), "act" (attention from clusters of queries).
        alpha: blocks that run untouched before the first reduced one; needed for "cluster" and
            "pool", 0 for "tome" and "act" unless given. As many as the model has: no reduction.
        grid: (h, w) of the reduced map. The map's own size: no reduction.
        iters, window: passes of k-means; odd width of the square of centres that a token may join.
        temperature: factor of squared distances in exp(-T d), or "auto": 8 over the median distance
            of an image's tokens to the centres they may join at the start.
        k: centres that a full-size token is made from; ties stay.
        norm: rows of weights sum to one ("l1", for features and logits alike), or have length one
            ("l2": then they sum to 1 ... sqrt(k), only harmless where what is made is normalised
            next, or its largest entry looked for).
        r: tokens merged per block, at most half of them.
        keep: share of tokens kept at each of the blocks ``at`` (0-based; None: after a quarter,
            a half and three quarters of the blocks). 1: no reduction.
        projections, cell, seed: random directions per head, width of a cell along each, and what
            they are drawn from.
        expand: give the full map back after the last block. Without it the caller works on reduced
            tokens, and ``state.expand`` brings what it makes of them to full size.
        taps: blocks (0-based) whose outputs are read from outside, so that they are given at full
            size as well.

    Raises:
        PlanError: a value out of range, or an option of another method.
    """

    method: Literal["cluster", "pool", "tome", "evit", "act"] = "cluster"
    alpha: int | None = None
    grid: tuple[int, int] | None = None
    iters: int = 5
    window: int = 5
    temperature: float | Literal["auto"] = "auto"
    k: int = 20
    norm: Literal["l1", "l2"] = "l1"
    r: int | None = None
    keep: float | None = None
    at: tuple[int, ...] | None = None
    projections: int = 32
    cell: float = 8.0
    seed: int = 0
    expand: bool = True
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PlanError(
                f"TokenPlan: method={self.method!r} is not known. Use one of {', '.join(METHODS)}."
            )
        for one in fields(self):
            where = _BELONGS.get(one.name)
            if where and self.method not in where and getattr(self, one.name) != one.default:
                raise PlanError(
                    f"TokenPlan: {one.name}={getattr(self, one.name)!r} belongs to method "
                    f"{' or '.join(map(repr, where))}, not to {self.method!r}. Leave it out."
                )
        for name in ("grid", "at", "taps"):  # lists, of JSON for instance, are as good
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _whole_numbers(name, value))
        self._check_needed()
        self._check_ranges()

    def _check_needed(self) -> None:
        needed = {"cluster": ("alpha", "grid"), "pool": ("alpha", "grid"), "tome": ("r",)}
        for name in {**needed, "evit": ("keep",)}.get(self.method, ()):
            if getattr(self, name) is None:
                example = {"alpha": "10", "grid": "(28, 28)", "r": "8", "keep": "0.7"}[name]
                raise PlanError(
                    f"TokenPlan: method {self.method!r} needs {name}. Pass for instance "
                    f"{name}={example}."
                )

    def _check_ranges(self) -> None:
        if self.alpha is not None:
            _require(_whole(self.alpha) and self.alpha >= 0, "alpha", self.alpha, "0 or more")
        if self.grid is not None:
            fits = len(self.grid) == 2 and min(self.grid) >= 1
            _require(fits, "grid", self.grid, "two numbers of 1 or more: (height, width)")
        _require(_whole(self.iters) and self.iters >= 0, "iters", self.iters, "0 or more")
        odd = _whole(self.window) and self.window >= 1 and self.window % 2 == 1
        _require(odd, "window", self.window, "an odd number of 1 or more")
        if self.temperature != "auto":
            fits = _number(self.temperature) and self.temperature > 0
            _require(fits, "temperature", self.temperature, "a finite number above 0, or 'auto'")
        _require(_whole(self.k) and self.k >= 1, "k", self.k, "1 or more")
        _require(self.norm in ("l1", "l2"), "norm", self.norm, "'l1' or 'l2'")
        if self.r is not None:
            _require(_whole(self.r) and self.r >= 0, "r", self.r, "0 or more")
        if self.keep is not None:
            fits = _number(self.keep) and 0 < self.keep <= 1
            _require(fits, "keep", self.keep, "above 0 and at most 1")
        if self.at is not None:
            fits = bool(self.at) and min(self.at) >= 0 and len(set(self.at)) == len(self.at)
            _require(fits, "at", self.at, "different block numbers of 0 or more")
        fits = _whole(self.projections) and self.projections >= 1
        _require(fits, "projections", self.projections, "1 or more")
        _require(_number(self.cell) and self.cell > 0, "cell", self.cell, "a number above 0")
        fits = _whole(self.seed) and 0 <= self.seed < 2**63
        _require(fits, "seed", self.seed, "a whole number from 0 to 2^63 - 1")
        _require(isinstance(self.expand, bool), "expand", self.expand, "True or False")
        _require(all(one >= 0 for one in self.taps), "taps", self.taps, "0 or more each")

    def blocks(self, depth: int) -> tuple[int, ...]:
        """0-based blocks of ``depth`` that compute something else: the last ones, from the first
        that reduces; () where nothing is reduced.

        Raises:
            PlanError: a block that the model does not have.
        """
        if self.alpha is not None and self.alpha > depth:
            raise PlanError(
                f"TokenPlan: alpha={self.alpha} blocks are to run before the reduction, but the "
                f"model has {depth}. Use at most {depth}; {depth} means no reduction."
            )
        for name, numbers in (("at", self.at or ()), ("taps", self.taps)):
            if beyond := [one for one in numbers if one >= depth]:
                raise PlanError(
                    f"TokenPlan: {name} names block {beyond[0]}, but the model has {depth} blocks, "
                    f"numbered from 0. Use at most {depth - 1}."
                )
        if self.method == "evit":
            first = depth if self.keep == 1 else min(self.stages(depth), default=depth)
        elif self.method == "tome" and self.r == 0:
            first = depth
        else:
            first = self.alpha or 0
        return tuple(range(first, depth))

    def stages(self, depth: int) -> tuple[int, ...]:
        """0-based blocks in which "evit" removes tokens."""
        if self.at is not None:
            return tuple(sorted(self.at))
        return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str) and all(map(_whole, value)):
        return tuple(value)
    raise PlanError(f"TokenPlan: {name}={value!r} must be whole numbers, such as (28, 28).")


def _require(fits: bool, name: str, value: Any, what: str) -> None:
    if not fits:
        raise PlanError(f"TokenPlan: {name}={value!r} must be {what}.")
