"""Reductions that tell every token of the full map which reduced token stands for it.

Merging: Bolya et al., arXiv 2210.09461, section 3. Keeping what the class token attends to: Liang
et al., arXiv 2202.07800, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .wide import unrounded, wide_type

__all__ = ["Composed", "keep_attended", "kept_count", "match", "merge"]


@dataclass
class Composed:
    """int64 [B, N] of the reduced token per token of the full map, built step by step.

    A step may be given as a function: it is then computed when somebody asks for the way back.
    """

    steps: list[Callable[[], torch.Tensor]] = field(default_factory=list)
    _index: torch.Tensor | None = None
    count: int = 0

    def then(self, step: Callable[[], torch.Tensor], count: int) -> None:
        """step: int64 [B, tokens before] -> number of the token after; count: tokens after."""
        self.steps.append(step)
        self.count = count

    @property
    def index(self) -> torch.Tensor:
        for step in self.steps:
            found = step()
            self._index = found if self._index is None else found.gather(1, self._index)
        self.steps.clear()
        if self._index is None:
            raise TypeError("no step was taken")
        return self._index

    def expand(self, y: torch.Tensor) -> torch.Tensor:
        """[B, n, C] -> [B, N, C]."""
        return take(y, self.index)


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index`` [B, n] of x [B, N, C]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def match(metric: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pair even with odd tokens by cosine; the ``r`` most similar pairs are to merge.

    metric: [B, n, d]. Returns int64 (even tokens that stay [B, ceil(n/2) - r] in order, even tokens
    that merge [B, r], the odd ones they merge into [B, r]), numbered among even and odd ones.
    """
    unit = torch.nn.functional.normalize(metric.detach().to(wide_type(metric)), dim=-1)
    scores, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    gone = order[:, :r]
    return order[:, r:].sort(-1).values, gone, partner.gather(1, gone)


def merge(
    x: torch.Tensor, sizes: torch.Tensor, metric: torch.Tensor, r: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge ``r`` pairs, at most half of the tokens, to means weighted by the sizes.

    x: [B, n, C]; sizes: [B, n, 1], how many tokens of the full map each stands for.
    Returns x [B, n - r, C], sizes, and int64 [B, n]: where each token went.
    """
    r = min(r, x.shape[1] // 2)
    if r == 0:
        return x, sizes, torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    stay, gone, partner = match(metric, r)

    def merged(values: torch.Tensor) -> torch.Tensor:
        even, odd = values[:, ::2], values[:, 1::2]
        target = partner.unsqueeze(-1).expand(-1, -1, values.shape[-1])
        return torch.cat([take(even, stay), odd.scatter_add(1, target, take(even, gone))], 1)

    total = merged(sizes)
    evens = x.new_empty((x.shape[0], (x.shape[1] + 1) // 2), dtype=torch.int64)
    first_odd = stay.shape[1]
    evens.scatter_(1, stay, torch.arange(first_odd, device=x.device).expand_as(stay))
    evens.scatter_(1, gone, first_odd + partner)
    where = evens.new_empty(x.shape[:2])
    where[:, ::2] = evens
    where[:, 1::2] = first_odd + torch.arange(x.shape[1] // 2, device=x.device)
    return merged(x * sizes) / total, total, where


def kept_count(n: int, keep: float) -> int:
    """ceil(keep n), for products that rounding put just above a whole number too."""
    return min(n, math.ceil(keep * n - 1e-9))


def keep_attended(
    x: torch.Tensor, attention: torch.Tensor, keep: float
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """Keep the tokens of most attention, in order, and append the fused rest: sum(attention x).

    x: [B, n, C]; attention: [B, n], of the class token. Returns x [B, kept + 1, C] (as it is where
    all are kept) and a function that gives int64 [B, n]: a removed token is stood for by the
    kept one nearest to it. Each image of the batch keeps its own tokens.
    """
    n = x.shape[1]
    kept = kept_count(n, keep)
    if kept == n:
        return x, lambda: torch.arange(n, device=x.device).expand(x.shape[0], n)
    order = attention.argsort(dim=-1, descending=True, stable=True)
    stay, gone = order[:, :kept].sort(-1).values, order[:, kept:]
    rest = take(x, gone)
    fused = (attention.gather(1, gone).unsqueeze(-1) * rest).sum(1, keepdim=True)
    survivors = take(x, stay)

    @torch.no_grad()
    def where() -> torch.Tensor:
        wide = wide_type(x)
        with unrounded(x):
            origin = survivors.to(wide).mean(1, keepdim=True)
            c = survivors.to(wide) - origin
            squares = torch.baddbmm(
                c.square().sum(-1).unsqueeze(1), rest.to(wide) - origin, c.mT, alpha=-2
            )
        found = stay.new_empty((x.shape[0], n))
        found.scatter_(1, stay, torch.arange(kept, device=x.device).expand_as(stay))
        return found.scatter_(1, gone, squares.argmin(-1))

    return torch.cat([survivors, fused], 1), where
