"""Parts of segmentation heads, recognised by structure, proved by running, replaced in place.

The rest of the network goes on calling the same attributes: a replacement keeps parameters and
children of the module it stands for, and :func:`restore_heads` puts the very same modules back.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import PlanError, UnsupportedModelError
from ..plan.models import require_module
from . import (
    atrous,
    decoder,
    deform,
    encoder,
    masked_pool,
    masks,
    named_decoder,
    pixel_decoder,
    pointwise,
    task_decoder,
    zeros,
)
from .lazy import lazy_masks
from .parts import Found, HeadPart, head_parts, swap_in, swap_out
from .report import HeadReport
from .stand_in import install_ms_deform_attn, uninstall_ms_deform_attn

__all__ = [
    "Found",
    "HeadPart",
    "HeadReport",
    "accelerate_heads",
    "install_ms_deform_attn",
    "lazy_masks",
    "restore_heads",
    "uninstall_ms_deform_attn",
]

#: Each yields the parts of one kind; the first that knows a path has it.
FINDERS = (
    deform.find,
    encoder.find,
    pointwise.find,
    pixel_decoder.find,
    decoder.find,
    named_decoder.find,
    task_decoder.find,
    masks.find,
    masked_pool.find,
    atrous.find,
    zeros.find_smooth,
    zeros.find,
)


def accelerate_heads(model: nn.Module) -> HeadReport:
    """Replace the parts of segmentation heads in ``model`` by faster ones with the same outputs.

    Works in eval mode on a CPU in float32; in training mode, and for other tensors, the original
    modules run. Every replacement was run beside its original on noise, and errs by no more than
    twice as much against float64. Predictions of decoder layers before the last are tensors that
    compute when they are first read (OpenTransError if weights or inputs changed until then).

    Raises:
        UnsupportedModelError: no module, or a module in training mode.
        PlanError: heads were replaced before.
    """
    require_module(model)
    if model.training:
        raise UnsupportedModelError(
            "the model is in training mode, and heads are accelerated for inference. Call "
            "model.eval() first; training mode later runs the original modules."
        )
    if there := head_parts(model):
        raise PlanError(
            f"{len(there)} parts of the head are replaced already (first: {next(iter(there))!r}). "
            "Call restore_heads(model) first."
        )
    parts: dict[str, Found] = {}
    with torch.inference_mode(False):
        for find in FINDERS:
            for found in find(model):
                if not found.path:
                    found = Found("", found.kind, None, "is the model itself; pass its parent")
                parts.setdefault(found.path, found)
    swap_in(model, parts.values())
    return HeadReport(list(parts.values()))


def restore_heads(model: nn.Module) -> None:
    """Put the original modules of heads back; nothing to do if there are none."""
    require_module(model)
    swap_out(model, head_parts(model))
