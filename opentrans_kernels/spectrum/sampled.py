"""Cheaper eigenvalues that are not exact; asked for by name, and named in every row."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..errors import OpenTransError
from .layers import LayerSlices
from .parts import spectra_of
from .solvers import Spectrum

__all__ = ["Approximation", "Sample", "Warm", "parse_approx"]


class Approximation(Protocol):
    """How eigenvalues of a changed layer are approximated."""

    label: str

    def applies(self, layer: LayerSlices) -> bool:
        """Whether it is cheaper than solving; other layers are solved."""
        ...

    def prepare(self, layer: LayerSlices) -> object:
        """What to keep from a layer that has just been solved."""
        ...

    def spectrum(self, layer: LayerSlices, kept: object, threshold: float) -> Spectrum:
        """Approximate eigenvalues of the layer as it is now."""
        ...


@dataclass(frozen=True)
class Sample:
    """Eigenvalues of random sub-matrices of the same aspect, scaled by rows / sampled rows.

    Right for weights whose rows and columns are exchangeable; trained ones are not, hence the
    error that the tracker measures. The draw depends on the layer's name only, so that repeated
    estimates of one layer move with its weights and not with the draw.

    Attributes:
        size: rows of the smaller side of a sub-matrix; smaller matrices are solved as they are.
        draws: sub-matrices, their eigenvalues pooled.
    """

    size: int
    draws: int = 2

    @property
    def label(self) -> str:
        return f"sample:{self.size}x{self.draws}"

    def applies(self, layer: LayerSlices) -> bool:
        return layer.small > self.size

    def prepare(self, layer: LayerSlices) -> object:
        return None

    def spectrum(self, layer: LayerSlices, kept: object, threshold: float) -> Spectrum:
        generator = torch.Generator().manual_seed(zlib.crc32(layer.name.encode()))
        rows, columns = layer.shape[:2]
        share = self.size / layer.small
        sizes = (max(1, round(rows * share)), max(1, round(columns * share)))
        parts = []
        for _ in range(self.draws):
            picked = [
                torch.randperm(count, generator=generator)[:size].to(layer.weight.device)
                for count, size in zip((rows, columns), sizes, strict=True)
            ]
            weight = layer.weight[picked[0]][:, picked[1]]
            parts.append(replace(layer, weight=weight, scale=layer.scale / share))
        found = spectra_of(parts, threshold=threshold)
        values = torch.cat([spectrum.values.cpu() for spectrum in found]).sort().values
        return Spectrum(values, f"{found[0].solver} of {self.label}")


@dataclass(frozen=True)
class Warm:
    """First-order update: diag(U^T W' V)^2 with the singular vectors of the last exact solve.

    One matrix product instead of an eigensolver, for about twice the weight's float64 size in
    memory. The error is of second order in the change, and unbounded where singular values
    cross; ``xmin_mid`` bears it, the peak and ks rules do not.
    """

    @property
    def label(self) -> str:
        return "warm"

    def applies(self, layer: LayerSlices) -> bool:
        return True

    def prepare(self, layer: LayerSlices) -> object:
        left, _, right = torch.linalg.svd(layer.matrices().double(), full_matrices=False)
        return left, right

    def spectrum(self, layer: LayerSlices, kept: object, threshold: float) -> Spectrum:
        left, right = kept  # type: ignore[misc]
        turned = left.transpose(1, 2) @ layer.matrices().double()
        values = (turned * right).sum(2).square().mul(layer.scale)
        return Spectrum(values.flatten().sort().values.cpu(), "warm start from singular vectors")


def parse_approx(text: str | None) -> Approximation | None:
    """ "sample:512", "sample:256x4" (draws) or "warm"; None for exact.

    Raises:
        OpenTransError: anything else.
    """
    if text is None:
        return None
    kind, _, rest = text.partition(":")
    if kind == "warm" and not rest:
        return Warm()
    size, _, draws = rest.partition("x")
    if kind == "sample" and size.isdigit() and int(size) >= 8 and (draws or "2").isdigit():
        return Sample(int(size), max(1, int(draws or 2)))
    raise OpenTransError(
        f"approx={text!r} is not known. Use None (exact), 'sample:512' (two random sub-matrices of "
        "512 rows, at least 8), 'sample:256x4' (four of 256), or 'warm'."
    )
