"""Alpha tables made by hand and small networks, for the tests of freezing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from opentrans import FreezePlan, freeze_plan
from opentrans_kernels.spectrum import AlphaTable, LayerAlpha

NAN = math.nan
# What the released code kept as its frozen list (27 of the 55 convolutions of RN50).
PUBLISHED_1X1 = (
    "layer1.0.conv1", "layer1.1.conv3", "layer1.2.conv3", "layer2.0.conv1",
    "layer2.0.downsample.0", "layer2.1.conv1", "layer2.2.conv3", "layer2.3.conv3",
    "layer3.0.conv1",
)  # fmt: skip


def alpha_row(
    name: str,
    alpha: float,
    shape: tuple[int, ...],
    *,
    part: str = "",
    parameter: str | None = None,
    reason: str = "",
    fit: str = "xmin_mid",
) -> LayerAlpha:
    """A row whose numbers other than alpha are harmless."""
    kind = "conv" if len(shape) > 2 else "linear"
    return LayerAlpha(
        name=name, parameter=parameter or f"{name}.weight", part=part, kind=kind, shape=shape,
        fit=fit, alpha=float(alpha), ks_distance=0.1, xmin=1.0, xmin_index=0, num_evals=4,
        num_total=4,
        spectral_norm=1.0, stable_rank=1.0, norm=1.0, log_norm=0.0, log_spectral_norm=0.0,
        alpha_weighted=0.0, log_alpha_norm=0.0, matrix_rank=4, entropy=1.0, smallest=0.1,
        params=math.prod(shape), reason=reason,
    )  # fmt: skip


def alpha_table(model: nn.Module, alphas: Mapping[str, float], fit: str = "xmin_mid") -> AlphaTable:
    """A table with these alphas for these modules of ``model``."""
    rows = []
    for name, alpha in alphas.items():
        weight = model.get_submodule(name).weight
        rows.append(
            alpha_row(name, alpha, tuple(weight.shape), fit=fit,
                      reason="" if alpha == alpha else "all zero")
        )  # fmt: skip
    return AlphaTable(tuple(rows), fit)


class Chain(nn.Module):
    """Convolutions conv0, conv1, ... of equal width with batch norms bn0, bn1, ... and a head."""

    def __init__(self, count: int = 4, width: int = 4) -> None:
        super().__init__()
        for i in range(count):
            kernel = 3 if i % 2 else 1
            setattr(
                self,
                f"conv{i}",
                nn.Conv2d(width if i else 3, width, kernel, padding=kernel // 2, bias=False),
            )
            setattr(self, f"bn{i}", nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 2)
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.count):
            x = getattr(self, f"conv{i}")(x)
            x = torch.relu(getattr(self, f"bn{i}")(x))
        return self.head(x.mean((2, 3)))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


NAMES = ("conv0", "conv1", "conv2", "conv3")


def alphas(*values: float) -> dict[str, float]:
    """Alphas of the convolutions of a Chain, in order."""
    return dict(zip(NAMES, values, strict=False))


def chain_plan(values: dict[str, float], rule: str = "median", **options) -> FreezePlan:
    """A plan for a fresh Chain with these alphas."""
    model = Chain()
    return freeze_plan(model, alpha_table(model, values), rule, **options)
