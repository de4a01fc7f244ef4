"""The public estimate: select, solve, fit, and one row per layer."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import OpenTransError
from . import rules, solvers
from .layers import LINEAR_ASPECT, LayerSlices, select
from .options import FitOptions
from .solvers import Spectrum
from .table import AlphaTable, LayerAlpha

__all__ = ["PRECISIONS", "estimate_alpha", "rows_of", "versions"]

PRECISIONS = ("float64", "float32")
_EPS32 = float(np.finfo(np.float32).eps)
_ENTROPY_EPS = 1e-10
#: Float32 results are kept only where eigenvalues are at most this large, see :func:`_unsafe`.
_FLOAT32_LARGEST = 1.0
_FLOAT32_NOISE = 32 * _EPS32


def estimate_alpha(
    source: nn.Module | Mapping[str, torch.Tensor],
    fit: str = "xmin_peak",
    *,
    xmin_pos: float = 2.0,
    bins: int = 100,
    evals_threshold: float = 1e-5,
    conv_norm: float = 0.5,
    match: str = "class_name",
    linear_aspect: float | None = LINEAR_ASPECT,
    precision: str = "float64",
    device: torch.device | str | None = None,
    threads: int | None = None,
    solver: str | None = None,
    keep_spectra: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> AlphaTable:
    """The power-law exponent alpha of every layer's weight spectrum.

    Eigenvalues are the squared singular values of the weight, those of all kernel positions of a
    convolution pooled and multiplied by ``conv_norm``; those above ``evals_threshold`` are fitted.
    Everything is computed in float64 from weights of any floating dtype. See ``docs/spectrum.md``.

    Args:
        source: a network, or weights by name ([O, I] or [O, I, *kernel]).
        fit: ``"xmin_peak"``, ``"xmin_mid"`` or ``"ks"``, the published rules with their quirks;
            ``"xmin_peak_fixed"``, the peak rule with the bound that was meant; ``"weightwatcher"``.
        xmin_pos: ``xmin_mid`` starts at index ``int(N / xmin_pos)``.
        bins: of the histogram in the peak modes.
        match: how modules are chosen, see :func:`~.layers.select`.
        linear_aspect: linear layers of at least this aspect are skipped; None: none is.
        precision: ``"float32"`` solves in float32 where that is safe and redoes the other layers
            in float64; each row says which.
        device: ``"cpu"``, or a CUDA device; None: where the weights are. On CUDA Gram matrices,
            eigenvalues and fit run on the device, in float64 whatever ``precision`` is.
        threads: matrices worked on at once on the CPU, by default ``torch.get_num_threads()``. The
            result is the same bits for any number.
        solver: of eigenvalues on CUDA: ``"cusolver"`` (None: that one; ``XsyevBatched`` up to
            n = 512, ``Xsyevd`` on streams above), ``"xsyev_batched"``, ``"xsyevd"``, or
            ``"sturm"``, own Triton kernels. Each row's ``solver`` names the routine that ran.
        keep_spectra: also return the kept eigenvalues in ``table.spectra``.
        progress: called with (layers done, layers, name).

    Raises:
        UnsupportedModelError: no layer, or a weight without a spectrum (not a matrix, quantised,
            sparse, on meta, NaN or infinite); the layer is named.
        OpenTransError: an unknown ``fit``, ``match``, ``precision`` or ``device``, or an argument
            out of range.
    """
    options = FitOptions(fit, xmin_pos, bins, evals_threshold)
    if precision not in PRECISIONS:
        raise OpenTransError(
            f"precision={precision!r} is not known. Use one of {', '.join(map(repr, PRECISIONS))}."
        )
    if not (isinstance(conv_norm, int | float) and 0 < conv_norm < math.inf):
        raise OpenTransError(f"conv_norm={conv_norm!r} must be a positive number. Use 0.5.")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise OpenTransError(f"threads={threads!r} must be a positive integer, or None.")
    skipped: dict[str, str] = {}
    with torch.no_grad():
        layers = select(
            source, match=match, conv_norm=conv_norm, linear_aspect=linear_aspect, skipped=skipped
        )
        where = _device(layers, device)
        spectra, rows = _solve(
            layers, options, where, precision, threads or torch.get_num_threads(), progress, solver
        )
    kept = {}
    if keep_spectra:
        for layer, spectrum in zip(layers, spectra, strict=True):
            kept[layer.name] = rules.keep(spectrum.values, evals_threshold, fit).values
    parameters = {
        "xmin_pos": xmin_pos,
        "bins": bins,
        "evals_threshold": evals_threshold,
        "conv_norm": conv_norm,
        "match": match,
        "linear_aspect": linear_aspect,
        "precision": precision,
        "device": where.type,
    }
    return AlphaTable(rows, fit, parameters, versions(), skipped, kept)


def _device(layers: Sequence[LayerSlices], device: torch.device | str | None) -> torch.device:
    if device is None:
        found = {layer.weight.device for layer in layers}
        cuda = [one for one in found if one.type == "cuda"]
        return cuda[0] if cuda else torch.device("cpu")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OpenTransError(f"device={device!r} is not a device. Use 'cpu' or 'cuda'.") from error
    if where.type not in ("cpu", "cuda"):
        raise OpenTransError(
            f"device={device!r} has no eigenvalue solver here. Use 'cpu' or 'cuda'."
        )
    return where


def _solve(
    layers: Sequence[LayerSlices],
    options: FitOptions,
    where: torch.device,
    precision: str,
    threads: int,
    progress: Callable[[int, int, str], None] | None,
    solver: str | None = None,
) -> tuple[list[Spectrum], tuple[LayerAlpha, ...]]:
    if where.type == "cuda":
        from .cuda import eigenvalues  # needs a GPU build of torch, so not before it is asked for

        spectra = eigenvalues(
            layers, device=where, options=options, solver=solver, progress=progress
        )
        return spectra, rows_of(layers, spectra, options)
    if solver is not None:
        raise OpenTransError(
            f"solver={solver!r} chooses among the CUDA solvers, but the estimate runs on {where}. "
            "Leave it out, or pass device='cuda'."
        )

    def solve(chosen: Sequence[LayerSlices], kind: str) -> list[Spectrum]:
        return solvers.eigenvalues(
            chosen,
            threshold=options.threshold,
            precision=kind,
            threads=threads,
            progress=progress,
        )

    spectra = solve(layers, precision)
    rows = rows_of(layers, spectra, options)
    if precision == "float64":
        return spectra, rows
    reasons = [_unsafe(x, row, options) for x, row in zip(spectra, rows, strict=True)]
    again = [i for i, reason in enumerate(reasons) if reason]
    if again:
        better = solve([layers[i] for i in again], "float64")
        for i, spectrum in zip(again, better, strict=True):
            words = f"float32, redone in float64: {reasons[i]}"
            spectra[i] = replace(spectrum, precision=words)
        rows = rows_of(layers, spectra, options)
    return spectra, rows


def _unsafe(spectrum: Spectrum, row: LayerAlpha, options: FitOptions) -> str:
    """Why float32 eigenvalues, off by ``32 eps32 * largest``, may change alpha; "" if not."""
    values = spectrum.values
    largest = float(values[-1])
    noise = _FLOAT32_NOISE * largest
    if row.num_evals == 0 or not (values > options.threshold).any():
        return "no eigenvalue above the threshold"
    if ((values - options.threshold).abs() <= noise).any():
        return "an eigenvalue near the threshold"
    if options.fit == "xmin_mid":
        return "" if noise <= 1e-3 * row.xmin else "a start within the rounding of float32"
    if largest > _FLOAT32_LARGEST:
        return "an eigenvalue above 1"
    return row.reason if row.ambiguous else ""


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
    return tuple(
        _row(layer, spectrum, one, fit, crossed, options.fit, note)
        for layer, spectrum, one, fit, crossed, note in zip(
            layers, spectra, kept, fits, crossing, notes, strict=True
        )
    )


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


def versions() -> dict[str, str]:
    """Of the software that computes the numbers."""
    from .. import __version__

    return {
        "opentrans_kernels": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
