"""From eigenvalues to finished rows, one per layer; the fits of all layers are one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import rules
from .layers import LayerSlices
from .options import FitOptions
from .solvers import Spectrum
from .table import LayerAlpha

__all__ = ["rows_of", "zero_shares"]

_EPS32 = float(np.finfo(np.float32).eps)
_ENTROPY_EPS = 1e-10


def rows_of(
    layers: Sequence[LayerSlices],
    spectra: Sequence[Spectrum],
    options: FitOptions,
    approx: str | Sequence[str] = "",
) -> tuple[LayerAlpha, ...]:
    """One finished row per layer, from all of its eigenvalues; the fits are one call.

    approx: how the eigenvalues were approximated, for all rows or for each.
    """
    kept = [rules.keep(x.values, options.threshold, options.fit) for x in spectra]
    fits = _fits([(x, one.values.numel()) for x, one in zip(spectra, kept, strict=True)], options)
    crossing = _crossings(spectra, kept, fits, options)
    notes = [approx] * len(layers) if isinstance(approx, str) else list(approx)
    shares = zero_shares([layer.weight for layer in layers])
    return tuple(
        _row(layer, spectrum, one, fit, crossed, options.fit, note, zeros)
        for layer, spectrum, one, fit, crossed, note, zeros in zip(
            layers, spectra, kept, fits, crossing, notes, shares, strict=True
        )
    )


def zero_shares(weights: Sequence[torch.Tensor]) -> list[float]:
    """The share of exact zeros of each weight, 0 to 1; one copy from each device."""
    counts = [torch.count_nonzero(weight) for weight in weights]
    found = [0] * len(weights)
    for device in {count.device for count in counts}:
        here = [i for i, count in enumerate(counts) if count.device == device]
        for i, count in zip(here, torch.stack([counts[i] for i in here]).tolist(), strict=True):
            found[i] = weights[i].numel() - count
    return [zeros / weight.numel() for zeros, weight in zip(found, weights, strict=True)]


def _fits(tails: Sequence[tuple[Spectrum, int]], options: FitOptions) -> list[rules.Fit]:
    """Fits of the ``count`` largest eigenvalues: known ones, and one call for the rest."""
    known = [spectrum.known_fit(options, count) for spectrum, count in tails]
    open_tails = [
        spectrum.tail(count)
        for (spectrum, count), row in zip(tails, known, strict=True)
        if row is None
    ]
    rest = iter(
        rules.fit_rows(open_tails, options.fit, xmin_pos=options.xmin_pos, bins=options.bins)
    )
    return [
        next(rest)
        if row is None
        else rules.finished(row, spectrum.values[spectrum.values.numel() - count :], options.fit)
        for (spectrum, count), row in zip(tails, known, strict=True)
    ]


def _crossings(
    spectra: Sequence[Spectrum],
    kept: Sequence[rules.Kept],
    fits: Sequence[rules.Fit],
    options: FitOptions,
) -> list[str]:
    """For each layer: what alpha becomes if eigenvalues near the threshold cross it, or ""."""
    words = [""] * len(kept)
    rows, changed = [], []
    for i, (spectrum, one) in enumerate(zip(spectra, kept, strict=True)):
        count = one.values.numel()
        if one.fewer and count > one.fewer:
            rows.append(i)
            changed.append((spectrum, count - one.fewer))
        if one.more:
            rows.append(i)
            changed.append((spectrum, count + one.more))
    others = _fits(changed, options)
    for i, other in zip(rows, others, strict=True):
        alpha = fits[i].alpha
        if not math.isclose(alpha, other.alpha, rel_tol=rules.AMBIGUOUS_FROM):
            number = kept[i].fewer + kept[i].more
            words[i] = f"{number} eigenvalues near the threshold; without them or with all of "
            words[i] += f"them alpha becomes {other.alpha:.4f}"
    return words


def _row(
    layer: LayerSlices,
    spectrum: Spectrum,
    kept: rules.Kept,
    fit: rules.Fit,
    crossing: str,
    mode: str,
    approx: str,
    zeros: float,
) -> LayerAlpha:
    unstable = "; ".join(filter(None, (kept.unstable, fit.unstable, crossing)))
    return LayerAlpha(
        name=layer.name,
        parameter=layer.parameter,
        part=layer.part,
        kind=layer.kind,
        shape=layer.shape,
        fit=mode,
        alpha=fit.alpha,
        ks_distance=fit.distance,
        xmin=fit.xmin,
        xmin_index=fit.index,
        params=layer.params,
        precision=spectrum.precision,
        solver=spectrum.solver,
        ambiguous=bool(unstable) and not fit.reason,
        reason=fit.reason or unstable,
        approx=approx,
        zeros=zeros,
        **_statistics(spectrum.values.cpu().numpy(), kept.values.cpu().numpy(), layer, fit.alpha),
    )


def _statistics(
    values: np.ndarray, kept: np.ndarray, layer: LayerSlices, alpha: float
) -> dict[str, Any]:
    """The fields of a row that do not depend on the rule of the fit."""
    found: dict[str, Any] = {"num_evals": len(kept), "num_total": len(values)}
    sigma = np.sqrt(values)
    # float32's eps on purpose, and shape[1] whatever the orientation, as the published tools do.
    rank = int((sigma > sigma[-1] * layer.shape[1] * _EPS32).sum()) if len(sigma) else 0
    found["matrix_rank"] = rank
    if len(kept) == 0:
        names = ("spectral_norm", "norm")
        logs = ("log_norm", "log_spectral_norm", "alpha_weighted", "log_alpha_norm")
        undefined = (*logs, "stable_rank", "entropy", "smallest")
        return found | dict.fromkeys(names, 0.0) | dict.fromkeys(undefined, math.nan)
    largest, total = float(kept[-1]), float(kept.sum())
    share = kept / total + _ENTROPY_EPS
    log_largest = math.log10(largest)
    found |= {
        "spectral_norm": largest,
        "norm": total,
        "stable_rank": total / largest,
        "log_norm": math.log10(total),
        "log_spectral_norm": log_largest,
        "alpha_weighted": alpha * log_largest,
        "log_alpha_norm": _log_alpha_norm(kept, alpha),
        "smallest": float(kept[0]),
    }
    ranks = math.log(rank + _ENTROPY_EPS) if rank else math.nan
    found["entropy"] = float(-(share * np.log(share)).sum()) / ranks
    return found


def _log_alpha_norm(kept: np.ndarray, alpha: float) -> float:
    """log10 sum x^alpha, without overflow."""
    if math.isnan(alpha):
        return math.nan
    powers = np.log10(kept)
    if math.isinf(alpha):
        top = float(powers[-1])
        return math.inf if top > 0 else -math.inf if top < 0 else math.log10((powers == 0).sum())
    powers = alpha * powers
    largest = powers.max()
    return float(largest + np.log10((10.0 ** (powers - largest)).sum()))
