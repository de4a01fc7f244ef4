"""Scores of classes from masks in plain PyTorch: every map of every query, as the models do it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..library import in_float32

__all__ = ["mask_scores", "resized"]


def resized(
    masks: torch.Tensor, size: Sequence[int], crop: Sequence[int], resize: Sequence[int]
) -> torch.Tensor:
    """``[N, Q, h, w]`` resized, cut and resized again; an empty sequence leaves a step out."""
    if masks.shape[1] == 0:  # which interpolate refuses
        return masks.new_empty(*masks.shape[:2], *(resize or crop or size or masks.shape[2:]))
    if size:
        masks = F.interpolate(masks, tuple(size), mode="bilinear", align_corners=False)
    if crop:
        masks = masks[..., : crop[0], : crop[1]]
    if resize:
        masks = F.interpolate(masks, tuple(resize), mode="bilinear", align_corners=False)
    return masks


@in_float32
def mask_scores(
    masks: torch.Tensor,
    classes: torch.Tensor,
    size: Sequence[int],
    crop: Sequence[int],
    resize: Sequence[int],
) -> torch.Tensor:
    """See :func:`opentrans_kernels.ops.mask_scores`; differentiable by autograd."""
    full = resized(masks, size, crop, resize).sigmoid()
    return torch.einsum("nqk,nqhw->nkhw", classes, full)
