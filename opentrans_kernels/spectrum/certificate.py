"""Bounds on alpha after a change of the weights, without solving again; for the fit ``xmin_mid``.

Let W' = W + D, with singular values s of W known. Weyl: every sorted singular value moves by at
most ``||D||_2``. Mirsky: the squares of all moves add up to at most ``||D||_F^2``. Both carry over
to the sorted union of several matrices' values. The peak and ks rules choose their start by a
minimum, which jumps, so no such bound exists for them.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .layers import LayerSlices

__all__ = ["NORM_LEVELS", "UNKNOWN", "alpha_interval", "norm_bound"]

#: Nothing is known: the layer must be solved.
UNKNOWN = (0.0, math.inf)
#: Upper bounds of the spectral norm, cheap ones first.
NORM_LEVELS = ("entries", "schatten4", "schatten8")
_EPS = float(np.finfo(np.float64).eps)
_ROUNDING = 1 + 1e-9  # on sums of up to 10^7 float64 terms
_MOST_STARTS = 512  # more possible numbers of kept eigenvalues than this are given up


def norm_bound(difference: torch.Tensor, level: str) -> float:
    """An upper bound of the largest spectral norm in a stack [k, n, m], n <= m; never below it.

    ``entries``: min of the Frobenius norm and sqrt(largest row sum x largest column sum).
    ``schatten4``, ``schatten8``: (tr (D D^T)^p)^(1/2p) for p = 2 and 4, of one and two matrix
    products, and at most n^(1/4) and n^(1/8) times the norm.
    """
    stack = difference.double()
    if level == "entries":
        frobenius = stack.flatten(1).norm(dim=1)
        size = stack.abs()
        mixed = (size.sum(1).amax(1) * size.sum(2).amax(1)).sqrt()
        return float(torch.minimum(frobenius, mixed).max()) * _ROUNDING
    squares = stack @ stack.transpose(1, 2)
    if level == "schatten8":
        squares = squares @ squares
        return float(squares.flatten(1).norm(dim=1).max()) ** 0.25 * _ROUNDING
    return math.sqrt(float(squares.flatten(1).norm(dim=1).max())) * _ROUNDING


def alpha_interval(
    values: torch.Tensor,
    layer: LayerSlices,
    spectral: float,
    frobenius: float,
    *,
    threshold: float,
    xmin_pos: float = 2.0,
) -> tuple[float, float]:
    """An interval that holds the ``xmin_mid`` alpha of the changed layer.

    Args:
        values: all eigenvalues before the change, float64, ascending, scaled.
        layer: gives the scale and the sizes.
        spectral: at least the spectral norm of the change, of every slice.
        frobenius: at least the Frobenius norm of the change, all slices together.

    Returns (low, high); :data:`UNKNOWN` where nothing can be said, for instance with fewer than
    two eigenvalues surely above the threshold.
    """
    x = values.cpu().numpy()
    if not len(x) or not (math.isfinite(spectral) and math.isfinite(frobenius)):
        return UNKNOWN
    noise = 8 * layer.large * _EPS * float(x[-1])  # of the solver, absolute
    root = np.sqrt(x)
    move, total = spectral * math.sqrt(layer.scale), frobenius * math.sqrt(layer.scale)
    least = np.square(np.maximum(root - move, 0)) - noise
    most = np.square(root + move) + noise
    fewest, highest = int((least > threshold).sum()), int((most > threshold).sum())
    if fewest < 2 or highest - fewest > _MOST_STARTS:
        return UNKNOWN
    low, high = math.inf, 0.0
    sizes = {count - int(count / xmin_pos) for count in range(fewest, highest + 1)}
    for size in sorted(sizes):
        if size < 2:
            return UNKNOWN
        one_low, one_high = _of_tail(
            x[-size:], least[-size:], most[-size:], root[-size:] - move, total, noise, threshold
        )
        low, high = min(low, one_low), max(high, one_high)
    return low * (1 - 1e-9), high * (1 + 1e-9)


def _of_tail(
    x: np.ndarray,
    least: np.ndarray,
    most: np.ndarray,
    lower_root: np.ndarray,
    total: float,
    noise: float,
    threshold: float,
) -> tuple[float, float]:
    """The interval if exactly these eigenvalues are fitted, the first being xmin."""
    size = len(x)
    # What is fitted was kept, so it lies above the threshold whatever the bound says.
    log_least, log_most = np.log(np.maximum(least, threshold)), np.log(most)
    rest = size - 1
    largest = float(log_most[1:].sum() - rest * log_least[0])
    smallest = float(np.maximum(log_least[1:] - log_most[0], 0).sum())
    if lower_root[0] > 0 and x[0] > 2 * noise:
        # d ln x = 2 |d root| / root; Cauchy-Schwarz with Mirsky's sum of squares.
        slack = 2 * total * math.sqrt(float((1 / np.square(lower_root[1:])).sum()))
        slack += float((2 * noise / x[1:]).sum())
        logs = float(np.log(x[1:]).sum())
        largest = min(largest, logs + slack - rest * float(log_least[0]))
        smallest = max(smallest, logs - slack - rest * float(log_most[0]))
    rounding = 4 * _EPS * size * float(np.abs(log_most).max() + np.abs(log_least).max())
    low = 1 + size / (largest + rounding) if largest + rounding > 0 else math.inf
    high = 1 + size / (smallest - rounding) if smallest > 2 * rounding else math.inf
    return low, high
