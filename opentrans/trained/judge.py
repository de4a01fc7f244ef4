"""Agreement of a pruned network with the dense one on photographs that nobody trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .crops import Crops, pixels
from .load import Loaded
from .photographs import Photograph, photographs
from .subjects import Subject

__all__ = ["Unseen", "holdout", "judge"]

CROPS = 8  # of every photograph, for a network of one input size


@dataclass(frozen=True)
class Unseen:
    """A hold-out photograph: network input as uint8 [B, 3, H, W], and the dense outputs."""

    name: str
    image: torch.Tensor
    wanted: list[torch.Tensor]


def holdout(
    loaded: Loaded, subject: Subject, photos: Sequence[Photograph] | None = None
) -> list[Unseen]:
    """The hold-out photographs (or ``photos``) with the answers of ``loaded``, which is dense."""
    found = []
    with torch.no_grad():
        for number, photo in enumerate(photographs("holdout") if photos is None else photos):
            if subject.longest is not None:
                image = pixels(photo, subject.longest)[None]
            else:
                crops = Crops([photo], subject.crop, 1, number)
                image = torch.cat([crops.batch(step) for step in range(CROPS)])
            outputs = subject.objective.outputs(loaded.module, loaded.prepare(image))
            found.append(Unseen(photo.name, image, outputs))
    return found


def judge(
    model: nn.Module, loaded: Loaded, subject: Subject, unseen: Sequence[Unseen]
) -> dict[str, Any]:
    """``mean`` over the photographs and the values of each under ``photographs``."""
    each: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for one in unseen:
            outputs = subject.objective.outputs(model, loaded.prepare(one.image))
            each[one.name] = subject.objective.agreement(outputs, one.wanted)
    keys = next(iter(each.values()))
    means = {key: sum(one[key] for one in each.values()) / len(each) for key in keys}
    return {"mean": means, "photographs": each}
