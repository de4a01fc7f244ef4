"""Attention from clusters of queries. Zheng et al., arXiv 2011.09315, sections 3.2 and 3.3.

Queries whose every code floor((v w + b) / cell) agrees form a cluster; its mean attends to all
keys, and every member takes the answer. Projections come from a seed, so a model gives the same
result for the same image, and all heads of all images are computed together.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .wide import unrounded, wide_type

__all__ = ["clustered_attention", "query_clusters"]


@functools.lru_cache(maxsize=16)
def _projections(
    heads: int, width: int, count: int, cell: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 directions [heads, width, count] and offsets [heads, 1, count]."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(heads, width, count, generator=random, dtype=torch.float64)
    return directions, cell * torch.rand(heads, 1, count, generator=random, dtype=torch.float64)


def query_clusters(
    q: torch.Tensor, *, projections: int, cell: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters of queries [B, heads, n, d], per image and head.

    Returns int64 [B, heads, n], each query's cluster from 0, and [B, heads], how many there are.
    """
    b, heads, n, width = q.shape
    wide = wide_type(q)
    directions, offsets = _projections(heads, width, projections, cell, seed)
    with unrounded(q):
        along = q.detach().to(wide) @ directions.to(q.device, wide) + offsets.to(q.device, wide)
        codes = (along / cell).floor().long().flatten(0, 2)
    owner = torch.arange(b * heads, device=q.device).repeat_interleave(n)
    # Sorted by owner first, so clusters of one head lie together.
    rows, number = torch.unique(
        torch.cat([owner.unsqueeze(1), codes], 1), dim=0, return_inverse=True
    )
    counts = torch.bincount(rows[:, 0], minlength=b * heads)
    number = number - (counts.cumsum(0) - counts)[owner]
    return number.view(b, heads, n), counts.view(b, heads)


def clustered_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    prefix: int,
    scale: float,
    projections: int,
    cell: float,
    seed: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention [B, heads, n, d] in which all but the first ``prefix`` queries go by clusters."""
    if q.is_meta:  # how many clusters there are depends on the data, shapes do not
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    own, rest = q[:, :, :prefix], q[:, :, prefix:]
    number, counts = query_clusters(rest, projections=projections, cell=cell, seed=seed)
    most = int(counts.max())
    index = number.unsqueeze(-1).expand_as(rest)
    shape = (*rest.shape[:2], most, rest.shape[-1])
    sums = rest.new_zeros(shape).scatter_add(2, index, rest)
    members = rest.new_zeros((*shape[:3], 1)).scatter_add(
        2, number.unsqueeze(-1), torch.ones_like(rest[..., :1])
    )
    means = sums / members.clamp_min(1)
    queries = torch.cat([own, means], 2)
    out = F.scaled_dot_product_attention(queries, k, v, dropout_p=dropout, scale=scale)
    return torch.cat([out[:, :, :prefix], out[:, :, prefix:].gather(2, index)], 2)
