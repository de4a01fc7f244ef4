"""``ms_deform_attn``: attention that samples maps of several scales (Deformable DETR)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ... import dispatch, native
from ..arguments import BadArgument
from ..library import (
    LIBRARY,
    NAMESPACE,
    define,
    kernel_for,
    once_differentiable,
)
from . import reference as plain
from .points import attention_of, locations_of, reference_gradients

__all__ = ["level_shapes", "ms_deform_attn"]

_HALF = (torch.bfloat16, torch.float16)

LIBRARY.define(
    "ms_deform_attn_backward(Tensor grad, Tensor value, Tensor shapes, Tensor locations, "
    "Tensor weights) -> (Tensor, Tensor, Tensor)"
)
torch.library.register_fake(
    f"{NAMESPACE}::ms_deform_attn_backward",
    lambda grad, value, shapes, locations, weights: tuple(
        t.new_empty(t.shape) for t in (value, locations, weights)
    ),
    lib=LIBRARY,
)
if not native.load():
    LIBRARY.impl("ms_deform_attn_backward", plain.ms_deform_attn_backward, "CPU")


def _on_cuda(op: str, value_at: int) -> Callable[..., Any]:
    """What ``op`` runs on CUDA tensors: the row of the dispatch table, below autograd."""

    def run(*arguments: Any) -> Any:
        dtype = str(arguments[value_at].dtype).removeprefix("torch.")
        found = dispatch.resolve(op, "cuda", dtype)
        if found.row.backend != "triton":
            return found.function()(*arguments)
        # The row names the operator, which is differentiable and is what leads here.
        return getattr(importlib.import_module(f"{__name__}.triton"), op)(*arguments)

    return run


LIBRARY.impl("ms_deform_attn_backward", _on_cuda("ms_deform_attn_backward", 1), "CUDA")
BACKWARD = torch.ops.opentrans_kernels.ms_deform_attn_backward.default


def _fake(value, shapes, locations, weights, reference=None):
    n, _, m, d = value.shape
    return value.new_empty(n, locations.shape[1], m * d)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: torch.Tensor):
    once_differentiable("ms_deform_attn")
    value, shapes, locations, weights, reference = ctx.saved_tensors
    dtype = value.dtype
    if reference is not None and dtype in _HALF:  # a location in half would be off by pixels
        locations, weights, reference = (t.float() for t in (locations, weights, reference))
    offsets = locations
    if reference is not None:
        locations = locations_of(offsets, reference, shapes)
        weights = attention_of(weights)
    run = kernel_for("ms_deform_attn_backward", value)
    of_value, of_locations, of_weights = run(grad, value, shapes, locations, weights)
    of_reference = None
    if reference is not None:
        of_locations, of_weights, of_reference = reference_gradients(
            of_locations, of_weights, offsets, weights, reference, shapes
        )
        of_locations, of_weights, of_reference = (
            t.to(dtype) for t in (of_locations, of_weights, of_reference)
        )
    return of_value, None, of_locations, of_weights, of_reference


OP = define(
    "ms_deform_attn",
    "(Tensor value, Tensor shapes, Tensor locations, Tensor weights, Tensor? reference=None) "
    "-> Tensor",
    fake=_fake,
    fallback=f"{__name__}.reference:ms_deform_attn",
    backward=_backward,
    setup_context=_setup,
)
LIBRARY.impl("ms_deform_attn", _on_cuda("ms_deform_attn", 0), "CUDA")
# Not its half: eight bits of a location are a pixel of a map that is 256 wide.
torch.library.register_autocast(f"{NAMESPACE}::ms_deform_attn", "cuda", torch.float32, lib=LIBRARY)


def level_shapes(shapes: torch.Tensor | Sequence[Sequence[int]]) -> torch.Tensor:
    """``[L, 2]`` int64 heights and widths, from such a tensor or a sequence of pairs."""
    if not isinstance(shapes, torch.Tensor):
        shapes = torch.tensor([list(pair) for pair in shapes], dtype=torch.int64).view(-1, 2)
    if shapes.dim() != 2 or shapes.shape[1] != 2 or shapes.dtype not in (torch.int64, torch.int32):
        raise BadArgument(
            "ms_deform_attn: spatial_shapes must be integers [L, 2], the height and width of every "
            f"level, got {shapes.dtype} {list(shapes.shape)}."
        )
    return shapes.long()


def _check(
    value: torch.Tensor,
    shapes: torch.Tensor,
    locations: torch.Tensor,
    weights: torch.Tensor,
    reference: torch.Tensor | None,
) -> None:
    points = {"locations": locations, "weights": weights, "reference": reference}
    for name, t in points.items():
        if t is not None and (t.dtype != value.dtype or t.device != value.device):
            raise BadArgument(
                f"ms_deform_attn: {name} is {t.dtype} on {t.device}, but value is {value.dtype} on "
                f"{value.device}. Convert one of them; autocast does it for you."
            )
    if value.dim() != 4 or locations.dim() != 6:
        raise BadArgument(
            "ms_deform_attn: value must be [N, S, M, D] and locations [N, Q, M, L, P, 2], got "
            f"{list(value.shape)} and {list(locations.shape)}."
        )
    n, s, m, _ = value.shape
    q, levels, p = locations.shape[1], len(shapes), locations.shape[4]
    wanted = {"locations": (n, q, m, levels, p, 2), "weights": (n, q, m, levels, p)}
    for name, shape in wanted.items():
        if points[name].shape != shape:
            raise BadArgument(
                f"ms_deform_attn: {name} must be {list(shape)} for value {list(value.shape)}, "
                f"{q} queries and {levels} levels, got {list(points[name].shape)}."
            )
    if reference is not None and (
        reference.shape[:-1] != (n, q, levels) or reference.shape[-1] not in (2, 4)
    ):
        raise BadArgument(
            f"ms_deform_attn: reference must be {[n, q, levels]} points (x, y) or boxes "
            f"(x, y, width, height), got {list(reference.shape)}."
        )
    # The values of a tensor on another device, or of a tracer's, are not for this to read.
    if shapes.device.type == "cpu" and not torch.compiler.is_compiling():
        pixels = sum(h * w for h, w in shapes.tolist())
        if pixels != s or bool((shapes < 0).any()):
            raise BadArgument(
                f"ms_deform_attn: levels of {shapes.tolist()} have {pixels} pixels, but value has "
                f"{s}. Pass the (height, width) of every level, in the order of value."
            )


def ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor | Sequence[Sequence[int]],
    locations: torch.Tensor,
    weights: torch.Tensor,
    *,
    reference: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of samples of every level's map, bilinear between pixels and zero outside.

    Args:
        value: ``[N, S, M, D]``: the pixels of all levels one after the other, M heads of D
            channels. float32; bfloat16 and float16, computed in float32; float64 on the
            reference. Any strides. Under autocast everything becomes float32.
        spatial_shapes: ``[L, 2]`` heights and widths; their products add up to S.
        locations: ``[N, Q, M, L, P, 2]``: (x, y) in [0, 1] of P points per level, dtype of value.
            NaN and infinite ones are outside; a point outside adds nothing, whatever its weight.
        weights: ``[N, Q, M, L, P]``, dtype of value.
        reference: ``[N, Q, L, 2]`` points or ``[N, Q, L, 4]`` boxes (x, y, width, height) in
            [0, 1]. With it ``weights`` are logits of a softmax over all L * P points, and
            ``locations`` are offsets: in pixels around a point, or in ``width / (2 P)`` and
            ``height / (2 P)`` around a box's centre. One pass, no tensor of locations.

    Returns:
        ``[N, Q, M * D]``, dtype of value, contiguous. Equal bits for any number of threads.

    The gradient of a location is that of the cell between the pixels ``floor(x)`` and
    ``floor(x) + 1``.

    On CUDA sizes that are given on the device are not read by the host, so nothing waits and graphs
    can be captured; wrong ones give wrong samples of ``value``, never a read outside it. The
    gradient of value is summed there by atomics: its last bits differ from run to run.

    Raises:
        BadArgument: sizes or dtypes that do not fit.
        KernelUnavailable: no kernel for this device and dtype.
    """
    shapes = level_shapes(spatial_shapes)
    device = value.device.type
    # Layers around it give half, some float32.
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        parts = (value, locations, weights, reference)
        value, locations, weights, reference = (None if t is None else t.float() for t in parts)
    _check(value, shapes, locations, weights, reference)
    if value.dtype in _HALF and value.device.type == "cpu":
        parts = (value, locations, weights, reference)
        value, locations, weights, reference = (None if t is None else t.float() for t in parts)
        out = kernel_for("ms_deform_attn", value)(value, shapes, locations, weights, reference)
        return out.to(parts[0].dtype)
    return kernel_for("ms_deform_attn", value)(value, shapes, locations, weights, reference)
