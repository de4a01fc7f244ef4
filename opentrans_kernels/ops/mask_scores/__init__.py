"""``mask_scores``: classes times enlarged masks, without a full-size map of every query."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..arguments import BadArgument
from ..library import define, kernel_for
from . import reference as plain

__all__ = ["mask_scores"]

_HALF = (torch.bfloat16, torch.float16)
_TOO_LARGE = 1 << 23  # the kernel counts columns in 32 bits, exactly in float32


def _fake(masks, classes, size, crop, resize):
    height, width = resize or crop or size or masks.shape[2:]
    return masks.new_empty(masks.shape[0], classes.shape[2], height, width)


OP = define(
    "mask_scores",
    "(Tensor masks, Tensor classes, int[] size, int[] crop, int[] resize) -> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:mask_scores",
)


def _pair(name: str, given: Sequence[int] | None) -> list[int]:
    pair = [] if given is None else [int(n) for n in given]
    if given is not None and (len(pair) != 2 or not all(1 <= n < _TOO_LARGE for n in pair)):
        raise BadArgument(
            f"mask_scores: {name} must be a height and a width of at least 1 and less than "
            f"{_TOO_LARGE}, got {pair}."
        )
    return pair


def _check(
    masks: torch.Tensor, classes: torch.Tensor, size: list[int], crop: list[int], resize: list[int]
) -> None:
    if classes.dtype != masks.dtype or classes.device != masks.device:
        raise BadArgument(
            f"mask_scores: classes are {classes.dtype} on {classes.device}, but masks are "
            f"{masks.dtype} on {masks.device}. Convert one of them; autocast does it for you."
        )
    if masks.dim() < 3 or classes.shape[:-1] != masks.shape[:-2]:
        raise BadArgument(
            "mask_scores: masks must be [..., Q, h, w] and classes [..., Q, K] with the same "
            f"leading sizes, got {list(masks.shape)} and {list(classes.shape)}."
        )
    if (size or resize) and 0 in masks.shape[-2:]:
        raise BadArgument(
            f"mask_scores: masks of {list(masks.shape[-2:])} have no pixels to resize."
        )
    there = size or masks.shape[-2:]
    if crop and (crop[0] > there[0] or crop[1] > there[1]):
        raise BadArgument(
            f"mask_scores: crop is {crop}, larger than the masks, which are {list(there)} there. "
            "Cut to a size that is not larger."
        )


def mask_scores(
    masks: torch.Tensor,
    classes: torch.Tensor,
    *,
    size: Sequence[int] | None = None,
    crop: Sequence[int] | None = None,
    resize: Sequence[int] | None = None,
) -> torch.Tensor:
    """``sum over q of classes[q, k] * sigmoid(masks[q])``, with masks enlarged on the way.

    Tile by tile: no map of all queries at the size of the result is made. Where a gradient is
    asked for, the reference computes it with all of them.

    Args:
        masks: ``[..., Q, h, w]`` logits. float32; bfloat16 and float16, computed in float32 on a
            CPU; float64 on the reference. Any strides.
        classes: ``[..., Q, K]``, dtype of masks.
        size: height and width masks are resized to (bilinear, ``align_corners=False``), each step
            as ``torch.nn.functional.interpolate`` does it.
        crop: height and width they are then cut to, from the top left.
        resize: height and width they are then resized to again.

    Returns:
        ``[..., K, H, W]``, dtype of masks, contiguous. Equal bits for any number of threads.

    Raises:
        BadArgument: sizes or dtypes that do not fit.
        KernelUnavailable: no kernel for this device and dtype.
    """
    steps = (_pair("size", size), _pair("crop", crop), _pair("resize", resize))
    _check(masks, classes, *steps)
    leading, dtype = masks.shape[:-3], masks.dtype
    count = math.prod(leading)
    masks = masks.reshape(count, *masks.shape[-3:])
    classes = classes.reshape(count, *classes.shape[-2:])
    if dtype in _HALF and masks.device.type == "cpu":
        masks, classes = masks.float(), classes.float()
    if torch.is_grad_enabled() and (masks.requires_grad or classes.requires_grad):
        out = plain.mask_scores(masks, classes, *steps)
    else:
        out = kernel_for("mask_scores", masks)(masks, classes, *steps)
    return out.to(dtype).view(*leading, *out.shape[1:])
