"""Noise to prove a masked decoder on.

A mask is where a logit is positive. Where one lies within rounding of zero, float32 and float64
differ in a pixel and from there on in everything, the original as much as a replacement: nothing
could be concluded. Here a logit is a factor of the query times a number of the pixel. At full size
these numbers are 1 or -2, so a mean of four, which is what any level sees, is never within 0.25 of
zero; and it changes its sign if pixels are picked or weighted in any other way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["TRIAL_SIZES", "features_of_trial", "levels_of_trial"]

#: Of the levels, the coarsest first; mask features have four times the last.
TRIAL_SIZES = ((2, 3), (4, 6), (8, 12))
BATCH = 2


def levels_of_trial(
    made: torch.Generator, widths: Sequence[int], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Maps ``[B, C, H, W]``, one for each of ``widths``."""
    sizes = [TRIAL_SIZES[index % len(TRIAL_SIZES)] for index in range(len(widths))]
    return [
        torch.randn(BATCH, width, *size, generator=made).to(dtype)
        for width, size in zip(widths, sizes, strict=True)
    ]


def features_of_trial(made: torch.Generator, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Mask features ``[B, C, H, W]``: a direction of the image times a number of the pixel.

    The second image has positive numbers alone: queries of another sign attend to nothing, and so
    to everything.
    """
    size = [4 * side for side in TRIAL_SIZES[-1]]
    numbers = torch.where(torch.rand(BATCH, 1, *size, generator=made) < 0.6, 1.0, -2.0)
    numbers[1] = 1.0
    direction = torch.randn(BATCH, width, 1, 1, generator=made)
    return (numbers * direction).to(dtype)
