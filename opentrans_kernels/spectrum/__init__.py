"""Alpha, the power-law exponent of a layer's weight spectrum: one exact estimate for all layers.

    weights -> layers.select -> solvers.eigenvalues -> rules.fit_rows -> estimate.rows_of -> table

What is computed, down to each quirk, is in ``docs/spectrum.md``.
"""

from .distributed import check_same, estimate_alpha_distributed
from .estimate import PRECISIONS, estimate_alpha, rows_of
from .layers import MATCHES, LayerSlices, select
from .options import FitOptions
from .rules import MODES, Fit, fit_rows, keep
from .solvers import Spectrum, eigenvalues
from .table import AlphaTable, LayerAlpha
from .tracker import AlphaTracker
from .updates import LayerState, TrackerUpdate

__all__ = [
    "MATCHES",
    "MODES",
    "PRECISIONS",
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
    "estimate_alpha_distributed",
    "fit_rows",
    "keep",
    "rows_of",
    "select",
]
