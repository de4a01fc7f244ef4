"""The network ``bench_alpha.py`` measures: real weights if given, else planted heavy tails."""

from __future__ import annotations

import math

import torch
from torch import nn

from opentrans_kernels.spectrum import select

KINDS = ("student-t", "column power law", "low-rank spikes")


def plant_heavy_tails_(model: nn.Module, seed: int = 0) -> None:
    """Fill every measured layer with a heavy-tailed weight, by turns of three kinds.

    Student-t entries (2.5 to 5 degrees of freedom); Gaussian entries under column factors of a
    Pareto law; Gaussian entries with a few strong directions. Scaled by 1 / sqrt(fan in). No
    imitation of trained weights beyond that: alpha of such a network means nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    for i, layer in enumerate(select(model)):
        shape, count = layer.shape, layer.weight.numel()
        weight = torch.randn(shape, generator=generator)
        kind = KINDS[i % len(KINDS)]
        if kind == "student-t":
            dof = 2.5 + 2.5 * float(torch.rand((), generator=generator))
            # Chi-squared with fractional degrees of freedom, by Wilson and Hilferty.
            z = torch.randn(shape, generator=generator)
            chi = dof * (1 - 2 / (9 * dof) + z * math.sqrt(2 / (9 * dof))).clamp(min=0.05) ** 3
            weight *= (dof / chi).sqrt()
        elif kind == "column power law":
            u = torch.rand((1, shape[1], *[1] * (len(shape) - 2)), generator=generator)
            weight *= (1 - u).clamp(min=1e-4) ** -0.4
        else:
            rank = max(1, layer.small // 16)
            left = torch.randn(shape[0], rank, generator=generator)
            right = torch.randn(rank, count // shape[0], generator=generator)
            strength = 3 * torch.arange(1, rank + 1) ** -0.7
            weight += ((left * strength) @ right).view(shape)
        with torch.no_grad():
            layer.weight.copy_(weight / math.sqrt(count / shape[0]))
