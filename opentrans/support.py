"""Which weights of a layer to keep, so that a least squares fit of them errs least.

Magnitude asks each weight alone; inputs are correlated, and what one weight gave its neighbours can
give instead. Minimise ``|X W - Y|^2`` over matrices with ``count`` nonzeros: not convex, and solved
well by the alternating direction method of multipliers, which takes turns between the least squares
solution (dense, one factorisation for all output channels) and the projection onto the ``count``
largest entries, with a penalty that grows while the support settles.

The method: Boyd et al., "Distributed Optimization and Statistical Learning via ADMM", 2011, 9.1;
for pruning layer by layer, with such a growing penalty: Meng et al., "ALPS", arXiv 2406.07831.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_support", "largest"]

PENALTY = 0.1  # of the first turn; the mean square of every scaled input is 1
EVERY = 3  # turns from one look at the support to the next
#: Share of the support that changed since the last look, and what the penalty is multiplied by.
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def best_support(gram: Tensor, right: Tensor, start: Tensor, count: int, turns: int) -> Tensor:
    """The entries to keep, bool ``[C, K]``.

    Args:
        gram: ``X^T X`` of the inputs, ``[C, C]``, positive definite.
        right: ``X^T Y``, ``[C, K]``.
        start: weights ``[C, K]``; the largest of them, in the scale of their inputs, are the first
            guess.
        count: entries to keep, of all ``C * K``.
        turns: at most; fewer where the support no longer changes.

    Each turn is one product ``[C, C] x [C, K]``; about one in three also inverts a ``[C, C]``.
    """
    if count >= start.numel():
        return torch.ones_like(start, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(start, dtype=torch.bool)
    scale = gram.diagonal().sqrt().unsqueeze(1)
    gram, right = gram / (scale * scale.t()), right / scale
    kept = largest(start * scale, count)
    support, before = kept != 0, None
    multiplier, penalty = torch.zeros_like(kept), PENALTY
    inverse: Tensor | None = None
    for turn in range(1, turns + 1):
        if inverse is None:
            held = gram.clone()
            held.diagonal().add_(penalty)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(held))
        whole = inverse @ (right - multiplier + penalty * kept)
        kept = largest(whole + multiplier / penalty, count)
        multiplier += penalty * (whole - kept)
        support = kept != 0
        if turn % EVERY:
            continue
        moved = 1.0 if before is None else int((support != before).sum()) / count
        if not moved:
            break
        before, inverse = support, None
        penalty *= next(factor for least, factor in GROWTH if moved > least)
    return support


def largest(weights: Tensor, count: int) -> Tensor:
    """``weights`` with all but the ``count`` largest set to zero."""
    found = torch.zeros_like(weights)
    places = weights.abs().flatten().topk(count).indices
    found.view(-1)[places] = weights.flatten()[places]
    return found
