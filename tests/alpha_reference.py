"""Alpha written out in plain NumPy, float64, one loop per candidate: the definition as a program.

Nothing of the package is used. Singular values come from ``numpy.linalg.svd`` of each matrix, the
exponent of every start from its own sum, the distance from its own arrays.
"""

from __future__ import annotations

import math

import numpy as np

EPS = np.finfo(np.float64).eps


def layers_of(name: str, weight: np.ndarray, linear: bool) -> list[tuple[str, np.ndarray]]:
    """(name, weight) of the measured layers: none, one, or the thirds of a fused projection."""
    m, n = weight.shape[:2]
    if linear and max(m, n) / min(m, n) >= 8:
        return []
    if weight.ndim == 2 and ("attn" in name or "attention" in name):
        if m == n // 3:
            parts = weight[:, :m], weight[:, m : 2 * m], weight[:, 2 * m :]
            return [(f"{name}_{key}", part) for key, part in zip("qkv", parts, strict=True)]
        if n == m // 3:
            parts = weight[:n], weight[n : 2 * n], weight[2 * n :]
            return [(f"{name}_{key}", part) for key, part in zip("qkv", parts, strict=True)]
    return [(name, weight)]


def eigenvalues(weight: np.ndarray, conv_norm: float = 0.5) -> np.ndarray:
    """All eigenvalues, ascending; a value float64 cannot tell from zero is zero."""
    weight = np.asarray(weight, np.float64)
    pooled = []
    if weight.ndim == 2:
        matrices, factor = [weight], 1.0
    else:
        flat = weight.reshape(weight.shape[0], weight.shape[1], -1)
        matrices = [flat[:, :, k] for k in range(flat.shape[2])]
        factor = conv_norm
    for matrix in matrices:
        sigma = np.linalg.svd(matrix, compute_uv=False)
        sigma[sigma <= sigma.max() * max(matrix.shape) * EPS] = 0.0
        pooled.append(factor * sigma**2)
    return np.sort(np.concatenate(pooled))


def kept(values: np.ndarray, threshold: float = 1e-5, fallback: bool = True) -> np.ndarray:
    """Those above the threshold; without any, all that are not zero."""
    above = values[values > threshold]
    return values[values > 0] if len(above) == 0 and fallback else above


def start_at(x: np.ndarray, i: int, bias: int = 0) -> tuple[float, float]:
    """(alpha, D) of the tail that starts at index i; ``bias`` 1 uses n - 1 for n."""
    tail = x[i:]
    n = len(tail)
    logs = np.log(tail)
    denominator = math.fsum(logs - logs[0])
    if denominator <= 4 * EPS * n * np.abs(np.log(x)).max():
        return math.inf, (n - 1) / n
    alpha = 1 + (n - bias) / denominator
    model = 1 - (tail / tail[0]) ** (1 - alpha)
    return alpha, float(np.max(np.abs(model - np.arange(n) / n)))


def best(x: np.ndarray, candidates, bias: int = 0) -> tuple[float, float, int]:
    """(alpha, D, index) of the candidate with the smallest D, the first of equals."""
    found = (math.nan, 1.0, -1)
    lowest = math.inf
    for i in candidates:
        alpha, distance = start_at(x, i, bias)
        if distance < lowest:
            lowest = distance
            found = (alpha, distance, i)
    return found


def peak(x: np.ndarray, bins: int = 100) -> float:
    """Left edge of the fullest bin of log10 x, as an eigenvalue."""
    h = np.log10(x)
    low, high = h[0], h[-1]
    if x[0] == x[-1]:
        return float(x[0])
    counts = [0] * bins
    for value in h:
        counts[min(int((value - low) * bins / (high - low)), bins - 1)] += 1
    return float(10 ** (low + (high - low) * counts.index(max(counts)) / bins))


def fit(x: np.ndarray, mode: str, xmin_pos: float = 2.0, bins: int = 100):
    """(alpha, D, index) of ascending kept eigenvalues."""
    count = len(x)
    if mode == "weightwatcher" and count < 20:
        if count < 2:
            return -1.0, -1.0, -1
        starts = [i for i in range(count - 1) if count - i >= 8] or [0]
        starts = [i for i in starts if np.log(x[i:] / x[i]).sum() > 1e-12]
        return best(x, starts, bias=1) if starts else (0.0, 1.0, 0)
    if count == 0:
        return math.nan, 1.0, -1
    if mode == "xmin_mid":
        i = int(count / xmin_pos)
        return (*start_at(x, i), i)
    if count == 1:
        return math.nan, 1.0, -1
    if mode in ("ks", "weightwatcher"):
        return best(x, range(count - 1))
    edge = peak(x, bins)
    lower = math.log10(0.95 * edge) if mode == "xmin_peak" else 0.95 * edge
    window = [i for i in range(count - 1) if lower <= x[i] <= 1.5 * edge]
    if not window:
        return (0.0, 1.0, 0) if mode == "xmin_peak" else (math.nan, 1.0, -1)
    return best(x, window)


def estimate(weights: dict[str, np.ndarray], mode: str) -> dict[str, tuple[float, float, int, int]]:
    """name -> (alpha, D, index, number of kept eigenvalues) of a mapping of weights."""
    table = {}
    for name, weight in weights.items():
        for part, matrix in layers_of(name, weight, weight.ndim == 2):
            x = kept(eigenvalues(matrix), fallback=mode != "weightwatcher")
            table[part] = (*fit(x, mode), len(x))
    return table
