"""The published estimator restated: float32 ``svdvals`` per matrix, one Python loop per candidate.

Written from the description of the method (``docs/spectrum.md``), with the operations its authors
use: about a dozen small torch calls for every candidate. Its alphas are float32 results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

THRESHOLD = 1e-5
BINS = 100


def estimate(weights: Mapping[str, torch.Tensor], fit: str) -> dict[str, float]:
    """name -> alpha of weights [O, I] or [O, I, kh, kw]; ``fit`` is xmin_peak, xmin_mid or ks.

    A layer with one eigenvalue, such as a map's last 1x1, has none and is left out.
    """
    found = {name: layer_alpha(weight, fit) for name, weight in weights.items()}
    return {name: alpha for name, alpha in found.items() if alpha is not None}


def layer_alpha(weight: torch.Tensor, fit: str) -> float | None:
    """Alpha of one layer; None where there is one eigenvalue and nothing to fit."""
    matrix = weight.float()
    if matrix.dim() > 2:
        matrix = matrix.flatten(2).permute(2, 0, 1) * math.sqrt(0.5)
    values = torch.linalg.svdvals(matrix).square().flatten().sort().values
    kept = values[values > THRESHOLD]
    x = kept if len(kept) else values
    logs = torch.log(x)
    count = len(x)
    if count < 2:
        return None
    if fit == "xmin_mid":
        i = int(count / 2)
        n = float(count - i)
        return float(1 + n / (logs[i:].sum() - n * logs[i]))
    low, high = -math.inf, math.inf
    if fit == "xmin_peak":
        h = torch.log10(x)
        counts = torch.histc(h, BINS, min=h.min(), max=h.max())
        edges = torch.linspace(float(h.min()), float(h.max()), BINS + 1)
        x2 = 10 ** edges[counts.argmax()]
        low, high = torch.log10(0.95 * x2), 1.5 * x2
    alphas = torch.zeros(count - 1)
    distances = torch.ones(count - 1)
    for i, start in enumerate(x[:-1]):
        if fit == "xmin_peak" and (start < low or start > high):
            continue
        n = float(count - i)
        alpha = 1 + n / (logs[i:].sum() - n * logs[i])
        alphas[i] = alpha
        if alpha > 1:
            model = 1 - (x[i:] / start) ** (-alpha + 1)
            distances[i] = (model - torch.arange(n) / n).abs().max()
    return float(alphas[distances.argmin()])
