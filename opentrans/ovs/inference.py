"""From masks and classes of queries to a label per pixel, and to segments.

Semantic: Cheng et al., arXiv 2107.06278, section 3.4, the sum over queries of p(class) p(mask).
Panoptic: the same section, every pixel to the query with the highest product, segments that lose
most of their mask dropped, segments of one stuff class joined.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from opentrans_kernels.heads import lazy_masks

__all__ = ["panoptic_segments", "semantic_scores"]


def semantic_scores(class_logits: torch.Tensor, mask_logits: torch.Tensor) -> torch.Tensor:
    """[..., Q, K + 1] (last: no object) and [..., Q, H, W] -> scores [..., K, H, W], 0 or more.

    Of ``lazy_masks``, and of masks in float32 on a CPU without a gradient, no [..., Q, H, W] of
    probabilities is made.
    """
    classes = class_logits.softmax(-1)[..., :-1]
    masks = lazy_masks(mask_logits).sigmoid()
    scores = torch.einsum("...qk,...qhw->...khw", classes, masks)
    return scores if type(scores) is torch.Tensor else scores.as_subclass(torch.Tensor)


def panoptic_segments(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    things: Collection[int],
    *,
    least_score: float = 0.5,
    least_overlap: float = 0.8,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Segments of one image.

    Args:
        class_logits: [Q, K + 1], last column "no object". mask_logits: [Q, H, W].
        things: class numbers whose objects are counted; all others are joined by class.
        least_score: queries with a lower class probability are dropped.
        least_overlap: a query must keep this share of its own mask (logit >= 0).

    Returns:
        int32 [H, W] of segment numbers, 0 where there is none, and per segment ``id``,
        ``category_id``, ``isthing`` and ``score``, as detectron2 does.
    """
    scores, classes = class_logits.softmax(-1).max(-1)
    kept = (classes != class_logits.shape[-1] - 1) & (scores > least_score)
    ids = torch.zeros(mask_logits.shape[-2:], dtype=torch.int32, device=mask_logits.device)
    segments: list[dict[str, Any]] = []
    if not bool(kept.any()):
        return ids, segments
    scores, classes, masks = scores[kept], classes[kept], mask_logits[kept].sigmoid()
    winner = (scores.view(-1, 1, 1) * masks).argmax(0)
    stuff: dict[int, int] = {}
    for number, (score, kind) in enumerate(zip(scores.tolist(), classes.tolist(), strict=True)):
        own = masks[number] >= 0.5
        won = (winner == number) & own
        if not bool(won.any()) or int(won.sum()) < least_overlap * int(own.sum()):
            continue
        if kind not in things and kind in stuff:
            ids[won] = stuff[kind]
            continue
        segment = len(segments) + 1
        ids[won] = segment
        if kind not in things:
            stuff[kind] = segment
        segments.append(
            {"id": segment, "category_id": kind, "isthing": kind in things, "score": score}
        )
    return ids, segments
