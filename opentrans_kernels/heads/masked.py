"""The arithmetic of a masked transformer decoder, batch first, from live parameters.

A layer's queries attend to the pixels of a level that their own mask, predicted just before, calls
foreground. The mask is needed at the level's size only, and interpolation commutes with the product
over channels: mask features are resized once per level, not every prediction of every layer. The
sigmoid of a logit is below one half where the logit is negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "Decoded", "Layer", "Level", "Positions", "attention_mask", "decode", "mask_product", "pixels",
    "plain_attention", "project_attention", "require_attention",
]  # fmt: skip

Tensor = torch.Tensor
_OF_ANY_MODULE = frozenset(vars(nn.Module()))


class Level(NamedTuple):
    """Pixels of a level ``[B, HW, C]``, the same with their position added, and (H, W)."""

    tokens: Tensor
    keyed: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """Cross-attention, self-attention and feed-forward, each with its norm before or after.

    attend(x, position) is self-attention; feed(x) the two linear layers with their activation.
    """

    cross: nn.MultiheadAttention
    cross_norm: Callable[[Tensor], Tensor]
    attend: Callable[[Tensor, Tensor], Tensor]
    attend_norm: Callable[[Tensor], Tensor]
    feed: Callable[[Tensor], Tensor]
    feed_norm: Callable[[Tensor], Tensor]
    norm_first: bool

    def __call__(self, x: Tensor, position: Tensor, level: Level, mask: Tensor) -> Tensor:
        def cross(y: Tensor) -> Tensor:
            return plain_attention(self.cross, y + position, level.keyed, level.tokens, mask)

        x = self._step(x, self.cross_norm, cross)
        x = self._step(x, self.attend_norm, lambda y: self.attend(y, position))
        return self._step(x, self.feed_norm, self.feed)

    def _step(
        self, x: Tensor, norm: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return x + change(norm(x)) if self.norm_first else norm(x + change(x))


class Decoded(NamedTuple):
    """``[B, Q, C]`` before the first and after every layer: states, the same normalised, and the
    mask embeddings of all but the last."""

    states: list[Tensor]
    normed: list[Tensor]
    embedded: list[Tensor]


def decode(
    layers: Sequence[Layer],
    queries: Tensor,
    position: Tensor,
    levels: Sequence[Level],
    features: Tensor,
    norm: Callable[[Tensor], Tensor],
    embed: Callable[[Tensor], Tensor],
) -> Decoded:
    """Queries ``[B, Q, C]`` through all layers, which take the levels in turn.

    features: ``[B, C, H, W]``, whose product with ``embed(norm(queries))`` is the masks.
    """
    with torch.no_grad():  # they decide what is attended to, and pass no gradient
        # Channels last: resizing copies the whole map to that form for every size otherwise.
        last = pixels(features).transpose(1, 2).unflatten(2, features.shape[2:])
        small = [
            F.interpolate(last, size=level.size, mode="bilinear", align_corners=False)
            for level in levels[: len(layers)]
        ]
    found = Decoded([queries], [norm(queries)], [])
    for index, layer in enumerate(layers):
        turn = index % len(levels)
        found.embedded.append(embed(found.normed[-1]))
        mask = attention_mask(found.embedded[-1], small[turn])
        found.states.append(layer(found.states[-1], position, levels[turn], mask))
        found.normed.append(norm(found.states[-1]))
    return found


def pixels(maps: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, HW, C]``, contiguous; no copy of a channels_last map."""
    rows = maps.flatten(2).transpose(1, 2)
    if rows.is_contiguous():
        return rows
    # Image by image: torch copies two dimensions in tiles, three with a stride per number.
    copies = [image.contiguous() for image in rows]
    return copies[0].unsqueeze(0) if len(copies) == 1 else torch.stack(copies)


def mask_product(embedded: Tensor, features: Tensor) -> Tensor:
    """``[B, Q, C]`` and ``[B, C, H, W]`` -> ``[B, Q, H, W]``."""
    return torch.matmul(embedded, features.flatten(2)).unflatten(2, features.shape[2:])


@torch.no_grad()
def attention_mask(embedded: Tensor, features: Tensor) -> Tensor:
    """``[B, 1, Q, HW]`` to add to scores: 0, or minus infinity where the logit is negative.

    A query without any pixel attends to all.
    """
    hidden = torch.matmul(embedded, features.flatten(2)) < 0
    hidden &= ~hidden.all(dim=-1, keepdim=True)
    # Not boolean: the fused attention would convert that, once more for every call.
    mask = torch.zeros(hidden.shape, dtype=embedded.dtype, device=embedded.device)
    return mask.masked_fill_(hidden, float("-inf")).unsqueeze(1)


def project_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    """Attention of projected ``[B, N, C]``, heads side by side in the channels."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def require_attention(module: Any) -> str | None:
    """Why ``module`` is not the attention that :func:`plain_attention` computes; None if it is."""
    if type(module) is not nn.MultiheadAttention:
        return f"is a {type(module).__name__}, not nn.MultiheadAttention"
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "has keys or values of another width, or adds some of its own"
    return "is batch first" if module.batch_first else None


def plain_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """What ``module`` computes, without the weights averaged over heads; batch first."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())  # pruning: writes the masked weight that is read below
    weight, bias, width = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    cut = [width, width, width]
    w = weight.split(cut)
    b = (None, None, None) if bias is None else bias.split(cut)
    if query is key:
        both = F.linear(query, weight[: 2 * width], None if bias is None else bias[: 2 * width])
        q, k = both.split([width, width], dim=-1)
    else:
        q, k = F.linear(query, w[0], b[0]), F.linear(key, w[1], b[1])
    out = project_attention(q, k, F.linear(value, w[2], b[2]), module.num_heads, mask)
    return F.linear(out, module.out_proj.weight, module.out_proj.bias)


class Positions:
    """Position embeddings ``[1, HW, C]`` of a module without parameters, kept per size.

    The module itself makes them, and new ones if an attribute changes. One with attributes that
    cannot be compared makes them at every call.
    """

    KEPT = 12

    def __init__(self, make: Callable[[nn.Module, tuple[int, int], Tensor], Tensor]) -> None:
        self._make = make
        self._kept: dict[Any, Tensor] = {}

    def __call__(self, module: nn.Module, size: tuple[int, int], like: Tensor) -> Tensor:
        """For tokens ``like`` ``[B, HW, C]`` of a map of ``size``."""
        own = {k: v for k, v in vars(module).items() if k not in _OF_ANY_MODULE}
        if not all(isinstance(v, (int, float, str, type(None))) for v in own.values()):
            return self._made(module, size, like)
        key = (type(module), *own.items(), size, like.dtype, like.device)
        if key not in self._kept:
            while len(self._kept) >= self.KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._made(module, size, like)
        return self._kept[key]

    def _made(self, module: nn.Module, size: tuple[int, int], like: Tensor) -> Tensor:
        # Never inference tensors: a later call may record gradients.
        with torch.inference_mode(False), torch.no_grad():
            return pixels(self._make(module, size, like.new_zeros(1, like.shape[-1], *size)))
