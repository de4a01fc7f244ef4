"""From what a layer predicts to sampling points: softmax of the logits, locations from offsets."""

from __future__ import annotations

import torch

__all__ = ["attention_of", "locations_of", "reference_gradients"]


def _sizes(shapes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(width, height) per level, ``[L, 1, 2]``."""
    return shapes.flip(1).to(like)[:, None]


def attention_of(logits: torch.Tensor) -> torch.Tensor:
    """Softmax of ``[N, Q, M, L, P]`` over all points of all levels."""
    return logits.flatten(3).softmax(-1).view(logits.shape)


def locations_of(
    offsets: torch.Tensor, reference: torch.Tensor, shapes: torch.Tensor
) -> torch.Tensor:
    """Locations ``[N, Q, M, L, P, 2]`` in [0, 1] of offsets around reference points or boxes."""
    at = reference[:, :, None, :, None]
    if reference.shape[-1] == 2:
        return at + offsets / _sizes(shapes, offsets)
    return at[..., :2] + offsets / offsets.shape[4] * at[..., 2:] * 0.5


def reference_gradients(
    grad_locations: torch.Tensor,
    grad_weights: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    reference: torch.Tensor,
    shapes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of offsets, logits and reference from those of locations and ``weights``, which are
    the softmax of the logits."""
    of_point = grad_locations.sum((2, 4))
    if reference.shape[-1] == 2:
        # A level without pixels has no points, and no gradient to divide by its size.
        of_offsets = grad_locations / _sizes(shapes, offsets).clamp(min=1)
        of_reference = of_point
    else:
        half = 0.5 / offsets.shape[4]
        of_offsets = grad_locations * reference[:, :, None, :, None, 2:] * half
        of_size = (grad_locations * offsets).sum((2, 4)) * half
        of_reference = torch.cat((of_point, of_size), -1)
    mean = (weights * grad_weights).sum((3, 4), keepdim=True)
    return of_offsets, weights * (grad_weights - mean), of_reference
