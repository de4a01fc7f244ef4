"""CLIP's attention pool over the pixels of every mask: FC-CLIP's classes out of the vocabulary.

A backbone with ``clip_model.visual.attnpool`` has a method ``visual_prediction_forward(x, masks)``
that pools a map once per mask. The query is the same for all masks, the mean of the map, so

- it is projected once, not once per mask;
- a score is ``q_h . (K_h y) = (K_h^T q_h) . y``: the keys are never projected, and their bias, the
  same for every pixel, drops out of the softmax;
- a score does not depend on the mask, so with ``e = exp(score)`` the pool of mask ``m`` is
  ``sum_p m_p e_p v_p / sum_p m_p e_p``: both sums for all masks and heads are one product.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.sparse_linear import sparse_linear
from .packed import packed
from .parts import Found, HeadPart, prove

__all__ = ["MaskedPool", "find"]

KIND = "attention pool of masks"
_PLACE = ("clip_model", "visual", "attnpool")
_LINEARS = ("q_proj", "k_proj", "v_proj", "c_proj")
#: Of the scores of a head, largest less smallest. Beyond it the numbers of a mask that lies where
#: scores are low would lose digits, because all masks share the largest score.
_WIDEST = 60.0

Tensor = torch.Tensor


class MaskedPool(HeadPart):
    """The backbone, whose ``visual_prediction_forward`` is the fast one. All else is its own."""

    what, how = KIND, "one query for all masks, no keys, all masks in one product"

    def __init__(self, original: nn.Module, path: str = "") -> None:
        super().__init__(original)
        pool, at = original.get_submodule(".".join(_PLACE)), ".".join((path, *_PLACE)).lstrip(".")
        made = {name: packed(f"{at}.{name}", pool.get_submodule(name)) for name in _LINEARS[2:]}
        self.__dict__["opentrans_packed"] = made
        if any(made.values()):
            self.__dict__["how"] = f"{self.how}; packed where most weights are zero"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.as_it_was(*args, **kwargs)

    def visual_prediction_forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Map ``[B, C, H, W]`` and mask logits ``[B, Q, H, W]`` to embeddings ``[B, Q, E]``."""
        if masks is not None and x.dim() == masks.dim() == 4 and x.numel() and masks.numel():
            if x.shape[2:] == masks.shape[2:] and self.ready([x, masks]):
                return self.fast(x, masks)
        return self._as_it_was(x, masks)

    def fast(self, x: Tensor, masks: Tensor) -> Tensor:
        pool: Any = self.get_submodule(".".join(_PLACE))
        heads, (batch, width) = pool.num_heads, x.shape[:2]
        centre, positions = pool.positional_embedding[:1], pool.positional_embedding[1:]
        side = round(len(positions) ** 0.5)
        grid = positions.t().reshape(1, width, side, side)
        grid = F.interpolate(grid, size=x.shape[2:], mode="bilinear", align_corners=False)
        flat = x.flatten(2)
        tokens = (flat + grid.flatten(2)).transpose(1, 2)
        query = F.linear(flat.mean(2) + centre, pool.q_proj.weight, pool.q_proj.bias)
        query = query.view(batch, heads, 1, -1) * (width // heads) ** -0.5
        asked = (query @ pool.k_proj.weight.view(heads, -1, width)).squeeze(2)  # [B, heads, C]
        scores = tokens @ asked.transpose(1, 2)
        top = scores.amax(1, keepdim=True)
        if not float((top - scores.amin(1, keepdim=True)).max()) <= _WIDEST:  # also not a number
            return self._as_it_was(x, masks)
        shares = (scores - top).exp_()
        values = self._projected("v_proj", pool.v_proj, tokens).unflatten(2, (heads, -1))
        both = torch.cat([(values * shares[..., None]).flatten(2), shares], 2)
        inside = (masks.flatten(2) > 0).to(x.dtype)
        sums, counts = (inside @ both).split([width, heads], 2)
        # A mask without pixels has the pool 0, as fused attention has it.
        counts = counts.masked_fill(counts == 0, 1)
        pooled = (sums.unflatten(2, (heads, -1)) / counts[..., None]).flatten(2)
        return self._projected("c_proj", pool.c_proj, pooled)

    def _projected(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        packed = self.opentrans_packed[name]
        if packed is not None and packed.serves(x):
            return sparse_linear(x, packed.weight)
        return F.linear(x, layer.weight, layer.bias)  # oneDNN's errs more over so many channels

    def _as_it_was(self, x: Tensor, masks: Tensor | None) -> Tensor:
        original: Any = self.unready()
        return original.visual_prediction_forward(x, masks)


def find(model: nn.Module) -> Iterator[Found]:
    """Backbones with the method and with CLIP's pool where it is looked for."""
    for name, module in model.named_modules():
        if name and hasattr(module, "visual_prediction_forward") and _pool_of(module) is not None:
            yield _prove(name, module)


def _pool_of(module: nn.Module) -> Any:
    """CLIP's attention pool of a backbone; None if it has none."""
    pool: Any = module
    for key in _PLACE:
        pool = getattr(pool, "_modules", {}).get(key)
    if pool is None or not isinstance(getattr(pool, "num_heads", None), int):
        return None
    plain = all(type(pool._modules.get(name)) is nn.Linear for name in _LINEARS)
    table = pool._parameters.get("positional_embedding")
    square = table is not None and table.dim() == 2 and _is_square(len(table) - 1)
    return pool if plain and square else None


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number


def _prove(name: str, module: Any) -> Found:
    width = _pool_of(module).q_proj.in_features

    def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made = torch.Generator().manual_seed(0)
        x = torch.randn(2, width, 5, 6, generator=made)
        masks = torch.where(torch.rand(2, 9, 5, 6, generator=made) < 0.4, 1.0, -1.0)
        masks[:, 3] = -1.0
        return (x.to(dtype), masks.to(dtype)), {}

    return prove(
        name, KIND, _without_the_rest(module), lambda _: MaskedPool(module, name), inputs,
        call=lambda m: m.visual_prediction_forward,
    )  # fmt: skip


def _without_the_rest(module: nn.Module, place: tuple[str, ...] = _PLACE) -> nn.Module:
    """``module`` with nothing but the pool in it: a copy in float64 would be one of all of CLIP."""
    if not place:
        return module
    slim = copy.copy(module)
    inner = _without_the_rest(module.get_submodule(place[0]), place[1:])
    slim.__dict__["_modules"] = {place[0]: inner}
    return slim
