"""Inputs of deformable attention and its oracle; also run in child processes, without pytest."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from opentrans_kernels import ops
from opentrans_kernels.ops.ms_deform_attn import reference as plain

LEVELS = ([(6, 5), (3, 4), (1, 2)], [(7, 3)], [(0, 4), (5, 6), (2, 0)], [(1, 1), (9, 2)])


def make(
    levels=LEVELS[0], *, n=2, m=3, d=5, q=7, p=4, spread=1.0, seed=0, dtype=torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """value, shapes, locations (also outside [0, 1]) and weights."""
    made = torch.Generator().manual_seed(seed)
    pixels = sum(h * w for h, w in levels)
    value = torch.randn(n, pixels, m, d, generator=made, dtype=dtype)
    locations = 0.5 + spread * torch.randn(n, q, m, len(levels), p, 2, generator=made, dtype=dtype)
    weights = torch.randn(n, q, m, len(levels), p, generator=made, dtype=dtype)
    return value, torch.tensor(levels, dtype=torch.int64).view(-1, 2), locations, weights


def sampled(value, shapes, locations, weights) -> torch.Tensor:
    """The same by ``grid_sample``, level by level, as the models do it on a CPU."""
    n, _, m, d = value.shape
    q = locations.shape[1]
    total = value.new_zeros(n * m, d, q)
    first = 0
    for level, (h, w) in enumerate(shapes.tolist()):
        if h * w == 0:
            continue
        image = value[:, first : first + h * w].permute(0, 2, 3, 1).reshape(n * m, d, h, w)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        found = F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False)
        share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        total = total + (found * share).sum(-1)
        first += h * w
    return total.view(n, m * d, q).transpose(1, 2)


def as_double(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def assert_as_exact(out: torch.Tensor, *arguments: torch.Tensor) -> None:
    """``out`` may be off by twice the error of ``grid_sample`` in float32 and a few ulp."""
    exact = sampled(*as_double(*arguments))
    dense = (sampled(*arguments).double() - exact).abs().max() if exact.numel() else 0.0
    top = exact.abs().max() if exact.numel() else 0.0
    error = (out.double() - exact).abs().max() if exact.numel() else 0.0
    assert out.shape == exact.shape
    assert error <= 2 * dense + 8 * 2.0**-23 * top, (float(error), float(dense), float(top))


def boxes_and_offsets(locations, shapes, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """References ``[N, Q, L, size]`` and offsets that amount to about ``locations``."""
    n, q, m, levels, p, _ = locations.shape
    made = torch.Generator().manual_seed(1)
    reference = torch.rand(n, q, levels, size, generator=made, dtype=locations.dtype)
    return reference, 3 * torch.randn(locations.shape, generator=made, dtype=locations.dtype)


def sweep() -> int:
    """Every form and gradient against its oracle; returns how many calls were compared."""
    count = 0
    for levels in LEVELS:
        for d in (1, 4, 5, 8, 16, 31, 32, 64, 72, 136):
            arguments = make(levels, d=d, m=2, q=5)
            out = ops.ms_deform_attn(*arguments)
            assert_as_exact(out, *arguments)
            grads = torch.ops.opentrans_kernels.ms_deform_attn_backward(out, *arguments)
            # The gradient of value alone has no knots.
            exact = plain.ms_deform_attn_backward(*as_double(out, *arguments))[0]
            assert (grads[0] - exact).abs().max() <= 2e-6 * exact.abs().max()
            count += 1
        for q, m, n, p in ((0, 2, 1, 4), (3, 1, 0, 2), (17, 5, 2, 1), (33, 8, 1, 3), (1, 1, 1, 9)):
            arguments = make(levels, q=q, m=m, n=n, p=p, d=32)
            assert_as_exact(ops.ms_deform_attn(*arguments), *arguments)
            count += 1
    for size in (2, 4):
        for p in (1, 4, 5):
            value, shapes, locations, logits = make(p=p, q=19, d=32)
            reference, offsets = boxes_and_offsets(locations, shapes, size)
            out = ops.ms_deform_attn(value, shapes, offsets, 5 * logits, reference=reference)
            exact = ops.ms_deform_attn(
                *as_double(value, shapes, offsets, 5 * logits), reference=reference.double()
            )
            assert (out - exact).abs().max() < 2e-5 * exact.abs().max()
            count += 1
    return count
