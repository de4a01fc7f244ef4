"""Alpha, the power-law exponent of a layer's weight spectrum: one exact estimate for all layers.

    weights -> layers.select -> solvers.eigenvalues -> rules.fit_rows -> rows.rows_of -> table

What is computed, down to each quirk, is in ``docs/spectrum.md``.
"""

from .distributed import check_same, estimate_alpha_distributed
from .estimate import METHODS, PRECISIONS, estimate_alpha, estimate_alphas
from .layers import MATCHES, LayerSlices, select
from .options import FitOptions
from .rows import rows_of, zero_shares
from .rules import MODES, Fit, fit_rows, keep
from .seen import WEIGHTS, masked_note, zeros_note
from .solvers import Spectrum, eigenvalues
from .table import MASKED_SHARE, AlphaTable, LayerAlpha
from .tracker import AlphaTracker
from .updates import LayerState, TrackerUpdate

__all__ = [
    "MASKED_SHARE",
    "MATCHES",
    "METHODS",
    "MODES",
    "PRECISIONS",
    "WEIGHTS",
    "AlphaTable",
    "AlphaTracker",
    "Fit",
    "FitOptions",
    "LayerAlpha",
    "LayerSlices",
    "LayerState",
    "Spectrum",
    "TrackerUpdate",
    "check_same",
    "eigenvalues",
    "estimate_alpha",
    "estimate_alphas",
    "estimate_alpha_distributed",
    "fit_rows",
    "keep",
    "masked_note",
    "rows_of",
    "select",
    "zero_shares",
    "zeros_note",
]
