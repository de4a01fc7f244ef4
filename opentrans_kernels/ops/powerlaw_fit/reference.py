"""The fit in plain PyTorch: every start against every value, a tile of starts at a time."""

from __future__ import annotations

import torch

__all__ = ["powerlaw_fit"]

_TILE = 1 << 20  # elements of a tile of starts x values


def powerlaw_fit(
    x: torch.Tensor,
    offsets: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    samples: int = 16,
    block: int = 16,
) -> torch.Tensor:
    """See :func:`opentrans_kernels.ops.powerlaw_fit`; ignores ``samples`` and ``block``."""
    out = x.new_empty((offsets.numel() - 1, 3))
    ends, starts, stops = offsets.tolist(), first.tolist(), last.tolist()
    for layer, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        out[layer] = _fit(x[ends[layer] : ends[layer + 1]], start, stop)
    return out


def _fit(x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    if start >= stop:
        return x.new_tensor([-1.0, float("nan"), 1.0])
    count = x.numel()
    logs = x.log()
    remaining = torch.arange(count, 0, -1, dtype=x.dtype, device=x.device)  # n of each start
    # Non-negative terms from the top: sum_j (l_j - l_i) without cancellation.
    sums = torch.zeros_like(logs)
    sums[:-1] = (logs.diff() * remaining[1:]).flip(0).cumsum(0).flip(0)
    ties = sums <= 4 * torch.finfo(x.dtype).eps * remaining * logs.abs().max()
    alpha = torch.where(ties, torch.inf, 1 + remaining / sums)
    distance = torch.where(ties, (remaining - 1) / remaining, torch.inf)
    rows = max(1, _TILE // count)
    for begin in range(start, stop, rows):
        end = min(begin + rows, stop)
        distance[begin:end] = torch.where(
            ties[begin:end],
            distance[begin:end],
            _distances(logs, alpha, remaining, begin, end),
        )
    index = int(distance[start:stop].argmin()) + start
    return torch.stack([x.new_tensor(float(index)), alpha[index], distance[index]])


def _distances(
    logs: torch.Tensor, alpha: torch.Tensor, remaining: torch.Tensor, begin: int, end: int
) -> torch.Tensor:
    """D of the starts ``begin`` to ``end``; NaN where alpha is infinite."""
    tail = logs[begin:]
    steps = tail - logs[begin:end, None]
    model = 1 - torch.exp((1 - alpha[begin:end, None]) * steps)
    positions = torch.arange(tail.numel(), dtype=logs.dtype, device=logs.device)
    offsets = positions - positions[: end - begin, None]
    gaps = (model - offsets / remaining[begin:end, None]).abs()
    return gaps.masked_fill(offsets < 0, 0).amax(1)
