"""Heads whose masks are enlarged by what comes after them: they give masks that wait for it.

A mask classifier's head has a ``pixel_decoder`` and a ``predictor`` and returns a dict with
``pred_logits`` and ``pred_masks`` (MaskFormer, Mask2Former, FC-CLIP and their kin). What the head
computes stays its own business; what is new is that its masks are ``lazy_masks``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..topology.behaviour import own_behaviour
from .lazy import lazy_masks
from .parts import Found, HeadPart

__all__ = ["LateMasks", "find"]

KIND = "mask classifier"
_CHILDREN = ("pixel_decoder", "predictor")


class LateMasks(HeadPart):
    """The head, with ``pred_masks`` that are enlarged a tile at a time when classes meet them."""

    what, how = KIND, "masks enlarged tile by tile, where classes meet them"

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        out = self.as_it_was(*args, **kwargs)
        masks = out.get("pred_masks") if type(out) is dict else None
        if isinstance(masks, torch.Tensor):
            return {**out, "pred_masks": lazy_masks(masks)}
        return out


def find(model: nn.Module) -> Iterator[Found]:
    """Every module with the children of a mask classifier's head."""
    for name, module in model.named_modules():
        if all(isinstance(module._modules.get(child), nn.Module) for child in _CHILDREN):
            if (extra := own_behaviour(module)) is not None:
                yield Found(name, KIND, None, extra)
            else:
                yield Found(name, KIND, LateMasks(module), LateMasks.how)
