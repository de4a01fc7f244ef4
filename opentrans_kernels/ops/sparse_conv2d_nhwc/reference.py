"""The oracle of ``sparse_conv2d_nhwc``: the pack decoded to a dense weight, then plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..nhwc import accumulator, nhwc
from .pack import ROWS, WARPS, plane
from .shapes import check

__all__ = ["decode", "sparse_conv2d_nhwc"]


def decode(entries, begin, slots, cin: int, cout: int, kernel: int, chunk: int) -> torch.Tensor:
    """The float32 weight ``[Cout, Cin, k, k]`` of a pack."""
    groups, chunks = begin.shape[:2]
    count = (begin[:, :, 1:] - begin[:, :, :-1]).reshape(-1).long()
    where = torch.repeat_interleave(torch.arange(count.numel(), device=count.device), count)
    warp, part, group = where % WARPS, where // WARPS % chunks, where // WARPS // chunks
    key = entries[:-1, 0].long()
    row, dy = key % 32 // kernel, key % 32 % kernel
    channel = slots.long()[group, warp * ROWS + row]
    local, dx = (key >> 8) // plane(kernel), (key >> 8) % plane(kernel)
    weight = torch.zeros(cout, cin, kernel, kernel, device=entries.device)
    values = entries[:-1, 1].contiguous().view(torch.float32)
    weight[channel, part * chunk + local, dy, dx] = values
    return weight


def sparse_conv2d_nhwc(x, entries, begin, slots, bias, residual, cin, kernel, chunk, relu):
    check(x, entries, begin, slots, bias, residual, cin, kernel, chunk)
    wide = accumulator(x.dtype)
    weight = decode(entries, begin, slots, cin, bias.shape[0], kernel, chunk)
    y = F.conv2d(x.to(wide), weight.to(wide), bias.to(wide), padding=kernel // 2)
    if residual is not None:
        y = y + residual.to(wide)
    return nhwc((y.relu() if relu else y).to(x.dtype))
