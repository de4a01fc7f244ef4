"""Eigenvalues of all layers on the GPU: the counterpart of ``spectrum.solvers.eigenvalues``.

Everything is launched, the fits included, then the host reads once: the eigenvalues (8 bytes each,
which it needs for the table), the fits and a few flags per layer. Layers whose digits were lost, or
whose solver did not converge, are computed again from singular values, on the device too, and read
and fitted one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...errors import KernelUnavailable, UnsupportedModelError
from ...finite import count_non_finite
from .. import rules
from ..layers import LayerSlices
from ..options import FitOptions
from ..solvers import Progress, Spectrum
from .solve import SOLVERS, method
from .spectra import DeviceSpectra, singular, spectra

__all__ = ["DeviceSpectrum", "eigenvalues"]


@dataclass(frozen=True)
class DeviceSpectrum(Spectrum):
    """A spectrum with ``values`` on the host and a copy on the device, where the fit runs.

    Attributes:
        on_device: float64 [num_eigenvalues], equal to ``values``.
        fits: (options, number of largest eigenvalues) -> a row of ``rules.fit_padded``.
    """

    on_device: torch.Tensor | None = None
    fits: Mapping[tuple[object, int], Sequence[float]] = field(default_factory=dict)

    def known_fit(self, options: object, count: int) -> Sequence[float] | None:
        """See :meth:`Spectrum.known_fit`."""
        return self.fits.get((options, count))

    def tail(self, count: int) -> torch.Tensor:
        """The ``count`` largest eigenvalues, ascending, on the device."""
        values = self.values if self.on_device is None else self.on_device
        return values[values.numel() - count :]


def eigenvalues(
    layers: Sequence[LayerSlices],
    *,
    device: torch.device | str = "cuda",
    threshold: float = 1e-5,
    options: FitOptions | None = None,
    solver: str | None = None,
    budget: int | None = None,
    progress: Progress | None = None,
) -> list[Spectrum]:
    """The spectra of ``layers``, in their order; each names the routine that computed it.

    Args:
        layers: weights on any device; others than ``device`` are copied there.
        threshold: eigenvalues below it need not be accurate to all digits.
        options: also fit, on the device, with these; their threshold is taken.
        solver: a key of :data:`~.solve.SOLVERS`; None: ``"cusolver"``.
        budget: bytes of Gram matrices and workspaces at a time; None: a share of what is free.
        progress: called with (layers launched, layers, name).

    Raises:
        KernelUnavailable: no CUDA device, or no such solver there.
        UnsupportedModelError: a weight holds NaN or infinity, or its squares overflow.
        OpenTransError: unknown solver.
    """
    where, chosen = torch.device(device), solver or next(iter(SOLVERS))
    method(1, chosen)
    threshold = threshold if options is None else options.threshold
    if where.type != "cuda":
        return _eigenvalues(layers, where, threshold, options, chosen, budget, progress)
    if not torch.cuda.is_available():
        raise KernelUnavailable(
            f"device={str(device)!r} was asked for, but torch {torch.__version__} sees no CUDA "
            "device. Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use device='cpu'."
        )
    with torch.cuda.device(where):
        where = torch.device("cuda", torch.cuda.current_device())
        return _eigenvalues(layers, where, threshold, options, chosen, budget, progress)


def _eigenvalues(
    layers: Sequence[LayerSlices],
    device: torch.device,
    threshold: float,
    options: FitOptions | None,
    solver: str,
    budget: int | None,
    progress: Progress | None,
) -> list[Spectrum]:
    found = spectra(
        layers, device, solver=solver, threshold=threshold, budget=budget, progress=progress
    )
    flags, host, fits = _read(found, options)
    found.keep.clear()  # the copy has waited for the device
    results: list[Spectrum] = []
    for i, layer in enumerate(layers):
        not_finite, unconverged, lossy = flags[i]
        if not_finite:
            raise _refuse(layer)
        first = found.values.shape[1] - layer.num_eigenvalues
        values, on_device = host[i, first:], found.values[i, first:]
        label = found.methods[i]
        reason = (
            "did not converge" if unconverged
            else "would lose digits" if lossy
            else "leaves everything below the threshold" if not values[-1] > threshold
            else ""
        )  # fmt: skip
        known = {} if options is None else {(options, int(row[0])): row[1:] for row in fits[i]}
        if reason:
            known = {}
            on_device = singular(layer, device)
            values, label = on_device.cpu(), f"svdvals, as {label} {reason}"
        label = f"{device.type}: {label}"
        results.append(DeviceSpectrum(values, label, on_device=on_device, fits=known))
    return results


def _read(
    found: DeviceSpectra, options: FitOptions | None
) -> tuple[list[list[int]], torch.Tensor, list[list[list[float]]]]:
    """The flags (not finite, unconverged, lossy), eigenvalues and fits of all layers: one copy.

    The fits are rows of ``rules.fit_padded``, in reverse: of equal numbers the plain one is last.
    """
    parts = [torch.stack([found.not_finite, found.unconverged, found.lossy], dim=1).double()]
    layers, width = found.values.shape
    if options is not None:
        fits = rules.fit_padded(
            found.values, options.threshold, options.fit,
            xmin_pos=options.xmin_pos, bins=options.bins,
        )  # fmt: skip
        parts.append(fits.flip(1).flatten(1))
    both = torch.cat([*parts, found.values], dim=1).cpu()
    rows = both[:, 3:-width].reshape(layers, -1, 6).tolist()
    return both[:, :3].int().tolist(), both[:, -width:].contiguous(), rows


def _refuse(layer: LayerSlices) -> UnsupportedModelError:
    bad = count_non_finite(layer.weight)
    what = f"its weight holds {bad} NaN or infinite values"
    fix = "Load finite weights, or leave the layer out."
    if not bad:
        what = "the squares of its weights overflow"
        fix = "Scale the weight; alpha does not change with the scale."
    return UnsupportedModelError(f"layer {layer.name!r}: {what}, so it has no spectrum. {fix}")
