"""Convolution of an enlarged map, computed from the small one.

Enlarging acts on pixels, a tap of a convolution on channels: they commute. So every tap multiplies
the small map, and what it gives is enlarged and shifted, first along the rows, then along the
columns, by matrices that hold torch's own weights of interpolation and zeros for the padding. Next
to a convolution at full size this is a small part of the work where the map is enlarged at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["add_convolution_of_enlarged", "pays"]

Tensor = torch.Tensor
_SHARE = 0.7  # of the multiplications of a convolution at full size, above which that is taken


def pays(x: Tensor, weight: Tensor, size: tuple[int, int], out: tuple[int, int]) -> bool:
    """Whether this takes fewer multiplications than enlarging to ``size`` and convolving."""
    (h, w), (cout, cin, ky, kx) = x.shape[2:], weight.shape
    taps = h * w * cin * ky * kx * cout
    columns = h * ky * out[1] * w * kx * cout
    rows = out[0] * h * ky * out[1] * cout
    return taps + columns + rows < _SHARE * out[0] * out[1] * ky * kx * cin * cout


def add_convolution_of_enlarged(
    to: Tensor,
    x: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    *,
    padding: tuple[int, int],
    dilation: tuple[int, int],
    align_corners: bool,
) -> Tensor:
    """``to`` + the convolution of ``x`` enlarged to ``size`` by bilinear interpolation.

    to: [N, Cout, H, W], dense and channels_last; it may be written to. x: [N, Cin, h, w].
    weight: [Cout, Cin, kh, kw]. Stride 1, no groups. Returns [N, Cout, H, W], channels_last.
    """
    n, _, h, w = x.shape
    cout, cin, kh, kw = weight.shape
    height, width = to.shape[2:]
    rows = _spread(h, size[0], height, kh, padding[0], dilation[0], align_corners, x)
    columns = _spread(w, size[1], width, kw, padding[1], dilation[1], align_corners, x)
    taps = x.permute(0, 2, 3, 1).reshape(n * h * w, cin) @ weight.permute(1, 2, 3, 0).reshape(
        cin, kh * kw * cout
    )
    # [N, h, w, kh, kw, Cout] -> the sum over w and kw for every row, tap row and column.
    taps = taps.view(n, h, w, kh, kw, cout).permute(0, 1, 3, 2, 4, 5)
    wide = columns @ taps.reshape(n * h * kh, w * kw, cout)
    total = to.permute(0, 2, 3, 1).reshape(n, height, width * cout)
    total = total.baddbmm_(rows.expand(n, -1, -1), wide.view(n, h * kh, width * cout))
    return total.view(n, height, width, cout).permute(0, 3, 1, 2)


def _spread(
    small: int, full: int, out: int, taps: int, padding: int, dilation: int, align_corners: bool,
    like: Tensor,
) -> Tensor:  # fmt: skip
    """[out, small * taps]: share of a pixel of the small map in what a tap reads."""
    eye = torch.eye(small, dtype=like.dtype, device=like.device)[None, :, :, None]
    shares = F.interpolate(eye, (full, 1), mode="bilinear", align_corners=align_corners)[0, :, :, 0]
    shares = F.pad(shares, (padding, padding))
    parts = [shares[:, tap * dilation : tap * dilation + out] for tap in range(taps)]
    return torch.stack(parts, 1).view(small * taps, out).t()
