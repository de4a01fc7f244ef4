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


def _channels(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if t is None else t.to(like.dtype).view(1, -1, 1, 1)


def relu_bits(
    z: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None,
    residual: torch.Tensor | None, bits: bool, channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    """See :func:`opentrans_kernels.ops.relu_bits.relu_bits_`."""
    scale, shift = _channels(scale, z), _channels(shift, z)
    if scale is not None and shift is not None:
        torch.addcmul(shift, z, scale, out=z)
    elif scale is not None:
        z.mul_(scale)
    elif shift is not None:
        z.add_(shift)
    if residual is not None:
        z.add_(residual)
    if not bits:
        z.relu_()
        return z.new_empty((0, 0), dtype=torch.uint8)
    live = ~(z <= 0)
    z.masked_fill_(~live, 0)
    rows = _rows(live, channels_last)
    rows = F.pad(rows, (0, -rows.shape[1] % 8))
    groups = rows.reshape(rows.shape[0], rows.shape[1] // 8, 8)
    return (groups * _weights(z)).sum(-1, dtype=torch.uint8)


def relu_bits_backward(
    grad: torch.Tensor, bits: torch.Tensor | None, y: torch.Tensor | None,
    scale: torch.Tensor | None, out: torch.Tensor | None, scaled: torch.Tensor | None,
    channels_last: bool,
) -> None:  # fmt: skip
    """``out = grad`` where the bit is set, or y is alive, 0 elsewhere; ``scaled = scale * out``."""
    live = ~(y <= 0) if y is not None else _unpacked(bits, grad.shape, channels_last)
    zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
    # Selected before it is multiplied too: neither inf nor NaN may pass a closed bit.
    selected = torch.where(live, grad, zero)
    if out is not None:
        out.copy_(selected)
    if scaled is not None:
        torch.mul(selected, _channels(scale, grad), out=scaled)


def _unpacked(bits: torch.Tensor, shape: torch.Size, channels_last: bool) -> torch.Tensor:
    n, c, h, w = shape
    length = h * w * c if channels_last else h * w
    live = (bits.unsqueeze(-1) & _weights(bits)).flatten(1)[:, :length] != 0
    if channels_last:
        return live.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return live.reshape(n, c, h, w)
