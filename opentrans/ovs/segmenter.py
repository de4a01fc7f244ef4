"""Whole open-vocabulary models from a CLIP tower, a head and a text classifier, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.heads import lazy_masks
from opentrans_kernels.topology import find_trunk, forward_trunk

from .deeplab import DeepLabHead
from .folder import IGNORE
from .inference import semantic_scores
from .mask_head import MaskHead, MaskTargets
from .text import TextClassifier

__all__ = ["MaskSegmenter", "PixelSegmenter", "TrunkFeatures", "pixel_loss"]


class TrunkFeatures(nn.Module):
    """A CLIP ResNet as feature maps: [B, 3, H, W] -> {"res2": ..., ..., "res5": ...}.

    Strides 4 to 32. Layers are looked up by name at each call, so a tower that was pruned or
    accelerated in place is used as it is.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self._trunk = find_trunk(tower)
        if self._trunk.stem is None or len(self._trunk.stages) != 4:
            raise OpenTransError(
                f"{type(tower).__name__} is no ResNet with a stem and four stages "
                f"({'; '.join(self._trunk.notes) or 'none found'}). Pass open_clip's model.visual."
            )

    @property
    def channels(self) -> dict[str, int]:
        """Channels by feature name."""
        with torch.no_grad():
            parameter = next(self.tower.parameters())
            training = [m for m in self.tower.modules() if m.training]
            self.tower.eval()
            maps = self(parameter.new_zeros(1, 3, 64, 64))
            for module in training:
                module.training = True
        return {name: value.shape[1] for name, value in maps.items()}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = forward_trunk(self._trunk, images)
        return {f"res{i}": value for i, value in enumerate(maps[1:], start=2)}


class PixelSegmenter(nn.Module):
    """Every pixel gets an embedding: tower, DeepLab head, text classifier."""

    def __init__(
        self, backbone: nn.Module, head: DeepLabHead | nn.Module, classifier: TextClassifier
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.classifier = backbone, head, classifier

    def forward(self, images: torch.Tensor, classes: Sequence[str]) -> torch.Tensor:
        """[B, 3, H, W] -> logits [B, K, H, W]."""
        logits = self.classifier(self.head(self.backbone(images)), classes)
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)

    def loss(
        self, images: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """labels: [B, H, W], class numbers or ``IGNORE`` (255)."""
        return {"loss_sem_seg": pixel_loss(self(images, classes), labels)}


class MaskSegmenter(nn.Module):
    """Every query gets a mask and an embedding: tower, mask head, text classifier."""

    def __init__(self, backbone: nn.Module, head: MaskHead, classifier: TextClassifier) -> None:
        super().__init__()
        self.backbone, self.head, self.classifier = backbone, head, classifier

    def forward(self, images: torch.Tensor, classes: Sequence[str]) -> torch.Tensor:
        """[B, 3, H, W] -> scores [B, K, H, W]."""
        masks, embeddings = self.head(self.backbone(images))
        logits = self.head.class_logits(embeddings[-1], self.classifier, classes)
        last = lazy_masks(masks[-1])
        full = F.interpolate(last, images.shape[-2:], mode="bilinear", align_corners=False)
        return semantic_scores(logits, full)

    def loss(
        self, images: torch.Tensor, targets: MaskTargets, classes: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """targets: as ``mask_targets`` returns them."""
        masks, embeddings = self.head(self.backbone(images))
        return self.head.loss(masks, embeddings, targets, self.classifier, classes)


def pixel_loss(logits: torch.Tensor, labels: torch.Tensor, ignore: int = IGNORE) -> torch.Tensor:
    """Mean cross-entropy over labelled pixels; zero, still reaching ``logits``, without any.

    logits: [B, K, H, W]. labels: [B, H, W]. Raises OpenTransError for a label that is no class.
    """
    known = labels != ignore
    if (
        bool(known.any())
        and not 0 <= int(labels[known].min()) <= int(labels[known].max()) < (logits.shape[1])
    ):
        raise OpenTransError(
            f"labels run from {int(labels[known].min())} to {int(labels[known].max())} (without "
            f"{ignore}), the vocabulary has classes 0 to {logits.shape[1] - 1}. Use the class list "
            "that belongs to these labels."
        )
    total = F.cross_entropy(logits.float(), labels.long(), ignore_index=ignore, reduction="sum")
    return total / known.sum().clamp(min=1)
