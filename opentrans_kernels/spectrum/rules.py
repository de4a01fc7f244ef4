"""From sorted eigenvalues to alpha: the threshold, the modes, and what is defined at their edges.

Everything below runs on the device of the eigenvalues; only :class:`Fit` is plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import OpenTransError
from ..ops import powerlaw_fit

__all__ = [
    "AMBIGUOUS_FROM",
    "MODES",
    "Fit",
    "Kept",
    "Mode",
    "check_fit",
    "finished",
    "fit_padded",
    "fit_rows",
    "keep",
]

#: The published tools take singular values in float32, off by up to about eps32 * the largest: an
#: eigenvalue x is then off by twice eps32 * sqrt(x * largest), and may lie on either side of what
#: is closer than that, or than this many bins of a histogram.
_FLOAT32 = 2 * float(torch.finfo(torch.float32).eps)
_NEAR_EDGE = 1e-4
#: Relative change of alpha from which a layer is called ambiguous.
AMBIGUOUS_FROM = 1e-3


@dataclass(frozen=True)
class Mode:
    """One rule for the start of the tail.

    Attributes:
        summary: for help texts.
        window: (x, offsets, counts, peak's left edge, xmin_pos) -> the starts to consider, as
            the first one and the one behind the last, int64 [L] each.
        histogram: the window follows the peak of a histogram, so it can jump.
        without_start: (alpha, D, index) if the window is empty but there are two values or more.
        fallback: keep all eigenvalues if none exceeds the threshold.
        corrected_below: fewer values than this are fitted with n - 1 instead of n.
    """

    summary: str
    window: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    histogram: bool = False
    without_start: tuple[float, float, int] = (math.nan, 1.0, -1)
    fallback: bool = True
    corrected_below: int = 0


def _middle(x, offsets, counts, edge, xmin_pos):
    start = (counts / xmin_pos).long()
    return start, start + 1


def _all_starts(x, offsets, counts, edge, xmin_pos):
    return torch.zeros_like(counts), (counts - 1).clamp(min=0)


def _near_peak(published: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def window(x, offsets, counts, edge, xmin_pos):
        lower = 0.95 * edge
        # The published rule compares the *logarithm* of its lower bound with the values.
        lower = _log10(lower) if published else lower
        layer = _layer_of(x, counts)
        first = _count(x < lower[layer], layer, counts)
        last = _count(x <= (1.5 * edge)[layer], layer, counts)
        return first, torch.minimum(last, (counts - 1).clamp(min=0))

    return window


MODES: dict[str, Mode] = {
    "xmin_peak": Mode(
        "smallest D near the peak of the log histogram, with the published lower bound",
        _near_peak(published=True),
        histogram=True,
        without_start=(0.0, 1.0, 0),
    ),
    "xmin_peak_fixed": Mode(
        "smallest D near the peak of the log histogram, with the lower bound that was meant",
        _near_peak(published=False),
        histogram=True,
    ),
    "xmin_mid": Mode("start at the median eigenvalue", _middle),
    "ks": Mode("smallest D of all starts", _all_starts),
    "weightwatcher": Mode(
        "ks as WeightWatcher does it: n - 1 below 20 eigenvalues, alpha -1 without a fit",
        _all_starts,
        fallback=False,
        corrected_below=20,
    ),
}
_CORRECTED_TAIL = 8  # a corrected fit has at least this many values, if there are as many
_CORRECTED_TIE = 1e-12


@dataclass(frozen=True)
class Fit:
    """The fit of one spectrum: see :class:`~.table.LayerAlpha` for the fields.

    ``unstable`` says why the mode may jump here, ``reason`` why alpha is undefined; both may be
    empty.
    """

    alpha: float
    distance: float
    index: int
    xmin: float
    reason: str = ""
    unstable: str = ""


@dataclass(frozen=True)
class Kept:
    """The eigenvalues that are fitted, ascending.

    ``fewer``, ``more``: how many of them, and of those below, lie so close to the threshold that
    float32 may decide otherwise; ``unstable``: another reason why the choice is not clear-cut.
    """

    values: torch.Tensor
    fewer: int = 0
    more: int = 0
    unstable: str = ""


def check_fit(fit: str, xmin_pos: float = 2.0, bins: int = 100) -> Mode:
    """The mode called ``fit``.

    Raises:
        OpenTransError: unknown, or an argument out of range.
    """
    if fit not in MODES:
        raise OpenTransError(f"fit={fit!r} is not known. Use one of {', '.join(MODES)}.")
    if not xmin_pos > 1 or math.isinf(xmin_pos):
        raise OpenTransError(
            f"xmin_pos={xmin_pos!r} must be above 1: the fit starts at index int(N / xmin_pos). "
            "Use 2 for the median."
        )
    if not isinstance(bins, int) or bins < 1:
        raise OpenTransError(f"bins={bins!r} must be a positive integer. Use 100.")
    return MODES[fit]


def keep(values: torch.Tensor, threshold: float, fit: str = "xmin_peak") -> Kept:
    """The eigenvalues above ``threshold``; all positive ones if none is and the mode does so.

    values: float64, ascending, with exact zeros where an eigenvalue is zero.
    """
    margin = _FLOAT32 * math.sqrt(threshold * float(values[-1])) if values.numel() else 0.0
    bounds = torch.tensor([threshold, 0.0, threshold + margin], dtype=torch.float64)
    # How many are at most the threshold, not positive, at most the threshold and the margin.
    at_most = torch.searchsorted(values, bounds.to(values.device), right=True).tolist()
    first, zeros, near = at_most
    kept, unstable = values[first:], ""
    if kept.numel() == 0 and MODES[fit].fallback:
        kept = values[zeros:]
        if 0 < kept.numel() < values.numel():
            unstable = "rank-deficient, and every eigenvalue is below the threshold"
    if threshold == 0:
        return Kept(kept, unstable=unstable)
    below = int(torch.searchsorted(values, threshold - margin))
    return Kept(kept, near - first, first - max(below, zeros) if first > zeros else 0, unstable)


def fit_rows(
    spectra: Sequence[torch.Tensor],
    fit: str = "xmin_peak",
    *,
    xmin_pos: float = 2.0,
    bins: int = 100,
) -> list[Fit]:
    """Fit every spectrum, all in one call of the ``powerlaw_fit`` op.

    Args:
        spectra: kept eigenvalues of each layer, float64 [N], ascending and positive; N may be 0.
        fit: a key of :data:`MODES`.
        xmin_pos: ``xmin_mid`` starts at index ``int(N / xmin_pos)``.
        bins: of the histogram of log10 x in the peak modes.

    Raises:
        OpenTransError: unknown mode or bad argument.
    """
    mode = check_fit(fit, xmin_pos, bins)
    results = [_too_few(x, fit, mode) for x in spectra]
    open_rows = [i for i, known in enumerate(results) if known is None]
    if open_rows:
        chosen = [spectra[i] for i in open_rows]
        for i, found in zip(open_rows, _fit_all(chosen, mode, xmin_pos, bins), strict=True):
            results[i] = found
    return [result for result in results if result is not None]


def _too_few(x: torch.Tensor, fit: str, mode: Mode) -> Fit | None:
    """The definition for spectra that no rule can fit; None for all others."""
    count = x.numel()
    if mode.corrected_below and count < mode.corrected_below:
        return _corrected(x)
    if count == 0:
        return Fit(math.nan, 1.0, -1, math.nan, "all zero")
    if count == 1 and fit != "xmin_mid":
        return Fit(math.nan, 1.0, -1, math.nan, "one eigenvalue")
    return None


def _corrected(x: torch.Tensor) -> Fit:
    """WeightWatcher's fit of few values: n - 1 for n, at least 8 values, smallest D."""
    values = x.tolist()
    count = len(values)
    if count < 2:
        reason = "no eigenvalue above the threshold" if count == 0 else "one eigenvalue"
        return Fit(-1.0, -1.0, -1, math.nan, reason)
    logs = [math.log(value) for value in values]
    best = (1.0, 0.0, 0)  # D, alpha, index
    for i in range(max(1, count - _CORRECTED_TAIL + 1)):
        n = count - i
        total = math.fsum(logs[i:]) - n * logs[i]
        if total <= _CORRECTED_TIE:
            continue
        alpha = 1.0 + (n - 1.0) / total
        gaps = (abs(1.0 - (values[i + k] / values[i]) ** (1.0 - alpha) - k / n) for k in range(n))
        best = min(best, (max(gaps), alpha, i), key=lambda entry: entry[0])
    distance, alpha, index = best
    return Fit(alpha, distance, index, values[index], "" if alpha else "all values are equal")


def finished(row: Sequence[float], kept: torch.Tensor, fit: str) -> Fit:
    """The fit of ``kept``, eigenvalues on the host, from its row of :func:`fit_padded`."""
    mode = MODES[fit]
    return _too_few(kept, fit, mode) or _finish(list(row), mode)


def fit_padded(
    values: torch.Tensor, threshold: float, fit: str, *, xmin_pos: float = 2.0, bins: int = 100
) -> torch.Tensor:
    """Fits of every layer on the device, without a look at it from the host.

    values: float64 [L, M], ascending, zeros in front of shorter spectra. The result is float64
    [L, 3, 6]: for the eigenvalues above ``threshold``, for those without the ones near it, and
    for those with the ones near below it, their number and what :func:`finished` takes.
    """
    above = values > threshold
    count = above.sum(1)
    margin = _FLOAT32 * (threshold * values[:, -1:]).sqrt() if threshold else values[:, :1] * 0
    fewer = (above & (values <= threshold + margin)).sum(1)
    more = (~above & (values >= threshold - margin) & (values > 0)).sum(1)
    if threshold == 0:
        fewer, more = fewer * 0, more * 0
    layers, width = values.shape
    kept = torch.stack([count, count - fewer, count + more], dim=1).flatten()
    # Spectra in turn: what is left out of a row, then what is fitted.
    counts = torch.stack([width - kept, kept], dim=1).flatten()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    x = values.repeat_interleave(3, dim=0, output_size=3 * layers)
    place = torch.arange(width, device=values.device)
    x = torch.where(place >= (width - kept)[:, None], x, 1.0).flatten()
    active = torch.zeros_like(counts, dtype=torch.bool)
    active[1::2] = kept > 0
    columns = _columns(x, offsets, counts, MODES[fit], xmin_pos, bins, active)[1::2]
    return torch.cat([kept[:, None].double(), columns], dim=1).view(layers, 3, 6)


def _fit_all(spectra: Sequence[torch.Tensor], mode: Mode, xmin_pos: float, bins: int) -> list[Fit]:
    x = torch.cat([one.reshape(-1) for one in spectra])
    sizes = torch.tensor([0, *(one.numel() for one in spectra)])
    offsets = sizes.cumsum(0).to(x.device)
    columns = _columns(x, offsets, sizes[1:].to(x.device), mode, xmin_pos, bins)
    return [_finish(row, mode) for row in columns.tolist()]  # the one copy to the host


def _columns(
    x: torch.Tensor,
    offsets: torch.Tensor,
    counts: torch.Tensor,
    mode: Mode,
    xmin_pos: float,
    bins: int,
    active: torch.Tensor | None = None,
) -> torch.Tensor:
    """Index, alpha, D, x at the index, alpha with the rival bin: float64 [L, 5].

    Of spectra that are not ``active`` the values are read, but no start is tried.
    """

    def fitted(edge: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
        first, last = mode.window(x, offsets, counts, edge, xmin_pos)
        if wanted is not None:
            first = torch.where(wanted, first, 0)
            last = torch.where(wanted, last, 0)
        return powerlaw_fit(x, offsets, first, last)

    if mode.histogram:
        edge, rival = _peaks(x, offsets, counts, bins)
        differs = rival != edge  # the others need no second fit
        found = fitted(edge, active)
        second = fitted(rival, differs if active is None else differs & active)
        other = torch.where(differs, second[:, 1], found[:, 1])
    else:
        found = fitted(x[:0], active)
        other = found[:, 1]
    start = (found[:, 0].long().clamp(min=0) + offsets[:-1]).clamp(max=len(x) - 1)
    return torch.stack([*found.unbind(1), x[start], other], dim=1)


def _finish(row: list[float], mode: Mode) -> Fit:
    index, alpha, distance, xmin, other = row
    if index >= 0:
        same = alpha == other or math.isclose(alpha, other, rel_tol=AMBIGUOUS_FROM)
        unstable = "" if same else f"two bins tie for the peak; the other gives {other:.4f}"
        return Fit(alpha, distance, int(index), xmin, "", unstable)
    alpha, distance, empty = mode.without_start
    # The gather used index 0, whose value is what the published rule then starts from.
    start = xmin if empty == 0 else math.nan
    return Fit(alpha, distance, empty, start, "no candidate in the peak's window")


def _peaks(
    x: torch.Tensor, offsets: torch.Tensor, counts: torch.Tensor, bins: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left edges, as eigenvalues [L], of each log10 histogram's peak and of its closest rival.

    Equal bins from the smallest to the largest value; the first of several fullest bins is the
    peak. The rival is the bin that may be the fullest under float32 noise: values near an edge,
    which may cross it, decide. It is the peak itself where there is none.
    """
    layers = len(counts)
    layer = _layer_of(x, counts)
    h = _log10(x)
    # Spectra without values have no edge, but must not be looked for outside.
    begin, end = offsets[:-1].clamp(max=len(x) - 1), (offsets[1:] - 1).clamp(min=0)
    low, high = h[begin], h[end]
    flat = x[begin] == x[end]
    width = torch.where(flat, 1.0, high - low)
    position = (h - low[layer]) * bins / width[layer]
    number = position.long().clamp(0, bins - 1)

    def histogram(bin_of: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat_counts = torch.zeros(layers * bins, dtype=torch.int64, device=x.device)
        return flat_counts.index_add(0, layer * bins + bin_of, weight).view(layers, bins)

    full = histogram(number, torch.ones_like(layer))
    top = full.argmax(1)
    nearest = position.round()
    # Relative noise of each value, in bins; that of the smallest one moves all edges.
    noise = _FLOAT32 * (x[end][layer] / x).sqrt() * (bins / math.log(10)) / width[layer]
    noise = noise + noise[begin][layer] * (1 - position / bins)
    near = (position - nearest).abs() < noise.clamp(min=_NEAR_EDGE)
    near &= (nearest > 0) & (nearest < bins)
    right = nearest.long().clamp(1, max(1, bins - 1))
    beside = torch.where(number == right, right - 1, right).clamp(max=bins - 1)
    gain, loss = histogram(beside, near.long()), histogram(number, near.long())
    rivals = (full + gain).scatter(1, top[:, None], -1)
    sure = (full - loss).gather(1, top[:, None])[:, 0]
    best = rivals.argmax(1)
    moved = (gain.gather(1, best[:, None]) + loss.gather(1, top[:, None]))[:, 0] > 0
    reached = rivals.gather(1, best[:, None])[:, 0] >= sure
    rival = torch.where(moved & reached, best, top)

    def edge(number: torch.Tensor) -> torch.Tensor:
        exponent = low + (high - low) * number / bins
        return torch.where(flat, x[begin], torch.pow(10.0, exponent))

    return edge(top), edge(rival)


def _layer_of(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The spectrum of every value; a known length spares the host a look at the device."""
    layers = torch.arange(len(counts), device=x.device)
    return layers.repeat_interleave(counts, output_size=x.numel())


def _count(true: torch.Tensor, layer: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """How many entries of each spectrum are true, int64 [L]."""
    return torch.zeros_like(counts).index_add(0, layer, true.long())


def _log10(x: torch.Tensor) -> torch.Tensor:
    """log10 whose last bit does not depend on the position in the tensor.

    torch computes whole vectors and the rest of a tensor by different routines on the CPU; equal
    eigenvalues could then fall into different bins.
    """
    if x.device.type != "cpu":
        return x.log10()
    import numpy as np

    return torch.from_numpy(np.log10(x.numpy()))
