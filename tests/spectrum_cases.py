"""Weights whose spectra cover every shape and every edge of the definition of alpha."""

from __future__ import annotations

import math

import numpy as np
import torch

RELATIVE = 1e-6


def heavy(*shape: int, seed: int = 0, dof: float = 3.0, scale: float = 1.0) -> torch.Tensor:
    """Student-t weights with one factor per row: spectra with tails, as trained layers have."""
    generator = np.random.default_rng(seed)
    rows = np.exp(0.5 * generator.standard_normal((shape[0], *[1] * (len(shape) - 1))))
    fan_in = math.prod(shape[1:])
    values = generator.standard_t(dof, shape) * rows / math.sqrt(fan_in)
    return torch.from_numpy(scale * values).float()


def low_rank(rows: int, columns: int, rank: int, scale: float = 1.0) -> torch.Tensor:
    a, b = heavy(rows, rank, seed=1), heavy(rank, columns, seed=2)
    return scale * (a.double() @ b.double())


WEIGHTS = {
    "conv1x1": heavy(48, 96, 1, 1),
    "conv3x3": heavy(40, 24, 3, 3, seed=1),
    "conv3x3 wide": heavy(24, 56, 3, 3, seed=2),
    "conv5x5": heavy(16, 20, 5, 5, seed=3),
    "conv1d": heavy(30, 20, 7, seed=4),
    "depthwise": heavy(64, 1, 3, 3, seed=5),
    "stem": heavy(32, 3, 7, 7, seed=6),
    "linear": heavy(100, 64, seed=7),
    "linear tall": heavy(257, 37, seed=8),
    "linear square": heavy(96, 96, seed=9),
    "spiked": heavy(64, 64, seed=10) + 40 * low_rank(64, 64, 2).float(),
    "rank-deficient": low_rank(60, 80, 13),
    "rank-deficient conv": low_rank(40, 30, 5).view(40, 30, 1, 1),
    "wide range": torch.diag(torch.logspace(-2, 6, 64, dtype=torch.float64)),
    "straddling": torch.diag(torch.logspace(-3.5, 1, 40, dtype=torch.float64)),
    "all below": heavy(40, 50, seed=11, scale=1e-5),
    "below, no rank": low_rank(40, 50, 7, scale=1e-6),
    "orthogonal half": math.sqrt(0.5) * torch.eye(16),
    "two": torch.diag(torch.tensor([1.0, 2.0])),
    "three": torch.diag(torch.tensor([1.0, 2.0, 5.0])),
    "one": torch.tensor([[3.0, 4.0]]),
    "zero": torch.zeros(6, 7),
    "small": heavy(12, 13, seed=12),
    "just below 20": heavy(19, 40, seed=13),
    "twenty": heavy(20, 40, seed=14),
    "block.attn.qkv": heavy(96, 32, seed=15),
    "block.attn.wide": heavy(32, 98, seed=16),
    "block.attention.out": heavy(33, 32, seed=17),
}


def same(found: float, expected: float, relative: float = RELATIVE) -> bool:
    if math.isnan(expected) or math.isinf(expected):
        return found == expected or (math.isnan(found) and math.isnan(expected))
    return abs(found - expected) <= relative * abs(expected)
