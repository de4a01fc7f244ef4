"""FARMS: alpha from sub-matrices of one aspect ratio, because alpha of a matrix depends on its own.

After Hu et al., "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias" (arXiv
2506.06280), as their code for image networks runs with an aspect of 1. What follows it and what is
defined here is in ``docs/spectrum.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .layers import LayerSlices
from .options import FitOptions
from .rows import rows_of, zero_shares
from .rules import keep
from .solvers import Spectrum
from .table import LayerAlpha

__all__ = ["POSITIONS", "WINDOW", "Samples", "farms_rows", "samples_of", "window_starts"]

#: Side of the windows of a linear layer, and how many are laid along each of its sides.
WINDOW, POSITIONS = 100, 9
#: Blocks below this side, and blocks with fewer eigenvalues, have no tail to speak of.
LEAST_SIDE, LEAST_VALUES = 8, 32


@dataclass(frozen=True)
class Samples:
    """The sub-matrices of one layer, without copies.

    Attributes:
        layer: the whole layer.
        groups: matrices whose eigenvalues are pooled and fitted together; alpha is the mean over
            the groups. Empty where the method cannot judge the layer.
        words: what the groups are, or why there is none.
    """

    layer: LayerSlices
    groups: tuple[tuple[LayerSlices, ...], ...]
    words: str


def window_starts(size: int) -> list[int]:
    """Where the windows along a side begin: at most nine, equally far apart.

    The distance is a whole number, so the last ones may end before the side does.
    """
    step = max(1, (size - WINDOW) // (POSITIONS - 1))
    count = min(POSITIONS, max(1, (size - WINDOW) // step + 1))
    return [i * step for i in range(count)]


def samples_of(layer: LayerSlices) -> Samples:
    """How the method cuts a layer.

    A weight with kernel dimensions: every slice, its longer side along the rows, is cut into
    square blocks, the remainder of the rows is dropped, and a group is one block in all slices. A
    linear weight: one group of 100 x 100 windows, up to nine by nine.
    """
    rows, columns = layer.shape[:2]
    if layer.kind == "linear":
        if layer.small < WINDOW:
            return Samples(
                layer, (), f"farms cannot judge it: {rows}x{columns} holds no {WINDOW}x{WINDOW} "
                "window"
            )  # fmt: skip
        pieces = tuple(
            replace(layer, weight=layer.weight[r : r + WINDOW, c : c + WINDOW])
            for r in window_starts(rows)
            for c in window_starts(columns)
        )
        return Samples(layer, (pieces,), f"farms, {_count(len(pieces), 'window')} of {WINDOW}")
    side, count = layer.small, layer.large // layer.small
    what = f"{_count(count, 'block')} of {side}x{side}"
    if side < LEAST_SIDE or side * layer.positions < LEAST_VALUES:
        return Samples(
            layer, (), f"farms cannot judge it: {what} with {side * layer.positions} eigenvalues "
            f"each; from {LEAST_SIDE}x{LEAST_SIDE} and {LEAST_VALUES} on there is a tail"
        )  # fmt: skip
    axis = 0 if rows >= columns else 1
    groups = tuple(
        (replace(layer, weight=layer.weight.narrow(axis, i * side, side)),) for i in range(count)
    )
    return Samples(layer, groups, f"farms, {what}")


def farms_rows(
    samples: Sequence[Samples],
    spectra: Sequence[Spectrum],
    options: FitOptions,
) -> tuple[LayerAlpha, ...]:
    """One row per layer from the eigenvalues of all pieces, in the order of :func:`pieces_of`."""
    left = iter(spectra)
    layers, pools = [], []
    for one in samples:
        for group in one.groups:
            layers.append(group[0] if len(group) == 1 else one.layer)
            pools.append(_pooled([next(left) for _ in group]))
    found = iter(rows_of(layers, pools, options))
    shares = zero_shares([one.layer.weight for one in samples])
    return tuple(
        _mean(one, [next(found) for _ in one.groups], options.fit, zeros)
        for one, zeros in zip(samples, shares, strict=True)
    )


def pieces_of(samples: Sequence[Samples]) -> list[LayerSlices]:
    """All sub-matrices to be solved, layer by layer, group by group."""
    return [piece for one in samples for group in one.groups for piece in group]


def kept_values(
    samples: Sequence[Samples], spectra: Sequence[Spectrum], options: FitOptions
) -> dict[str, torch.Tensor]:
    """Layer -> the kept eigenvalues of all its groups, ascending."""
    left = iter(spectra)
    found = {}
    for one in samples:
        parts = [
            keep(_pooled([next(left) for _ in group]).values, options.threshold, options.fit).values
            for group in one.groups
        ]
        found[one.layer.name] = (
            torch.cat(parts).sort().values if parts else torch.empty(0, dtype=torch.float64)
        )
    return found


def per_layer(
    samples: Sequence[Samples], progress: Callable[[int, int, str], None] | None
) -> Callable[[int, int, str], None] | None:
    """A callback for pieces that tells ``progress`` of whole layers."""
    if progress is None:
        return None
    todo = {one.layer.name: sum(map(len, one.groups)) for one in samples if one.groups}
    total, done = len(todo), 0

    def report(_done: int, _total: int, name: str) -> None:
        nonlocal done
        todo[name] -= 1
        if todo[name] == 0:
            done += 1
            progress(done, total, name)

    return report


def _pooled(spectra: Sequence[Spectrum]) -> Spectrum:
    if len(spectra) == 1:
        return spectra[0]
    values = torch.cat([spectrum.values.cpu() for spectrum in spectra]).sort().values
    return Spectrum(values, spectra[0].solver, spectra[0].precision)


def _mean(one: Samples, rows: Sequence[LayerAlpha], fit: str, zeros: float) -> LayerAlpha:
    """The row of a layer from those of its groups: means, but for counts and the smallest value."""
    layer = one.layer
    if not rows:
        return _without(layer, fit, one.words, zeros)
    undefined = [row for row in rows if not row.defined]
    ambiguous = [row for row in rows if row.ambiguous]
    alpha = math.fsum(row.alpha for row in rows) / len(rows)
    reason = ""
    if undefined:
        alpha = math.nan
        reason = undefined[0].reason
        if len(rows) > 1:
            reason = f"no alpha in {len(undefined)} of {len(rows)} blocks: {reason}"
    elif ambiguous:
        reason = ambiguous[0].reason
        if len(rows) > 1:
            reason = f"{_count(len(ambiguous), 'block')} of {len(rows)}: {reason}"
    else:
        reason = "; ".join(dict.fromkeys(row.reason for row in rows if row.reason))

    def mean(name: str) -> float:
        return sum(getattr(row, name) for row in rows) / len(rows)

    single = len(rows) == 1
    means = ("ks_distance", "xmin", "spectral_norm", "stable_rank", "norm", "alpha_weighted")
    means += ("log_alpha_norm", "entropy")
    values = {name: mean(name) for name in means}
    values["log_norm"] = _log10(values["norm"])
    values["log_spectral_norm"] = _log10(values["spectral_norm"])
    return replace(
        rows[0],
        shape=layer.shape,
        alpha=alpha,
        xmin_index=rows[0].xmin_index if single else -1,
        num_evals=sum(row.num_evals for row in rows),
        num_total=sum(row.num_total for row in rows),
        matrix_rank=sum(row.matrix_rank for row in rows),
        smallest=min(row.smallest for row in rows),
        solver=f"{one.words}: {rows[0].solver}",
        ambiguous=bool(ambiguous) and not undefined,
        reason=reason,
        zeros=zeros,
        **values,
    )


def _without(layer: LayerSlices, fit: str, reason: str, zeros: float) -> LayerAlpha:
    nan = math.nan
    return LayerAlpha(
        layer.name, layer.parameter, layer.part, layer.kind, layer.shape, fit, nan, 1.0, nan, -1,
        0, 0, 0.0, nan, 0.0, nan, nan, nan, nan, 0, nan, nan, layer.params,
        reason=reason, zeros=zeros,
    )  # fmt: skip


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else math.nan


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
