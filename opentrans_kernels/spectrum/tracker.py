"""Alpha again and again during training, solving only what moved and what matters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import OpenTransError
from .certificate import NORM_LEVELS, UNKNOWN, alpha_interval, norm_bound
from .estimate import versions
from .layers import LINEAR_ASPECT, LayerSlices, select
from .options import FitOptions
from .parts import Progress, spectra_of, weight_digest
from .rows import rows_of
from .sampled import parse_approx
from .solvers import Spectrum
from .table import AlphaTable, LayerAlpha
from .updates import LayerState, TrackerUpdate, undecided

__all__ = ["AlphaTracker"]


@dataclass
class _Entry:
    """What is remembered of one layer: all of it from the same weights."""

    digest: str
    spectrum: Spectrum
    row: LayerAlpha
    solved_at: int
    weight: torch.Tensor | None = None
    kept: object = None  # of the approximation
    error: float = math.nan


@dataclass
class _Bound:
    """The interval of a layer in one update, tightened step by step."""

    low: float
    high: float
    level: int = 0
    frobenius: float = 0.0
    spectral: float = math.inf
    change: float = math.nan
    difference: torch.Tensor | None = field(default=None, repr=False)


class AlphaTracker:
    """Alphas of one network while it trains.

    Layers whose weights are unchanged to the bit, frozen ones above all, are never solved again.
    With ``xmin_mid`` a layer that moved is skipped while its alpha provably stays on its side of
    the median; the sides of all layers are then those of a full estimate. For other fits no such
    proof exists, and every layer that moved is solved.

    Args:
        source: the network, or a mapping of weights; read again by every update, as it computes:
            masks that it holds are applied.
        fit: the mode; the other estimate arguments as in :func:`estimate_alpha`.
        certify: skip with proof. Keeps a copy of the weights. Default: for ``xmin_mid``.
        max_layers: solve at most this many layers in an update, the oldest first. Then the result
            may be uncertain, and says so.
        approx: "sample:512" or "warm" (:mod:`.sampled`) for layers that moved. Rows name it, and
            its error, measured at every exact solve of the layer.
        refresh: with ``approx``, updates after which a layer is solved exactly again.

    Raises:
        OpenTransError: arguments out of range, or ``certify`` for a fit without proof.
    """

    def __init__(
        self,
        source: nn.Module | Mapping[str, torch.Tensor],
        fit: str = "xmin_mid",
        *,
        xmin_pos: float = 2.0,
        bins: int = 100,
        evals_threshold: float = 1e-5,
        conv_norm: float = 0.5,
        match: str = "class_name",
        linear_aspect: float | None = LINEAR_ASPECT,
        certify: bool | None = None,
        max_layers: int | None = None,
        approx: str | None = None,
        refresh: int = 10,
        threads: int | None = None,
    ) -> None:
        self._options = FitOptions(fit, xmin_pos, bins, evals_threshold)
        self._selection: dict[str, Any] = {
            "match": match,
            "conv_norm": conv_norm,
            "linear_aspect": linear_aspect,
        }
        self._approx = parse_approx(approx)
        self._certify = certify if certify is not None else fit == "xmin_mid" and not approx
        if self._certify and fit != "xmin_mid":
            raise OpenTransError(
                f"certify=True has no proof for fit={fit!r}: its start jumps when weights move. "
                "Use fit='xmin_mid', or certify=False."
            )
        if self._certify and self._approx is not None:
            raise OpenTransError(
                "certify=True and approx contradict each other: one proves, the other guesses. "
                "Leave one out."
            )
        for name, number in (("max_layers", max_layers), ("refresh", refresh)):
            if number is not None and number < 1:
                raise OpenTransError(f"{name}={number} must be at least 1.")
        self.source = source
        self._max_layers, self._refresh, self._threads = max_layers, refresh, threads
        self._entries: dict[str, _Entry] = {}
        self.updates = 0

    @torch.no_grad()
    def update(self, progress: Progress | None = None) -> TrackerUpdate:
        """Look at the weights as they are now; raises as :func:`estimate_alpha` does."""
        skipped: dict[str, str] = {}
        layers = select(self.source, skipped=skipped, **self._selection)
        names = {layer.name for layer in layers}
        self._entries = {name: one for name, one in self._entries.items() if name in names}
        digests = {layer.name: weight_digest(layer.weight) for layer in layers}
        new = [layer for layer in layers if not self._known(layer)]
        moved = [
            layer
            for layer in layers
            if self._known(layer) and self._entries[layer.name].digest != digests[layer.name]
        ]
        self._solve(new, digests, progress)
        budget = len(moved) if self._max_layers is None else self._max_layers
        bounds: dict[str, _Bound] = {}
        rough: dict[str, LayerAlpha] = {}
        if self._approx is not None:
            moved = self._approximate(moved, rough)
        if self._certify and moved:
            bounds = {layer.name: self._bound(layer) for layer in moved}
            self._settle(layers, moved, bounds, digests, budget, progress)
        else:
            turn = sorted(moved, key=lambda layer: self._entries[layer.name].solved_at)[:budget]
            self._solve(turn, digests, progress)
            done = {layer.name for layer in turn}
            bounds = {one.name: _Bound(*UNKNOWN) for one in moved if one.name not in done}
        states = tuple(self._state(layer, bounds, rough, digests) for layer in layers)
        rows = tuple(
            self._row(layer, state, rough) for layer, state in zip(layers, states, strict=True)
        )
        certain = not undecided(states)
        self.updates += 1
        return TrackerUpdate(self._table(rows, skipped), states, certain)

    def _known(self, layer: LayerSlices) -> bool:
        entry = self._entries.get(layer.name)
        return entry is not None and entry.row.shape == layer.shape

    def _solve(
        self, layers: Sequence[LayerSlices], digests: Mapping[str, str], progress: Progress | None
    ) -> None:
        options = self._options
        spectra = spectra_of(
            layers, threshold=options.threshold, threads=self._threads, progress=progress
        )
        rows = rows_of(layers, spectra, options) if layers else ()
        for layer, spectrum, row in zip(layers, spectra, rows, strict=True):
            entry = _Entry(digests[layer.name], spectrum, row, self.updates)
            if self._certify:
                entry.weight = layer.weight.clone()
            if self._approx is not None and self._approx.applies(layer):
                self._measure(layer, entry, self._entries.get(layer.name))
            self._entries[layer.name] = entry

    def _measure(self, layer: LayerSlices, entry: _Entry, before: _Entry | None) -> None:
        """The error of the approximation, against the exact alpha just solved.

        Of what the *old* singular vectors give, for a warm start: with fresh ones it is exact.
        """
        approx = self._approx
        if approx is None:
            return
        old = before.kept if before is not None else None
        entry.kept = approx.prepare(layer)
        if old is not None or entry.kept is None:
            guess = approx.spectrum(layer, old, self._options.threshold)
            alpha = rows_of([layer], [guess], self._options)[0].alpha
            if entry.row.alpha > 0:
                entry.error = abs(alpha - entry.row.alpha) / entry.row.alpha

    def _approximate(
        self, moved: Sequence[LayerSlices], rough: dict[str, LayerAlpha]
    ) -> list[LayerSlices]:
        """Fills ``rough``; returns the layers that must be solved."""
        approx = self._approx
        exact = []
        for layer in moved:
            entry = self._entries[layer.name]
            due = self.updates - entry.solved_at >= self._refresh
            if approx is None or due or not approx.applies(layer):
                exact.append(layer)
                continue
            guess = approx.spectrum(layer, entry.kept, self._options.threshold)
            rough[layer.name] = rows_of([layer], [guess], self._options)[0]
        return exact

    def _bound(self, layer: LayerSlices) -> _Bound:
        entry = self._entries[layer.name]
        if entry.weight is None or entry.weight.dtype != layer.weight.dtype:
            return _Bound(*UNKNOWN)
        now = layer.matrices().double()
        then = dataclasses.replace(layer, weight=entry.weight.to(layer.weight.device)).matrices()
        bound = _Bound(*UNKNOWN, difference=now - then.double())
        if bound.difference is not None and bool(torch.isfinite(bound.difference).all()):
            bound.frobenius = float(bound.difference.norm()) * (1 + 1e-9)
            bound.change = bound.frobenius / max(float(then.double().norm()), 1e-300)
            self._tighten(layer, bound)
        return bound

    def _tighten(self, layer: LayerSlices, bound: _Bound) -> bool:
        """Use the next norm; False if there is none."""
        entry = self._entries[layer.name]
        if bound.difference is None or bound.level >= len(NORM_LEVELS) or not entry.row.alpha > 1:
            return False
        spectral = norm_bound(bound.difference, NORM_LEVELS[bound.level])
        bound.level += 1
        bound.spectral = min(bound.spectral, spectral)
        low, high = alpha_interval(
            entry.spectrum.values,
            layer,
            bound.spectral,
            bound.frobenius,
            threshold=self._options.threshold,
            xmin_pos=self._options.xmin_pos,
        )
        # Both bounds hold, so what both allow holds.
        bound.low, bound.high = max(low, bound.low), min(high, bound.high)
        return True

    def _settle(
        self,
        layers: Sequence[LayerSlices],
        moved: Sequence[LayerSlices],
        bounds: dict[str, _Bound],
        digests: Mapping[str, str],
        budget: int,
        progress: Progress | None,
    ) -> None:
        """Tighten or solve the layers whose side of the median is open, until none is."""
        by_name = {layer.name: layer for layer in moved}
        while budget > 0:
            states = [self._state(layer, bounds, {}, digests) for layer in layers]
            open_ones = [name for name in undecided(states) if name in bounds]
            if not open_ones:
                break
            if any([self._tighten(by_name[name], bounds[name]) for name in open_ones]):
                continue
            open_ones.sort(key=lambda name: self._entries[name].solved_at)
            turn = open_ones[:budget]
            budget -= len(turn)
            self._solve([by_name[name] for name in turn], digests, progress)
            for name in turn:
                del bounds[name]

    def _state(
        self,
        layer: LayerSlices,
        bounds: Mapping[str, _Bound],
        rough: Mapping[str, LayerAlpha],
        digests: Mapping[str, str],
    ) -> LayerState:
        name, entry = layer.name, self._entries[layer.name]
        age = self.updates - entry.solved_at
        if name in rough:
            return LayerState(name, "approximated", *UNKNOWN, age, error=entry.error)
        if name in bounds:
            bound = bounds[name]
            sure = self._certify and (bound.low, bound.high) != UNKNOWN
            action = "certified" if sure else "waiting"
            return LayerState(name, action, bound.low, bound.high, age, bound.change)
        alpha = entry.row.alpha
        fresh = entry.solved_at == self.updates
        action = "computed" if fresh else "unchanged"
        return LayerState(name, action, alpha, alpha, age, 0.0, entry.error)

    def _row(
        self, layer: LayerSlices, state: LayerState, rough: Mapping[str, LayerAlpha]
    ) -> LayerAlpha:
        row = dataclasses.replace(self._entries[layer.name].row, params=layer.params)
        if state.exact:
            return row
        if state.action == "approximated" and self._approx is not None:
            known = "not yet measured"
            if not math.isnan(state.error):
                known = f"{state.error:.1e} when last measured"
            words = f"{self._approx.label}, error {known}"
            return dataclasses.replace(rough[layer.name], params=layer.params, approx=words)
        words = f"{state.action}: {state.age} updates old"
        if (state.low, state.high) != UNKNOWN:
            words += f", alpha now in [{state.low:.6g}, {state.high:.6g}]"
        return dataclasses.replace(row, approx=words)

    def _table(self, rows: tuple[LayerAlpha, ...], skipped: Mapping[str, str]) -> AlphaTable:
        options = self._options
        parameters = {
            "xmin_pos": options.xmin_pos,
            "bins": options.bins,
            "evals_threshold": options.threshold,
            **self._selection,
            "precision": "float64",
            "approx": self._approx.label if self._approx is not None else None,
        }
        return AlphaTable(rows, options.fit, parameters, versions(), skipped)
