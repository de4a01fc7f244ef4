"""The published table of training FLOPs (Han et al.), by its own rule and by the honest one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .accounting import TrainingFlops, training_flops
from .systems import area_of, head_parts

__all__ = ["PUBLISHED_27", "TrainingRow", "published_half", "training_table"]

IMAGES = 28 * 50_000
LATE = 0.8  # share of the images behind iteration 10,000 of 50,000
FLAT_DENSITY = 0.1  # what the published rule charges for a masked layer
# The frozen list kept in the released code: every 3x3 but layer4.1.conv2, and nine 1x1.
_TRAINS_3X3 = "layer4.1.conv2"
PUBLISHED_27 = (
    "layer1.0.conv1", "layer1.1.conv3", "layer1.2.conv3", "layer2.0.conv1",
    "layer2.0.downsample.0", "layer2.1.conv1", "layer2.2.conv3", "layer2.3.conv3",
    "layer3.0.conv1",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingRow:
    """PMAC of the schedule. published: as printed, None if no table has the row."""

    title: str
    published: float | None
    paper: float
    honest: float
    unchanged: float

    @property
    def saving(self) -> float:
        """Share of the honest work of training everything that is saved, 0 to 1."""
        return 1 - self.honest / self.unchanged


def published_half(threes: Iterable[str]) -> list[str]:
    """The 27 frozen convolutions of the released code; ``threes``: names of all 3x3 of RN50."""
    return [name for name in threes if name != _TRAINS_3X3] + list(PUBLISHED_27)


def training_table(size: tuple[int, int] = (512, 512)) -> list[TrainingRow]:
    """Rows of the table, at (height, width) in pixels, multiples of 32.

    Raises OpenTransError for another size.
    """
    from opentrans_kernels.clip_resnet import ModifiedResNet, arch_of

    area_of(size)
    shape = arch_of("RN50")
    with torch.device("meta"):
        model = ModifiedResNet(shape.layers, shape.output_dim, image_size=512)
    head = sum(part.macs["fvcore"] for part in head_parts("han", size))
    threes = [n for n, m in model.named_modules() if _is_3x3(m)]
    half = published_half(threes)
    prefix = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not name.startswith(("layer3", "layer4"))
    ]

    def count(frozen: list[str] | None, mask: float | None, rule: str) -> TrainingFlops:
        return training_flops(
            model, frozen, mask, input_size=size, rule=rule, active=LATE, head_macs=head,
            norms="full", leave_out=["attnpool"],
        )  # type: ignore[arg-type]  # fmt: skip

    cases: tuple[tuple[str, float | None, list[str] | None, float | None], ...] = (
        ("none", 181.4, None, None),
        ("published 27 (small alpha)", 159.6, half, None),
        ("published 27, masks", 122.2, half, FLAT_DENSITY),
        ("every 3x3", None, threes, None),
        ("stem to layer2", None, prefix, None),
    )
    unchanged = count(None, None, "honest").total(IMAGES) / 1e15
    return [
        TrainingRow(
            title,
            published,
            count(frozen, mask, "paper").total(IMAGES) / 1e15,
            count(frozen, mask, "honest").total(IMAGES) / 1e15,
            unchanged,
        )
        for title, published, frozen, mask in cases
    ]


def _is_3x3(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
