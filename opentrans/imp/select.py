"""The k smallest of many scores, exactly, without joining or sorting the weights.

Non-negative float32 numbers are ordered as their bit patterns are. One pass counts the upper 16
bits of every score, a second the lower 16 bits of those that share the upper half of the k-th: then
the k-th smallest score is known exactly. Memory beyond the scores of one tensor is two histograms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

Scores = Callable[[int], torch.Tensor]


def smallest(scores: Scores, count: int, tensors: int) -> tuple[list[torch.Tensor], float]:
    """Marks the ``count`` smallest scores over several tensors.

    Args:
        scores: index of a tensor -> its scores, float32 of any shape, non-negative, ``inf`` where
            nothing may be taken. Called up to three times per index and must give the same values.
        count: how many; the caller makes sure that so many scores are finite.
        tensors: number of tensors.

    Returns:
        Per tensor a bool tensor of its shape with exactly ``count`` True over all, and the largest
        score taken (0.0 for count 0). Equal scores are taken by (tensor, position), first first.
    """
    if count == 0:
        return [torch.zeros_like(scores(i), dtype=torch.bool) for i in range(tensors)], 0.0
    upper, before = _find(lambda i: _bits(scores(i)) >> 16, count, tensors, 1 << 15)
    rank = count - before

    def lower_half(index: int) -> torch.Tensor:
        bits = _bits(scores(index))
        return bits[(bits >> 16) == upper] & 0xFFFF

    lower, below = _find(lower_half, rank, tensors, 1 << 16)
    last, ties = (upper << 16) | lower, rank - below
    taken = []
    for index in range(tensors):
        values = scores(index)
        bits = _bits(values)
        marked = bits < last
        if ties:
            equal = torch.nonzero(bits == last).flatten()[:ties]
            marked[equal] = True
            ties -= equal.numel()
        taken.append(marked.view(values.shape))
    return taken, torch.tensor(last, dtype=torch.int32).view(torch.float32).item()


def _bits(scores: torch.Tensor) -> torch.Tensor:
    return scores.contiguous().view(torch.int32).flatten()


def _find(values: Scores, rank: int, tensors: int, bins: int) -> tuple[int, int]:
    """(the ``rank``-th smallest integer over all tensors, how many are smaller); rank from 1."""
    histogram = torch.zeros(bins, dtype=torch.int64)
    for index in range(tensors):
        histogram += torch.bincount(values(index), minlength=bins).cpu()
    sums = histogram.cumsum(0)
    found = int(torch.searchsorted(sums, rank))
    return found, int(sums[found] - histogram[found])


def smallest_units(
    scores: Sequence[torch.Tensor], sizes: Sequence[torch.Tensor], count: int
) -> tuple[list[torch.Tensor], float]:
    """Marks the units of smallest score until they hold at least ``count`` weights.

    Args:
        scores: per tensor float32 [units], ``inf`` where nothing may be taken.
        sizes: per tensor int64 [units], the weights each unit holds.
        count: weights to take.

    Returns:
        Per tensor bool [units]; the largest score taken (0.0 if none). Equal scores are taken by
        (tensor, position). Without its last unit the choice would hold fewer than ``count``.
    """
    lengths = [s.numel() for s in scores]
    if count <= 0 or not sum(lengths):
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores], 0.0
    joined = torch.cat([s.flatten().cpu() for s in scores])
    order = torch.argsort(joined, stable=True)
    held = torch.cat([s.flatten().cpu() for s in sizes])[order].cumsum(0)
    finite = int(torch.isfinite(joined).sum())
    last = min(int(torch.searchsorted(held, count)) + 1, finite)
    marked = torch.zeros(joined.numel(), dtype=torch.bool)
    marked[order[:last]] = True
    threshold = float(joined[order[last - 1]]) if last else 0.0
    parts = torch.split(marked, lengths)
    return [p.to(s.device) for p, s in zip(parts, scores, strict=True)], threshold


def shares(count: int, weights: Sequence[int]) -> list[int]:
    """``count`` split in proportion to ``weights``, whole numbers, none above its weight.

    Largest remainder first, equal ones by position. ``count`` is at most the sum of the weights.
    """
    total = sum(weights)
    if total == 0:
        return [0] * len(weights)
    exact = [count * w / total for w in weights]
    parts = [math.floor(e) for e in exact]
    order = sorted(range(len(weights)), key=lambda i: (parts[i] - exact[i], i))
    missing = count - sum(parts)
    for index in order:
        if missing and parts[index] < weights[index]:
            parts[index] += 1
            missing -= 1
    return parts
