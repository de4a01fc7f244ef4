"""Embeddings of pixels that are compared with words: classes first, then nothing is left to embed.

A head that ends with a 1x1 convolution gives every pixel an embedding y = Wx + b of many channels;
a text classifier makes it a unit vector and multiplies it with one of a word. The product with the
words commutes with the convolution, and the length of y is that of Rx + r, where R is the
triangular factor of W: no more rows than x has channels. Neither needs y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .deferred import Deferred, Snapshot
from .linear import linear

__all__ = ["LateEmbeddings", "late_embeddings"]

Tensor = torch.Tensor
_INDEPENDENT = 1e-4


class LateEmbeddings(Deferred):
    """``conv(x)`` [N, D, H, W]; see :func:`late_embeddings`."""

    _map: Tensor
    _conv: nn.Conv2d
    _same: Callable[[], None]
    #: eps of F.normalize over channels; None if the embeddings are as they were computed.
    _eps: float | None = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None and not torch.is_grad_enabled():
            try:
                out = handler(*args, **(kwargs or {}))
            except TypeError:  # called in a way that is not known here
                out = None
            if out is not None:
                return out
        return super().__torch_function__(func, types, args, kwargs)


def late_embeddings(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv(x)`` for a 1x1 convolution, as a tensor that remembers where it comes from.

    Remembered are ``F.normalize`` over channels and, after it, ``F.conv2d`` with a 1x1 weight
    without bias, whose result is then computed without the embeddings. Anything else gets the
    tensor itself, computed when it is first asked for: OpenTransError if weights changed until
    then.
    """
    return _made(x, conv, Snapshot(lambda: [x, *conv.parameters()]).require_same, None)


def _made(
    x: Tensor, conv: nn.Conv2d, same: Callable[[], None], eps: float | None
) -> LateEmbeddings:
    def compute() -> Tensor:
        same()
        y = nn.Conv2d.forward(conv, x)
        return y if eps is None else F.normalize(y, dim=1, eps=eps)

    like = x.new_empty(()).expand(x.shape[0], conv.out_channels, *x.shape[2:])
    made = LateEmbeddings(like, compute)
    made._map, made._conv, made._same, made._eps = x, conv, same, eps
    return made


def _normalize(
    input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None
) -> Any:
    usual = isinstance(input, LateEmbeddings) and input._eps is None and out is None
    if not usual or p != 2.0 or dim not in (1, -3):
        return None
    return _made(input._map, input._conv, input._same, eps)


def _to(input: Any, dtype: Any = None) -> Any:
    return input if dtype == input.dtype else None


def _conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    known = isinstance(input, LateEmbeddings) and input._eps is not None and bias is None
    sizes = (stride, padding, dilation, groups) in ((1, 0, 1, 1), ((1, 1), (0, 0), (1, 1), 1))
    if not known or not sizes or type(weight) is not Tensor or weight.dtype != torch.float32:
        return None
    if weight.dim() != 4 or weight.shape[1:] != (input.shape[1], 1, 1):
        return None
    return _scores(input, weight.flatten(1))


def _scores(late: LateEmbeddings, words: Tensor) -> Tensor | None:
    """[N, K, H, W] for words [K, D]; None where W has no triangular factor to rounding."""
    late._same()
    conv, x = late._conv, late._map
    w = conv.weight.detach().flatten(1)
    b = None if conv.bias is None else conv.bias.detach()
    factor = _factor(w if b is None else torch.cat([w, b[:, None]], 1))
    if factor is None:
        return None
    shift = None if b is None else factor[:, -1].contiguous()
    pixels = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    length = linear(pixels, factor[:, : x.shape[1]].contiguous(), shift)
    length = length.norm(dim=1, keepdim=True).clamp_min_(late._eps or 0.0)
    weight = (words.double() @ w.double()).float()
    scores = linear(pixels, weight, None if b is None else words @ b).div_(length)
    n, _, height, width = x.shape
    return scores.view(n, height, width, -1).permute(0, 3, 1, 2)


def _factor(w: Tensor) -> Tensor | None:
    """R [r, C] with the lengths of w [D, C]: |Rx| = |wx|; None if rounding would show."""
    # In float64: the Gram matrix squares what its factor undoes.
    full = w.double()
    gram = full.t() @ full
    live = gram.diagonal().nonzero().flatten()
    factor, failed = torch.linalg.cholesky_ex(gram[live][:, live], upper=True)
    # What is left of a column beside those before it. Of the first half of float64's digits, some
    # have to remain; where they do not, columns depend on each other.
    left = factor.diagonal() / gram.diagonal()[live].sqrt()
    if int(failed) or (len(live) and float(left.min()) < _INDEPENDENT):
        return None
    wide = full.new_zeros(len(live), w.shape[1])
    wide[:, live] = factor
    return wide.float()


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.normalize: _normalize,
    F.conv2d: _conv2d,
    torch.Tensor.to: _to,
}
