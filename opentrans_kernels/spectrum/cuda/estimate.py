"""Eigenvalues of all layers on the GPU: the counterpart of ``spectrum.solvers.eigenvalues``.

Everything is launched, then the host reads once: the eigenvalues (8 bytes each, which it needs for
the table) and a few flags per layer. The fit reads the eigenvalues where they are, on the device.
Layers whose digits were lost, or whose solver did not converge, are computed again from singular
values, on the device too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import KernelUnavailable, UnsupportedModelError
from ..layers import LayerSlices
from ..solvers import Progress, Spectrum
from .solve import SOLVERS, method
from .spectra import DeviceSpectra, singular, spectra

__all__ = ["DeviceSpectrum", "eigenvalues"]


@dataclass(frozen=True)
class DeviceSpectrum(Spectrum):
    """A spectrum with ``values`` on the host and a copy on the device, where the fit runs.

    Attributes:
        on_device: float64 [num_eigenvalues], equal to ``values``.
    """

    on_device: torch.Tensor | None = None

    def tail(self, count: int) -> torch.Tensor:
        """The ``count`` largest eigenvalues, ascending, on the device."""
        values = self.values if self.on_device is None else self.on_device
        return values[values.numel() - count :]


def eigenvalues(
    layers: Sequence[LayerSlices],
    *,
    device: torch.device | str = "cuda",
    threshold: float = 1e-5,
    solver: str | None = None,
    budget: int | None = None,
    progress: Progress | None = None,
) -> list[Spectrum]:
    """The spectra of ``layers``, in their order; each names the routine that computed it.

    Args:
        layers: weights on any device; others than ``device`` are copied there.
        threshold: eigenvalues below it need not be accurate to all digits.
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
    if where.type != "cuda":
        return _eigenvalues(layers, where, threshold, chosen, budget, progress)
    if not torch.cuda.is_available():
        raise KernelUnavailable(
            f"device={str(device)!r} was asked for, but torch {torch.__version__} sees no CUDA "
            "device. Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use device='cpu'."
        )
    with torch.cuda.device(where):
        where = torch.device("cuda", torch.cuda.current_device())
        return _eigenvalues(layers, where, threshold, chosen, budget, progress)


def _eigenvalues(
    layers: Sequence[LayerSlices],
    device: torch.device,
    threshold: float,
    solver: str,
    budget: int | None,
    progress: Progress | None,
) -> list[Spectrum]:
    found = spectra(
        layers, device, solver=solver, threshold=threshold, budget=budget, progress=progress
    )
    flags, host = _read(found)
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
        if reason:
            on_device = singular(layer, device)
            values, label = on_device.cpu(), f"svdvals, as {label} {reason}"
        results.append(DeviceSpectrum(values, f"{device.type}: {label}", on_device=on_device))
    return results


def _read(found: DeviceSpectra) -> tuple[list[list[int]], torch.Tensor]:
    """The flags (not finite, unconverged, lossy) of every layer and all eigenvalues: one copy."""
    flags = torch.stack([found.not_finite, found.unconverged, found.lossy], dim=1)
    both = torch.cat([flags.double(), found.values], dim=1).cpu()
    return both[:, :3].int().tolist(), both[:, 3:].contiguous()


def _refuse(layer: LayerSlices) -> UnsupportedModelError:
    bad = int((~torch.isfinite(layer.weight)).sum())
    what = f"its weight holds {bad} NaN or infinite values"
    fix = "Load finite weights, or leave the layer out."
    if not bad:
        what = "the squares of its weights overflow"
        fix = "Scale the weight; alpha does not change with the scale."
    return UnsupportedModelError(f"layer {layer.name!r}: {what}, so it has no spectrum. {fix}")
