"""How eigenvalues become alphas: what the estimate and its CUDA counterpart are both given."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import OpenTransError
from .rules import check_fit

__all__ = ["FitOptions"]


@dataclass(frozen=True)
class FitOptions:
    """What turns eigenvalues into alphas; checked when made.

    Attributes:
        fit: a key of :data:`~.rules.MODES`.
        xmin_pos, bins, threshold: see :func:`~.estimate.estimate_alpha`.

    Raises:
        OpenTransError: unknown mode, or an argument out of range.
    """

    fit: str = "xmin_peak"
    xmin_pos: float = 2.0
    bins: int = 100
    threshold: float = 1e-5

    def __post_init__(self) -> None:
        check_fit(self.fit, self.xmin_pos, self.bins)
        if not 0 <= self.threshold < math.inf:
            raise OpenTransError(
                f"evals_threshold={self.threshold!r} must be a number >= 0. The published one is "
                "1e-5; 0 keeps every positive eigenvalue."
            )
