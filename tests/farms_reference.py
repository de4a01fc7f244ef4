"""FARMS written out in plain PyTorch, float64: every slice, every block, every window by loops.

Nothing of the package is used; the fit is that of ``alpha_reference``.
"""

from __future__ import annotations

import math

import alpha_reference
import numpy as np
import torch

WINDOW, POSITIONS = 100, 9


def squares(matrix: torch.Tensor) -> torch.Tensor:
    """Squared singular values; one float64 cannot tell from zero is zero."""
    sigma = torch.linalg.svdvals(matrix)
    sigma[sigma <= sigma.max() * max(matrix.shape) * torch.finfo(torch.float64).eps] = 0
    return sigma.square()


def groups(weight: torch.Tensor) -> list[torch.Tensor]:
    """The pooled eigenvalues that are fitted together, ascending, one tensor per group."""
    weight = weight.double()
    if weight.ndim == 2:
        rows, columns = weight.shape
        found = []
        for r in starts(rows):
            for c in starts(columns):
                found.append(squares(weight[r : r + WINDOW, c : c + WINDOW]))
        return [torch.cat(found).sort().values]
    flat = weight.reshape(*weight.shape[:2], -1)
    slices = [flat[:, :, k] for k in range(flat.shape[2])]
    slices = [one if one.shape[0] >= one.shape[1] else one.T for one in slices]
    rows, columns = slices[0].shape
    result = []
    for block in range(rows // columns):
        values = [
            squares(math.sqrt(0.5) * one[block * columns : (block + 1) * columns]) for one in slices
        ]
        result.append(torch.cat(values).sort().values)
    return result


def starts(size: int) -> list[int]:
    """Nine windows, as far apart as a whole step allows; fewer where the side is short."""
    step = (size - WINDOW) // (POSITIONS - 1)
    step = step if step > 0 else 1
    found = [0]
    while len(found) < POSITIONS and found[-1] + step + WINDOW <= size:
        found.append(found[-1] + step)
    return found


def alpha(
    weight: torch.Tensor, fit: str = "xmin_mid", threshold: float = 0.0
) -> tuple[float, float, int]:
    """(alpha, D, number of kept eigenvalues): means over the groups, and a sum."""
    alphas, distances, counts = [], [], 0
    for values in groups(weight):
        kept = alpha_reference.kept(values.numpy(), threshold)
        found = alpha_reference.fit(kept, fit)
        alphas.append(found[0])
        distances.append(found[1])
        counts += len(kept)
    return float(np.mean(alphas)), float(np.mean(distances)), counts
