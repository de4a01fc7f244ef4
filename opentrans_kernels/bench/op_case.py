"""One op on one shape at one density, and what such cases are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..flops import executed_macs

Call = Callable[[], torch.Tensor]
_LANES = {"avx512": 16, "avx2": 8, "neon": 4}


@dataclass
class Case:
    """One op on one shape at one density, ready to run.

    ``arguments``: of the op, in schema order. ``dense``: the competitors. ``plain``: the same in
    eager PyTorch on contiguous tensors, which is what the reference row runs. ``reference``:
    float64 result. ``select``: brings a dense result into the form of the op's. ``macs``: nominal
    and effective multiply-adds of one call. ``module``: the same for other engines, on the first of
    the arguments; None where they cannot be given it.
    """

    op: str
    name: str
    kind: str
    shape: dict[str, int]
    density: float
    asked: float
    nnz: int
    macs: dict[str, int]
    arguments: tuple[Any, ...]
    dense: dict[str, Call]
    plain: Call
    reference: torch.Tensor
    select: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda found: found)
    module: nn.Module | None = None


def random_values(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed)) - 0.5


def masked_weight(cout: int, cin: int, kernel: int, density: float) -> torch.Tensor:
    """Float32 ``[cout, cin, k, k]`` whose kept entries are spread uniformly at random."""
    made = torch.Generator().manual_seed(cout * 7919 + cin)
    shape = (cout, cin, kernel, kernel)
    weight = torch.randn(shape, generator=made) / (cin * kernel * kernel * density) ** 0.5
    return weight * (torch.rand(shape, generator=made) < density)


def macs_of(convs: Sequence[tuple[int, int, int, int, int]], batch: int) -> dict[str, int]:
    """Counts of several (nnz, numel, h_out, w_out, kernel)."""
    from .. import native

    lanes = _LANES.get(native.cpu_capability() if native.available() else "", 8)
    return {
        "nominal": sum(numel * h * w for _, numel, h, w, _ in convs) * batch,
        "effective": sum(nnz * h * w for nnz, _, h, w, _ in convs) * batch,
        "executed": sum(
            executed_macs(nnz, h, w, batch, kernel, lanes) for nnz, _, h, w, kernel in convs
        ),
    }
