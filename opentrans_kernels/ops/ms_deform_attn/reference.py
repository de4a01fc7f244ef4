"""Multi-scale deformable attention in plain PyTorch: by gathering, so that borders are explicit."""

from __future__ import annotations

import torch

from ..library import in_float32
from .points import attention_of, locations_of

__all__ = ["ms_deform_attn", "ms_deform_attn_backward"]


@in_float32
def ms_deform_attn(
    value: torch.Tensor,
    shapes: torch.Tensor,
    locations: torch.Tensor,
    weights: torch.Tensor,
    reference: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`opentrans_kernels.ops.ms_deform_attn`; differentiable by autograd."""
    if reference is not None:
        locations = locations_of(locations, reference, shapes)
        weights = attention_of(weights)
    n, _, m, d = value.shape
    q = locations.shape[1]
    out = value.new_zeros(n, m, q, d)
    first = 0
    for level, (h, w) in enumerate(shapes.tolist()):
        if h * w:
            pixels = value[:, first : first + h * w].transpose(1, 2)  # [N, M, HW, D]
            xy = locations[:, :, :, level].transpose(1, 2)  # [N, M, Q, P, 2]
            out = out + _sampled(pixels, h, w, xy, weights[:, :, :, level].transpose(1, 2))
        first += h * w
    return out.transpose(1, 2).reshape(n, q, m * d)


def _sampled(
    pixels: torch.Tensor, h: int, w: int, xy: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted samples of one level: ``[N, M, Q, D]``."""
    size = torch.tensor((w, h), dtype=xy.dtype, device=xy.device)
    at = xy * size - 0.5
    inside = ((at > -1) & (at < size)).all(-1)
    # Selected before anything is computed: what is outside may be NaN.
    at = torch.where(inside[..., None], at, 0.0)
    weights = torch.where(inside, weights, 0.0)
    corner = at.detach().floor()
    fraction = at - corner
    x, y = corner.long().unbind(-1)
    fx, fy = fraction.unbind(-1)
    total = pixels.new_zeros(*xy.shape[:3], pixels.shape[-1])
    for dy, share_y in ((0, 1 - fy), (1, fy)):
        for dx, share_x in ((0, 1 - fx), (1, fx)):
            column, row = x + dx, y + dy
            real = inside & (column >= 0) & (column < w) & (row >= 0) & (row < h)
            index = torch.where(real, row * w + column, 0)
            picked = pixels.gather(
                2, index.flatten(2)[..., None].expand(-1, -1, -1, total.shape[-1])
            )
            picked = torch.where(real[..., None], picked.unflatten(2, index.shape[2:]), 0.0)
            total = total + ((share_x * share_y * weights)[..., None] * picked).sum(3)
    return total


def ms_deform_attn_backward(
    grad: torch.Tensor,
    value: torch.Tensor,
    shapes: torch.Tensor,
    locations: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of value, locations and weights, by autograd through the forward."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (value, locations, weights)]
        out = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    return tuple(
        torch.zeros_like(leaf) if g is None else g.contiguous()
        for g, leaf in zip(found, leaves, strict=True)
    )
