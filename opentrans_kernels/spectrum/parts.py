"""Exact rows for some layers of a network, wherever their weights are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from .layers import LayerSlices
from .solvers import Spectrum, eigenvalues

Progress = Callable[[int, int, str], None]


def spectra_of(
    layers: Sequence[LayerSlices],
    *,
    threshold: float,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Spectrum]:
    """Float64 eigenvalues on the device of the weights; arguments as in ``estimate_alpha``."""
    if not layers:
        return []
    devices = {layer.weight.device for layer in layers if layer.weight.is_cuda}
    with torch.no_grad():
        if devices:
            from .cuda import eigenvalues as on_cuda

            return on_cuda(layers, threshold=threshold, device=devices.pop(), progress=progress)
        return eigenvalues(
            layers,
            threshold=threshold,
            threads=threads or torch.get_num_threads(),
            progress=progress,
        )


def solving_cost(layer: LayerSlices) -> float:
    """Multiply-adds of Gram matrix and eigenvalues, up to a constant: positions n^2 (m + 2n)."""
    return layer.positions * layer.small**2 * (layer.large + 2.0 * layer.small) + 1e4


def weight_digest(weight: torch.Tensor) -> str:
    """BLAKE2 of dtype, shape and bytes: equal exactly for equal weights (NaN bits included)."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    plain = weight.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{weight.dtype} {tuple(weight.shape)}".encode(), digest_size=16)
    digest.update(plain.view(bits[plain.element_size()]).numpy().data)
    return digest.hexdigest()
