"""ReLU with one bit per element, in plain PyTorch: any device and any floating dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["relu_bits", "relu_bits_backward"]


def _rows(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """``[rows, length]``: images with their channels last, or planes."""
    n, c, h, w = t.shape
    if channels_last:
        return t.permute(0, 2, 3, 1).reshape(n, h * w * c)
    return t.reshape(n * c, h * w)


def _weights(like: torch.Tensor) -> torch.Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=like.device)


def relu_bits(z: torch.Tensor, residual: torch.Tensor | None, channels_last: bool) -> torch.Tensor:
    """See :func:`opentrans_kernels.ops.relu_bits.relu_bits_`."""
    if residual is not None:
        z.add_(residual)
    live = ~(z <= 0)
    z.masked_fill_(~live, 0)
    rows = _rows(live, channels_last)
    rows = F.pad(rows, (0, -rows.shape[1] % 8))
    groups = rows.reshape(rows.shape[0], rows.shape[1] // 8, 8)
    return (groups * _weights(z)).sum(-1, dtype=torch.uint8)


def relu_bits_backward(
    grad: torch.Tensor, bits: torch.Tensor, out: torch.Tensor, channels_last: bool
) -> None:
    """``out = grad`` where the bit is set, 0 elsewhere."""
    n, c, h, w = grad.shape
    length = h * w * c if channels_last else h * w
    live = (bits.unsqueeze(-1) & _weights(grad)).flatten(1)[:, :length] != 0
    live = (
        live.reshape(n, h, w, c).permute(0, 3, 1, 2) if channels_last else live.reshape(n, c, h, w)
    )
    out.copy_(torch.where(live, grad, torch.zeros((), dtype=grad.dtype, device=grad.device)))
