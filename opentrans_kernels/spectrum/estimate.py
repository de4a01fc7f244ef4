"""The public estimate: select, solve, fit, and one row per layer."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ..errors import OpenTransError
from ..finite import count_non_finite
from ..masks import MaskSet
from . import farms, rules, solvers
from .layers import LINEAR_ASPECT, LayerSlices, select
from .options import FitOptions
from .rows import rows_of
from .seen import masked_note
from .solvers import Spectrum
from .table import AlphaTable, LayerAlpha

__all__ = ["METHODS", "PRECISIONS", "estimate_alpha", "estimate_alphas", "versions"]

PRECISIONS = ("float64", "float32")
_EPS32 = float(np.finfo(np.float32).eps)
#: Float32 results are kept only where eigenvalues are at most this large, see :func:`_unsafe`.
_FLOAT32_LARGEST = 1.0
_FLOAT32_NOISE = 32 * _EPS32


@dataclass(frozen=True)
class Method:
    """How matrices are made of weights, with its published fit and threshold."""

    fit: str
    threshold: float


METHODS = {"whole": Method("xmin_peak", 1e-5), "farms": Method("xmin_mid", 0.0)}


def estimate_alpha(
    source: nn.Module | Mapping[str, torch.Tensor],
    fit: str | None = None,
    *,
    method: str = "whole",
    weights: str = "dense",
    masks: MaskSet | None = None,
    xmin_pos: float = 2.0,
    bins: int = 100,
    evals_threshold: float | None = None,
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
            None: ``"xmin_peak"``, and ``"xmin_mid"`` with ``method="farms"``, as published.
        method: ``"whole"`` matrices, or ``"farms"``: sub-matrices of one aspect ratio, alpha being
            the mean over them. Layers that are too small for it have no alpha and say so.
        weights: of a source that holds weights beside their masks (as
            ``torch.nn.utils.prune`` leaves it): ``"dense"``, those under the masks, or
            ``"masked"``, what it computes with. Every row counts the exact zeros it saw, and
            ``table.notes`` warns of masked weights.
        masks: measure a copy of the weights with these removed; the source is not changed.
        xmin_pos: ``xmin_mid`` starts at index ``int(N / xmin_pos)``.
        bins: of the histogram in the peak modes.
        evals_threshold: None: 1e-5, and 0 (every positive one) with ``method="farms"``, as
            published.
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
        MaskError: masks that do not fit the weights.
        OpenTransError: an unknown ``fit``, ``method``, ``weights``, ``match``, ``precision`` or
            ``device``, or an argument out of range.
    """
    (table,) = estimate_alphas(
        source, (fit,), method=method, weights=weights, masks=masks, xmin_pos=xmin_pos, bins=bins,
        evals_threshold=evals_threshold, conv_norm=conv_norm, match=match,
        linear_aspect=linear_aspect, precision=precision, device=device, threads=threads,
        solver=solver, keep_spectra=keep_spectra, progress=progress,
    )  # fmt: skip
    return table


def estimate_alphas(
    source: nn.Module | Mapping[str, torch.Tensor],
    fits: Sequence[str | None],
    *,
    method: str = "whole",
    weights: str = "dense",
    masks: MaskSet | None = None,
    xmin_pos: float = 2.0,
    bins: int = 100,
    evals_threshold: float | None = None,
    conv_norm: float = 0.5,
    match: str = "class_name",
    linear_aspect: float | None = LINEAR_ASPECT,
    precision: str = "float64",
    device: torch.device | str | None = None,
    threads: int | None = None,
    solver: str | None = None,
    keep_spectra: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[AlphaTable]:
    """:func:`estimate_alpha` for several fits, one table each; eigenvalues are solved for once."""
    if method not in METHODS:
        raise OpenTransError(
            f"method={method!r} is not known. Use one of {', '.join(map(repr, METHODS))}."
        )
    defaults = METHODS[method]
    threshold = defaults.threshold if evals_threshold is None else evals_threshold
    every = [FitOptions(fit or defaults.fit, xmin_pos, bins, threshold) for fit in fits]
    if precision not in PRECISIONS:
        raise OpenTransError(
            f"precision={precision!r} is not known. Use one of {', '.join(map(repr, PRECISIONS))}."
        )
    if precision != "float64" and method != "whole":
        raise OpenTransError(
            f"precision={precision!r} is for whole matrices. Use float64 with method={method!r}."
        )
    if not (isinstance(conv_norm, int | float) and 0 < conv_norm < math.inf):
        raise OpenTransError(f"conv_norm={conv_norm!r} must be a positive number. Use 0.5.")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise OpenTransError(f"threads={threads!r} must be a positive integer, or None.")
    skipped: dict[str, str] = {}
    notes: list[str] = []
    parameters = {
        "method": method,
        "weights": weights,
        "xmin_pos": xmin_pos,
        "bins": bins,
        "evals_threshold": threshold,
        "conv_norm": conv_norm,
        "match": match,
        "linear_aspect": linear_aspect,
        "precision": precision,
    }
    with torch.no_grad():
        layers = select(
            source, match=match, conv_norm=conv_norm, linear_aspect=linear_aspect, skipped=skipped,
            weights=weights, masks=masks, notes=notes,
        )  # fmt: skip
        where = _device(layers, device)
        parameters["device"] = where.type
        how = _How(where, precision, threads or torch.get_num_threads(), progress, solver)
        found = (_farms if method == "farms" else _whole)(layers, every, how, keep_spectra)
    return [
        AlphaTable(
            rows, options.fit, parameters, versions(), skipped, kept,
            tuple(filter(None, (*notes, masked_note(rows)))),
        )
        for options, (rows, kept) in zip(every, found, strict=True)
    ]  # fmt: skip


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


@dataclass(frozen=True)
class _How:
    """Where and how eigenvalues are solved for; see :func:`estimate_alpha`."""

    where: torch.device
    precision: str
    threads: int
    progress: Callable[[int, int, str], None] | None
    solver: str | None

    def spectra(
        self,
        layers: Sequence[LayerSlices],
        options: FitOptions,
        precision: str = "float64",
        fitted: bool = True,
    ) -> list[Spectrum]:
        """Eigenvalues of all layers; on CUDA fitted on the way unless they are to be pooled."""
        if self.where.type == "cuda":
            from .cuda import eigenvalues  # needs a GPU build of torch, so not before it is used

            return eigenvalues(
                layers, device=self.where, threshold=options.threshold,
                options=options if fitted else None, solver=self.solver, progress=self.progress,
            )  # fmt: skip
        if self.solver is not None:
            raise OpenTransError(
                f"solver={self.solver!r} chooses among the CUDA solvers, but the estimate runs on "
                f"{self.where}. Leave it out, or pass device='cuda'."
            )
        return solvers.eigenvalues(
            layers, threshold=options.threshold, precision=precision, threads=self.threads,
            progress=self.progress,
        )  # fmt: skip


_Found = list[tuple[tuple[LayerAlpha, ...], dict[str, torch.Tensor]]]


def _whole(
    layers: Sequence[LayerSlices], every: Sequence[FitOptions], how: _How, keep_spectra: bool
) -> _Found:
    """For each fit the rows, and the kept eigenvalues if they are wanted."""
    found: _Found = []
    spectra: list[Spectrum] = []
    for options in every:
        if how.where.type == "cuda" or how.precision == "float64":
            spectra = spectra or how.spectra(layers, options)
            rows = rows_of(layers, spectra, options)
        else:
            spectra, rows = _float32(layers, options, how)
        kept = {}
        if keep_spectra:
            for layer, spectrum in zip(layers, spectra, strict=True):
                values = rules.keep(spectrum.values, options.threshold, options.fit).values
                kept[layer.name] = values
        found.append((rows, kept))
    return found


def _farms(
    layers: Sequence[LayerSlices], every: Sequence[FitOptions], how: _How, keep_spectra: bool
) -> _Found:
    """The same for sub-matrices of one aspect."""
    samples = [farms.samples_of(layer) for layer in layers]
    for layer in layers:  # the method reads a part of some weights and nothing of others
        if count_non_finite(layer.weight):
            raise solvers.not_finite(layer.name, layer.weight)
    pieces = farms.pieces_of(samples)
    how = replace(how, progress=farms.per_layer(samples, how.progress))
    spectra = how.spectra(pieces, every[0], fitted=False) if pieces else []
    return [
        (
            farms.farms_rows(samples, spectra, options),
            farms.kept_values(samples, spectra, options) if keep_spectra else {},
        )
        for options in every
    ]


def _float32(
    layers: Sequence[LayerSlices], options: FitOptions, how: _How
) -> tuple[list[Spectrum], tuple[LayerAlpha, ...]]:
    """In float32, and what that may change again in float64."""
    spectra = how.spectra(layers, options, "float32")
    rows = rows_of(layers, spectra, options)
    reasons = [_unsafe(x, row, options) for x, row in zip(spectra, rows, strict=True)]
    again = [i for i, reason in enumerate(reasons) if reason]
    if again:
        better = how.spectra([layers[i] for i in again], options)
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


def versions() -> dict[str, str]:
    """Of the software that computes the numbers."""
    from .. import __version__

    return {
        "opentrans_kernels": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
