"""A mask classifier that takes its head's output apart as Mask2Former's and FC-CLIP's do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

QUERIES, CLASSES = 20, 5


def resize(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)


def to_image(result: torch.Tensor, size: tuple[int, int], height: int, width: int) -> torch.Tensor:
    """What detectron2's ``sem_seg_postprocess`` does."""
    result = result[:, : size[0], : size[1]].expand(1, -1, -1, -1)
    return resize(result, (height, width))[0]


class PixelDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images)


class Predictor(nn.Module):
    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Embedding(QUERIES, 8)
        self.classes = nn.Linear(8, CLASSES + 1)

    def forward(self, features: torch.Tensor) -> dict[str, Any]:
        queries = self.queries.weight + features.mean((2, 3))[:, None]
        masks = torch.einsum("bqc,bchw->bqhw", 3 * queries, features)
        return {"pred_logits": 2 * self.classes(queries), "pred_masks": masks, "aux_outputs": []}


class Head(nn.Module):
    """Its state once had other names, which it still reads."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = CLASSES
        self.pixel_decoder, self.predictor = PixelDecoder(), Predictor()
        self.scale = nn.Parameter(torch.ones(()))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        if (local_metadata.get("version") or 1) < 2:
            old = prefix + "factor"
            if old in state_dict:
                state_dict[prefix + "scale"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def forward(self, features: dict[str, torch.Tensor], mask: Any = None) -> dict[str, Any]:
        return self.layers(features)

    def layers(self, features: dict[str, torch.Tensor]) -> dict[str, Any]:
        return self.predictor(self.scale * self.pixel_decoder.forward_features(features["res2"]))


class MaskClassifier(nn.Module):
    def __init__(self, first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sem_seg_head = Head()
        self.first = first  # to the image's size before classes meet masks

    def forward(self, images: torch.Tensor, size: tuple[int, int], out: tuple[int, int]) -> Any:
        outputs = self.sem_seg_head({"res2": images})
        if self.training:
            return outputs
        logits, masks = outputs["pred_logits"], outputs["pred_masks"]
        pooled = resize(masks, (images.shape[-2] // 16, images.shape[-1] // 16))
        valid = (pooled > 0).to(pooled).sum(-1).sum(-1) > 0
        masks = resize(masks, tuple(images.shape[-2:]))
        del outputs
        results = []
        for classes, mask in zip(logits, masks, strict=True):
            if self.first:
                mask = to_image(mask, size, *out)
                classes = classes.to(mask)
            scores = self.semantic(classes, mask)
            if not self.first:
                scores = to_image(scores, size, *out)
            results.append(
                (scores, valid, *self.panoptic(classes, mask), *self.instances(classes, mask))
            )
        return results

    def semantic(self, classes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        classes, mask = F.softmax(classes, dim=-1)[..., :-1], mask.sigmoid()
        return torch.einsum("qc,qhw->chw", classes, mask)

    def panoptic(self, classes: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores, labels = F.softmax(classes, dim=-1).max(-1)
        mask = mask.sigmoid()
        keep = labels.ne(self.sem_seg_head.num_classes) & (scores > 0.2)
        kept = mask[keep]
        height, width = kept.shape[-2:]
        area = torch.zeros((height, width), dtype=torch.int32, device=kept.device)
        winner = (scores[keep].view(-1, 1, 1) * kept).argmax(0)
        own = [int((kept[k] >= 0.5).sum()) for k in range(kept.shape[0])]
        return winner, torch.tensor(own), area

    def instances(self, classes: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = F.softmax(classes, dim=-1)[:, :-1]
        chosen = scores.flatten().topk(10, sorted=False).indices // self.sem_seg_head.num_classes
        mask = mask[chosen]
        found = (mask > 0).float()
        inside = (mask.sigmoid().flatten(1) * found.flatten(1)).sum(1)
        return found, inside / (found.flatten(1).sum(1) + 1e-6), torch.zeros(mask.size(0), 4)
