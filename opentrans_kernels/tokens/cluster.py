"""Soft k-means of a token map on a grid of centres, and the weights that lead back.

Liang et al., arXiv 2210.01035: centres start as the average-pooled map; a token joins the centres
within a window around the cell it lies in; weights are exp(-T d) of squared distances d.

Distances are taken without the token's own length, and with the smallest of a row subtracted before
exp: both cancel in a normalised row. So no row vanishes, however large T d is, and nearly equal
tokens far from the origin do not drown in rounding.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .plan import TokenPlan
from .wide import unrounded, wide_type

__all__ = ["Clusters", "candidates", "homes", "pooled"]

#: T of "auto", times the median distance of tokens to their candidates.
AUTO = 8.0
_LEAST = 1e-16  # weight below which a centre has no tokens


def homes(count: int, cells: int) -> torch.Tensor:
    """int64 [count]: the cell, of ``cells``, in which each of ``count`` positions lies."""
    return torch.arange(count) * cells // count


@functools.lru_cache(maxsize=16)
def candidates(size: tuple[int, int], grid: tuple[int, int], window: int) -> torch.Tensor:
    """bool [H W, h w]: whether a token may join a centre, at most (window - 1) / 2 cells away."""
    reach = (window - 1) // 2
    near = [
        (homes(count, cells)[:, None] - torch.arange(cells)[None]).abs() <= reach
        for count, cells in zip(size, grid, strict=True)
    ]
    both = near[0][:, None, :, None] & near[1][None, :, None, :]
    return both.reshape(size[0] * size[1], grid[0] * grid[1])


def pooled(x: torch.Tensor, size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """[B, H W, C] -> [B, h w, C], averages over the cells of the grid."""
    maps = x.transpose(1, 2).unflatten(2, size)
    return F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)


class Clusters:
    """Centres of a token map, and the way back to it.

    x: [B, H W, C], at the point where tokens are reduced. ``centres`` [B, h w, C] has its dtype;
    distances are computed in float32, or in float64 where x has it. Gradients reach x through
    centres and weights.
    """

    def __init__(self, x: torch.Tensor, size: tuple[int, int], plan: TokenPlan) -> None:
        if plan.grid is None:
            raise TypeError("a plan without a grid")
        self.plan, self.size, self.grid = plan, size, plan.grid
        self._weights: torch.Tensor | None = None
        with unrounded(x):
            wide = x.to(wide_type(x))
            # Distances do not change if all points move, and their rounding shrinks.
            origin = wide.detach().mean(1, keepdim=True)
            self._x = wide - origin
            self._c, self._t = self._iterate(self._x)
            self.centres = (self._c + origin).to(x.dtype)

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]

    def _iterate(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c = pooled(x, self.size, self.grid)
        near = candidates(self.size, self.grid, self.plan.window).to(x.device)
        t = self._temperature(x, c, near)
        for _ in range(self.plan.iters):
            a = (-t * _above_least(x, c, ~near)).softmax(-1)
            mass = a.sum(1).unsqueeze(-1)
            # One that nobody joins stays where it is.
            c = torch.where(mass > _LEAST, a.mT @ x / mass.clamp_min(_LEAST), c)
        return c, t

    def _temperature(self, x: torch.Tensor, c: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        """[B, 1, 1], or [1] where it is a number: images do not depend on each other."""
        if self.plan.temperature != "auto":
            return torch.tensor([self.plan.temperature], dtype=x.dtype, device=x.device)
        if x.is_meta:  # a selection by a mask has no shape without data
            return x.new_empty(len(x), 1, 1)
        squares = _partial(x, c) + x.square().sum(-1, keepdim=True)
        median = squares[:, near].median(-1).values.clamp_min(1e-12)  # of equal tokens it is 0
        return (AUTO / median)[:, None, None]

    @property
    def weights(self) -> torch.Tensor:
        """:meth:`make_weights`, made once."""
        if self._weights is None:
            self._weights = self.make_weights()
        return self._weights

    def make_weights(self) -> torch.Tensor:
        """[B, H W, h w]: what a token of the full map takes from each centre."""
        with unrounded(self._x):
            above = _above_least(self._x, self._c)
            k = min(self.plan.k, self.count)
            limit = above.detach().topk(k, largest=False).values[..., -1:]
            raw = (-self._t * above).exp().masked_fill(above > limit, 0.0)
            order = 1 if self.plan.norm == "l1" else 2
            return raw / torch.linalg.vector_norm(raw, order, -1, keepdim=True)

    def expand(self, y: torch.Tensor) -> torch.Tensor:
        """[B, h w, C] -> [B, H W, C]."""
        return self.weights.to(y.dtype) @ y


class Pool:
    """Average-pooled tokens, and bilinear interpolation back: the baseline of the same cost."""

    def __init__(self, x: torch.Tensor, size: tuple[int, int], plan: TokenPlan) -> None:
        if plan.grid is None:
            raise TypeError("a plan without a grid")
        self.size, self.grid = size, plan.grid
        self.centres = pooled(x, size, plan.grid)

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]

    def expand(self, y: torch.Tensor) -> torch.Tensor:
        """[B, h w, C] -> [B, H W, C]."""
        maps = y.transpose(1, 2).unflatten(2, self.grid)
        maps = F.interpolate(maps, self.size, mode="bilinear", align_corners=False)
        return maps.flatten(2).transpose(1, 2)


def _partial(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """[B, n, m]: squared distances of x to c, but for |x|^2."""
    return torch.baddbmm(c.square().sum(-1).unsqueeze(1), x, c.mT, alpha=-2)


def _above_least(
    x: torch.Tensor, c: torch.Tensor, excluded: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, n, m]: squared distances less the smallest of their row; infinite where excluded."""
    squares = _partial(x, c)
    if excluded is not None:
        squares = squares.masked_fill(excluded, torch.inf)
    return squares - squares.detach().amin(-1, keepdim=True)
