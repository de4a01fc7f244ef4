"""What a student is compared with while it trains, and by what it is judged afterwards.

An objective knows the outputs of one kind of network. Its targets are the dense network's outputs;
no label is needed anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .agreement import cosine, f_score, mean_absolute_error

__all__ = ["EdgeMaps", "FeatureMaps", "Features", "Objective"]

Outputs = Sequence[torch.Tensor]


class Objective(Protocol):
    """Outputs, loss and agreement of one kind of network."""

    def outputs(self, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        """What is compared, of a batch of network inputs [B, 3, H, W]; first dimension B."""

    def loss(
        self, outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """A scalar; 0 where the student equals the dense network."""

    def agreement(self, outputs: Outputs, targets: Outputs) -> dict[str, float]:
        """Numbers by name, of one photograph."""


class EdgeMaps:
    """Of the edge detector: five side maps and the fused one.

    The loss is the cross-entropy of every pixel of every map against the dense probability, less
    the least it can be (the entropy of the target), so that equal maps give 0. The fused map counts
    as much as the five others together.
    """

    def outputs(self, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        maps = torch.cat(model.maps(x), 1)  # type: ignore[operator]
        return [maps]

    def loss(
        self, outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        logits, wanted = outputs[0], targets[0].float()
        p = wanted.sigmoid()
        least = F.binary_cross_entropy_with_logits(wanted, p, reduction="none")
        above = F.binary_cross_entropy_with_logits(logits, p, reduction="none") - least
        each = above.mean((0, 2, 3))
        return each[-1] + each[:-1].mean()

    def agreement(self, outputs: Outputs, targets: Outputs) -> dict[str, float]:
        found, wanted = outputs[0][:, -1].sigmoid(), targets[0][:, -1].float().sigmoid()
        return {"f_score": f_score(found, wanted), "mae": mean_absolute_error(found, wanted)}


class Features:
    """Of a classifier: the pooled features and the logits.

    The loss is one minus the cosine of the features plus the Kullback-Leibler divergence of the
    class probabilities. The model has ``features(x)`` [B, C] and ``fc(features)`` [B, K].
    """

    def outputs(self, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        features = model.features(x)  # type: ignore[operator]
        return [features, model.fc(features)]  # type: ignore[operator]

    def loss(
        self, outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        (features, logits), (wanted, classes) = outputs, targets
        apart = 1 - F.cosine_similarity(features, wanted.float(), dim=1).mean()
        want = F.log_softmax(classes.float(), 1)
        return apart + F.kl_div(
            F.log_softmax(logits, 1), want, reduction="batchmean", log_target=True
        )

    def agreement(self, outputs: Outputs, targets: Outputs) -> dict[str, float]:
        (features, logits), (wanted, classes) = outputs, targets
        same = (logits.argmax(1) == classes.argmax(1)).double().mean()
        return {
            "cosine": cosine(features, wanted.float()),
            "logit_error": mean_absolute_error(logits, classes),
            "top1": float(same),
        }


class FeatureMaps(Features):
    """The same, and the maps of the last stages before they are pooled.

    A pooled vector is one target per picture; a map has as many as pixels, which a few hundred
    photographs do not let a student learn by heart. The model has ``maps(x)`` besides, [B, C, H, W]
    each. To the loss comes, for every map, the mean over pictures of the squared distance over the
    squared length of the dense map.
    """

    def outputs(self, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        maps = model.maps(x)  # type: ignore[operator]
        features = model.pooled(maps[-1])  # type: ignore[operator]
        return [features, model.fc(features), *maps]  # type: ignore[operator]

    def loss(
        self, outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        total = super().loss(outputs[:2], targets[:2])
        for found, wanted in zip(outputs[2:], targets[2:], strict=True):
            dense = wanted.float().flatten(1)
            apart = (found.flatten(1) - dense).square().sum(1)
            total = total + (apart / dense.square().sum(1).clamp_min(1e-12)).mean()
        return total

    def agreement(self, outputs: Outputs, targets: Outputs) -> dict[str, float]:
        return super().agreement(outputs[:2], targets[:2])
