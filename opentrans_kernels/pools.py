"""Pools that read and write the kernels' layout without a copy: what ``accelerate`` puts in the
place of ``nn.MaxPool2d`` and ``nn.AvgPool2d``. They compute the same for any input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .nn import Replacement
from .pack.layout import LARGEST_STEP
from .topology.behaviour import own_behaviour
from .topology.blocks import Unrecognised, pool_size

__all__ = [
    "PlanarAvgPool2d",
    "PlanarMaxPool2d",
    "PlanarPool",
    "PlanarWindowAvgPool2d",
    "planar_pool",
]


class PlanarPool(Replacement):
    """float32 ``[N, C, H, W]`` on the CPU goes to the kernels, anything else to PyTorch."""

    opentrans_pool: Callable[..., torch.Tensor]

    def __init__(self, original: nn.Module, *arguments: object) -> None:
        super().__init__(original)
        #: Of the op, behind the tensor.
        self.opentrans_arguments = arguments
        self._resolve()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
            return self.opentrans_original(x)
        return self.opentrans_pool(x, *self.opentrans_arguments)


class PlanarMaxPool2d(PlanarPool):
    """In the place of an ``nn.MaxPool2d`` without dilation and indices; the same bits."""

    OPERATORS = {"opentrans_pool": "max_pool2d"}


class PlanarAvgPool2d(PlanarPool):
    """In the place of an ``nn.AvgPool2d`` whose windows neither overlap nor leave the image."""

    OPERATORS = {"opentrans_pool": "avg_pool2d"}


class PlanarWindowAvgPool2d(PlanarPool):
    """In the place of any other ``nn.AvgPool2d``."""

    OPERATORS = {"opentrans_pool": "window_avg_pool2d"}


def planar_pool(pool: nn.Module) -> PlanarPool | None:
    """What may stand for ``pool``; None if that does more than the kernels, or has hooks."""
    if type(pool) not in (nn.MaxPool2d, nn.AvgPool2d) or own_behaviour(pool) is not None:
        return None
    geometry = _geometry(pool)
    if not all(_fits(*step) for step in zip(*geometry, strict=True)):
        return None
    if type(pool) is nn.MaxPool2d:
        plain = _pair(pool.dilation) == [1, 1] and not pool.return_indices
        return PlanarMaxPool2d(pool, *geometry, pool.ceil_mode) if plain else None
    try:
        size = pool_size(pool)
    except Unrecognised:
        rest = (pool.ceil_mode, pool.count_include_pad, pool.divisor_override or 0)
        return PlanarWindowAvgPool2d(pool, *geometry, *rest)
    return PlanarAvgPool2d(pool, size) if size > 1 else None


def _pair(given: int | tuple[int, int]) -> list[int]:
    return [given, given] if isinstance(given, int) else list(given)


def _geometry(pool: nn.Module) -> tuple[list[int], list[int], list[int]]:
    """Window, stride and padding, each for rows and columns."""
    return _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)


def _fits(window: int, stride: int, padding: int) -> bool:
    steps = 1 <= window <= LARGEST_STEP and 1 <= stride <= LARGEST_STEP
    return steps and 0 <= padding <= window // 2
