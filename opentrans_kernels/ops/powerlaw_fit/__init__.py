"""``powerlaw_fit``: power-law exponents of many spectra, each with the best start of its tail.

For a start ``i`` of ascending values ``x_i <= .. <= x_{N-1}``, with ``n = N - i``:

    alpha_i = 1 + n / sum_{j >= i} ln(x_j / x_i)
    D_i     = max_{j >= i} | 1 - (x_j / x_i)^(1 - alpha_i) - (j - i) / n |

``alpha_i`` is the maximum-likelihood exponent, ``D_i`` the Kolmogorov-Smirnov distance to the
one-sided empirical distribution. The op returns the start with the smallest ``D`` of a window of
starts. A sum within ``4 eps n max|ln x|`` of zero is a tie: ``alpha = inf, D = (n - 1) / n``.
"""

from __future__ import annotations

import torch

from ...errors import OpenTransError
from ..library import define, kernel_for

__all__ = ["powerlaw_fit"]


def _fake(x, offsets, first, last, samples: int = 16, block: int = 16) -> torch.Tensor:
    return x.new_empty((offsets.shape[0] - 1, 3))


OP = define(
    "powerlaw_fit",
    "(Tensor x, Tensor offsets, Tensor first, Tensor last, int samples=16, int block=16) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:powerlaw_fit",
)


def powerlaw_fit(
    x: torch.Tensor,
    offsets: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    samples: int = 16,
    block: int = 16,
) -> torch.Tensor:
    """Fit ``L`` spectra in one call. Not differentiable.

    Args:
        x: float64 [total], positive and finite, ascending inside each spectrum.
        offsets: int64 [L + 1], from 0 to ``total``; spectrum ``s`` is
            ``x[offsets[s] : offsets[s + 1]]``.
        first, last: int64 [L], the window ``first <= i < last`` of starts of each spectrum.
        samples, block: of the compiled kernel's pruning. They change the time and never the
            result; ``samples=0`` scans every start in full.

    Returns:
        float64 [L, 3]: start index, alpha, D. An empty window gives -1, NaN, 1. Of equal
        distances the smallest index is taken.

    Raises:
        KernelUnavailable: no kernel for this device and dtype.
        OpenTransError: ``offsets``, ``first`` and ``last`` do not fit ``x`` and each other.
    """
    run = kernel_for("powerlaw_fit", x)
    layers = offsets.numel() - 1
    if x.dim() != 1 or layers < 0 or first.shape != (layers,) or last.shape != (layers,):
        raise OpenTransError(
            f"powerlaw_fit: x {tuple(x.shape)}, offsets {tuple(offsets.shape)}, first "
            f"{tuple(first.shape)} and last {tuple(last.shape)} do not fit. For L spectra pass "
            "their concatenation, L + 1 offsets and L entries of both others."
        )
    return run(x, offsets, first, last, samples, block)
