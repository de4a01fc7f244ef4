"""Soft k-means of a token map on a grid of centres, and the weights that lead back.

Liang et al., arXiv 2210.01035: centres start as the average-pooled map; a token joins the centres
within a window around the cell it lies in; weights are exp(-T d) of squared distances d.

Tokens whose cells lie in the same rows of the grid are neighbours in memory, and so are the centres
that they may join. Where no gradient is wanted, each such band meets its own centres alone: of a
40x40 map and a 28x28 grid that is a fifth of the distances.

Distances are taken without the token's own length, and with the smallest of a row subtracted before
exp: both cancel in a normalised row. So no row vanishes, however large T d is, and nearly equal
tokens far from the origin do not drown in rounding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .plan import TokenPlan
from .wide import unrounded, wide_type

__all__ = ["Band", "Clusters", "bands", "candidates", "homes", "pooled"]

#: T of "auto", times the median distance of tokens to their candidates.
AUTO = 8.0
#: Rows of the grid in a band: fewer have less to do, more are quicker at it.
ROWS = 2
_LEAST = 1e-16  # weight below which a centre has no tokens


def homes(count: int, cells: int) -> torch.Tensor:
    """int64 [count]: the cell, of ``cells``, in which each of ``count`` positions lies."""
    return torch.arange(count, device="cpu") * cells // count


@functools.lru_cache(maxsize=16)
def candidates(size: tuple[int, int], grid: tuple[int, int], window: int) -> torch.Tensor:
    """bool [H W, h w]: whether a token may join a centre, at most (window - 1) / 2 cells away."""
    reach = (window - 1) // 2
    near = [
        (homes(count, cells)[:, None] - torch.arange(cells, device="cpu")[None]).abs() <= reach
        for count, cells in zip(size, grid, strict=True)
    ]
    both = near[0][:, None, :, None] & near[1][None, :, None, :]
    return both.reshape(size[0] * size[1], grid[0] * grid[1])


@functools.lru_cache(maxsize=16)
def averages(count: int, cells: int) -> torch.Tensor:
    """float64 [cells, count]: the mean of the positions that each cell touches."""
    with torch.inference_mode(False):  # it is kept, for calls that want gradients as well
        found = torch.zeros(cells, count, dtype=torch.float64, device="cpu")
        for cell in range(cells):
            first, end = cell * count // cells, -(-(cell + 1) * count // cells)
            found[cell, first:end] = 1 / (end - first)
    return found


@dataclass(frozen=True)
class Band:
    """Tokens that lie in ``ROWS`` rows of cells, the centres that any of them may join, and which
    pairs are excluded: bool [tokens, centres]."""

    tokens: slice
    centres: slice
    excluded: torch.Tensor


@functools.lru_cache(maxsize=16)
def bands(size: tuple[int, int], grid: tuple[int, int], window: int) -> tuple[Band, ...]:
    """From top to bottom; together they hold every token once, and all pairs that may join."""
    reach, near = (window - 1) // 2, candidates(size, grid, window)
    ends = [-(-row * size[0] // grid[0]) * size[1] for row in range(grid[0] + 1)]
    found = []
    for row in range(0, grid[0], ROWS):
        last = min(grid[0], row + ROWS)
        tokens = slice(ends[row], ends[last])
        rows = max(0, row - reach), min(grid[0], last + reach)
        centres = slice(rows[0] * grid[1], rows[1] * grid[1])
        found.append(Band(tokens, centres, ~near[tokens, centres]))
    return tuple(found)


def pooled(x: torch.Tensor, size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """[B, H W, C] -> [B, h w, C], averages over the cells of the grid.

    Those of ``adaptive_avg_pool2d``, whose loop over channels that lie side by side takes five
    times as long as two products.
    """
    with unrounded(x):
        wide = x.to(wide_type(x))
        rows, columns = (averages(n, m).to(wide) for n, m in zip(size, grid, strict=True))
        maps = (rows @ wide.unflatten(1, size).flatten(2)).unflatten(2, (size[1], -1))
        return (columns @ maps).flatten(1, 2).to(x.dtype)


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
        shape = (self.size, self.grid, self.plan.window)
        # One product of all is what a graph is short with, and what a GPU likes.
        whole = x.device.type != "cpu" or torch.compiler.is_compiling()
        if whole or (torch.is_grad_enabled() and x.requires_grad):
            excluded = ~candidates(*shape).to(x.device)
            parts = (Band(slice(None), slice(None), excluded),)
        else:
            parts = bands(*shape)
        t = self._temperature(x, c, parts)
        for _ in range(self.plan.iters):
            sums, mass = _joined(x, c, t, parts)
            # One that nobody joins stays where it is.
            c = torch.where(mass > _LEAST, sums / mass.clamp_min(_LEAST), c)
        return c, t

    def _temperature(
        self, x: torch.Tensor, c: torch.Tensor, parts: tuple[Band, ...]
    ) -> torch.Tensor:
        """[B, 1, 1], or [1] where it is a number: images do not depend on each other."""
        if self.plan.temperature != "auto":
            return torch.tensor([self.plan.temperature], dtype=x.dtype, device=x.device)
        if x.is_meta:  # a selection by a mask has no shape without data
            return x.new_empty(len(x), 1, 1)
        found = []
        for part in parts:
            here = x[:, part.tokens]
            squares = _partial(here, c[:, part.centres]) + here.square().sum(-1, keepdim=True)
            found.append(squares[:, ~part.excluded])
        median = torch.cat(found, 1).median(-1).values.clamp_min(1e-12)  # of equal tokens it is 0
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


def _joined(
    x: torch.Tensor, c: torch.Tensor, t: torch.Tensor, parts: tuple[Band, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the tokens that join each centre, [B, m, C], and of their weights, [B, m, 1]."""
    if len(parts) == 1:
        a = _shares(x, c, t, parts[0])
        return a.mT @ x, a.sum(1).unsqueeze(-1)
    sums, mass = torch.zeros_like(c), c.new_zeros(*c.shape[:2], 1)
    for part in parts:
        a = _shares(x, c, t, part)
        sums[:, part.centres].baddbmm_(a.mT, x[:, part.tokens])
        mass[:, part.centres] += a.sum(1).unsqueeze(-1)
    return sums, mass


def _shares(x: torch.Tensor, c: torch.Tensor, t: torch.Tensor, part: Band) -> torch.Tensor:
    """[B, tokens, centres]: how much of a token joins each centre; rows sum to one."""
    above = _above_least(x[:, part.tokens], c[:, part.centres], part.excluded)
    return (-t * above).softmax(-1)


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
