"""``MultiScaleDeformableAttention``: the compiled module that segmentation trees import.

It is built from CUDA sources that come with each tree, and is not to be had on a CPU. Its two
functions are this package's ``ms_deform_attn``, so that those trees run and train without it.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from types import ModuleType

import torch

from .. import dispatch
from ..errors import UnsupportedModelError
from ..ops.arguments import BadArgument
from ..ops.ms_deform_attn import level_shapes, ms_deform_attn

__all__ = ["NAME", "install_ms_deform_attn", "uninstall_ms_deform_attn"]

NAME = "MultiScaleDeformableAttention"
_log = logging.getLogger(__name__)


def _require_starts(shapes: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    shapes = level_shapes(shapes)
    if shapes.device.type == "cpu":
        sizes = shapes.prod(1)
        right = (sizes.cumsum(0) - sizes).tolist()
        if starts.tolist() != right:
            raise BadArgument(
                f"{NAME}: levels of {shapes.tolist()} start at {right}, one after the other, but "
                f"level_start_index is {starts.tolist()}."
            )
    return shapes


def ms_deform_attn_forward(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_loc: torch.Tensor,
    attn_weight: torch.Tensor,
    im2col_step: int,
) -> torch.Tensor:
    """``[N, Q, M * D]``. ``im2col_step`` splits a batch in the compiled module, and means nothing
    here."""
    shapes = _require_starts(spatial_shapes, level_start_index)
    with torch.no_grad():
        return ms_deform_attn(value, shapes, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_loc: torch.Tensor,
    attn_weight: torch.Tensor,
    grad_output: torch.Tensor,
    im2col_step: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of value, sampling_loc and attn_weight."""
    shapes = _require_starts(spatial_shapes, level_start_index)
    dtype = value.dtype
    name = str(dtype).removeprefix("torch.")
    if dtype in (torch.bfloat16, torch.float16) and value.device.type == "cpu":
        name = "float32"
        value, sampling_loc, attn_weight = value.float(), sampling_loc.float(), attn_weight.float()
    run = dispatch.resolve("ms_deform_attn_backward", value.device.type, name).function()
    with torch.no_grad():
        found = run(grad_output.to(value.dtype), value, shapes, sampling_loc, attn_weight)
    return tuple(grad.to(dtype) for grad in found)  # type: ignore[return-value]


def install_ms_deform_attn() -> ModuleType:
    """Register a module ``MultiScaleDeformableAttention`` that computes with this package.

    Call it before the tree is imported. It has the functions ``ms_deform_attn_forward`` and
    ``ms_deform_attn_backward`` that Deformable-DETR, Mask2Former, FC-CLIP, OneFormer, MaskDINO and
    their kin call. A compiled module of that name is left alone and returned as it is, with a log
    line. Calling it again changes nothing. :func:`uninstall_ms_deform_attn` takes it out again.
    """
    there = sys.modules.get(NAME)
    if there is not None and not hasattr(there, "ms_deform_attn_forward"):
        raise UnsupportedModelError(
            f"an empty module stands in for {NAME} in this process already, and trees that were "
            "imported with it do without the op. Call install_ms_deform_attn() before anything "
            f"puts one there, or delete sys.modules[{NAME!r}] first."
        )
    if there is None and importlib.util.find_spec(NAME) is not None:
        there = importlib.import_module(NAME)
    if there is not None:
        if not hasattr(there, "opentrans_kernels"):
            _log.info("%s is installed already (%s): left as it is", NAME, there)
        return there
    module = ModuleType(NAME, __doc__)
    module.ms_deform_attn_forward = ms_deform_attn_forward  # type: ignore[attr-defined]
    module.ms_deform_attn_backward = ms_deform_attn_backward  # type: ignore[attr-defined]
    module.opentrans_kernels = True  # type: ignore[attr-defined]
    sys.modules[NAME] = module
    _log.info("%s: registered, with the kernels of opentrans_kernels", NAME)
    return module


def uninstall_ms_deform_attn() -> None:
    """Take the module out again, if it is ours. What was imported with it keeps its functions."""
    if hasattr(sys.modules.get(NAME), "opentrans_kernels"):
        del sys.modules[NAME]
