"""How much two answers agree: the pruned network's and the dense one's, on the same photograph."""

from __future__ import annotations

import torch

__all__ = ["cosine", "f_score", "mean_absolute_error"]

THRESHOLDS = tuple(i / 20 for i in range(1, 20))


def f_score(found: torch.Tensor, reference: torch.Tensor, at: float = 0.5) -> float:
    """F-measure (harmonic mean of precision and recall) of ``found`` above its best threshold.

    Both are maps of probabilities of one shape; the truth is where ``reference`` exceeds ``at``.
    The threshold is the best of 0.05, 0.10, ... 0.95. 1.0 if neither has a pixel.
    """
    truth = reference > at
    wanted = int(truth.sum())
    best = 0.0
    for threshold in THRESHOLDS:
        picked = found > threshold
        count = int(picked.sum()) + wanted
        best = max(best, 2 * int((picked & truth).sum()) / count if count else 1.0)
    return best


def mean_absolute_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean of the absolute differences."""
    return float((found.double() - reference.double()).abs().mean())


def cosine(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean cosine between the rows of two matrices [N, C]."""
    return float(torch.nn.functional.cosine_similarity(found, reference, dim=1).mean())
