"""The inside of a transformer block, for reductions that work between attention and MLP.

Known by names of children: timm's form (``norm1``, ``attn.qkv``), open_clip's (``ln_1``, an
``nn.MultiheadAttention``), transformers' (``layernorm_before`` or ``layer_norm1``, ``q_proj``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UnsupportedModelError
from ..linears import AcceleratedAttention
from ..topology.nodes import original

__all__ = ["Anatomy", "anatomy_of", "attention_of", "length_first"]

_NAMES = {
    "norm": ("norm1", "ln_1", "layernorm_before", "layer_norm1"),
    "attention": ("attn", "attention", "self_attn"),
    "mlp_norm": ("norm2", "ln_2", "layernorm_after", "layer_norm2"),
    "mlp": ("mlp",),
}
#: What the two branches pass through before they are added.
_AFTER = (
    ("ls1", "ls_1", "layer_scale1", "drop_path1", "drop_path", "dropout"),
    ("ls2", "ls_2", "layer_scale2", "drop_path2", "drop_path", "dropout"),
)

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((c for n in names if (c := module._modules.get(n)) is not None), None)


def attention_of(block: nn.Module) -> nn.Module | None:
    """The attention of a block; None if it has none, or no norms and MLP."""
    found = [_child(block, names) for names in _NAMES.values()]
    return found[1] if all(one is not None for one in found) else None


def length_first(block: nn.Module) -> bool:
    """Whether a block takes tokens as [n, B, C]."""
    a = original(attention_of(block) or block)
    return isinstance(a, nn.MultiheadAttention) and not a.batch_first


@dataclass(frozen=True)
class Anatomy:
    """Children of a block, looked up at each use, so that exchanged ones are used."""

    heads: int
    scale: float
    kind: str  # "qkv", "packed" (nn.MultiheadAttention) or "apart"

    def queries(self, block: nn.Module, x: torch.Tensor) -> Heads:
        """Queries, keys and values of x [B, n, C], each [B, heads, n, d]."""
        norm, attention = (_child(block, _NAMES[name]) for name in ("norm", "attention"))
        return self._split(attention, norm(x))  # type: ignore[misc]

    def _split(self, a: Any, x: torch.Tensor) -> Heads:
        if self.kind == "apart":
            three = [linear(x) for linear in (a.q_proj, a.k_proj, a.v_proj)]
        elif isinstance(a, AcceleratedAttention):
            three = list(a.projected(x).chunk(3, -1))
        elif self.kind == "packed":
            three = list(F.linear(x, a.in_proj_weight, a.in_proj_bias).chunk(3, -1))
        else:
            three = list(a.qkv(x).chunk(3, -1))
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in three)
        if self.kind == "qkv" and hasattr(a, "q_norm"):
            q, k = a.q_norm(q), a.k_norm(k)
        return q, k, v

    def dropout(self, block: nn.Module) -> float:
        """Of attention weights, in the mode the block is in."""
        a: Any = _child(block, _NAMES["attention"])
        if not block.training:
            return 0.0
        for name in ("attn_drop", "attention_dropout", "dropout"):
            if (value := getattr(a, name, None)) is not None:
                return float(getattr(value, "p", value))
        return 0.0

    def attended(self, block: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x plus the attention branch, from what the heads gave, [B, heads, n, d]."""
        a: Any = _child(block, _NAMES["attention"])
        y = y.transpose(1, 2).flatten(2)
        if self.kind == "qkv":
            y = getattr(a, "norm", _same)(y)
            y = getattr(a, "proj_drop", _same)(a.proj(y))
        elif isinstance(a, AcceleratedAttention):
            y = a.joined(y)
        else:
            y = (a.out_proj if hasattr(a, "out_proj") else a.o_proj)(y)
        return x + _through(block, _AFTER[0], y)

    def fed(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """x plus the MLP branch."""
        norm, mlp = (_child(block, _NAMES[name]) for name in ("mlp_norm", "mlp"))
        return x + _through(block, _AFTER[1], mlp(norm(x)))  # type: ignore[misc]

    def forward(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The whole block, as it has to be if this anatomy is right."""
        q, k, v = self.queries(block, x)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout(block), scale=self.scale)
        return self.fed(block, self.attended(block, x, y))


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _through(block: nn.Module, names: tuple[str, ...], y: torch.Tensor) -> torch.Tensor:
    for name in names:
        if (step := block._modules.get(name)) is not None:
            y = step(y)
    return y


def anatomy_of(path: str, block: nn.Module) -> Anatomy:
    """How ``block`` is made. Raises UnsupportedModelError for a form that is not known."""
    a: Any = original(attention_of(block) or block)
    why = "its attention has neither qkv, nor in_proj_weight, nor q_proj, k_proj and v_proj"
    if isinstance(a, nn.MultiheadAttention):
        if a.in_proj_weight is not None and a.bias_k is None and not a.add_zero_attn:
            return Anatomy(a.num_heads, a.head_dim**-0.5, "packed")
        why = "its MultiheadAttention has keys of another width, added keys or zeros"
    elif getattr(a, "gate", None) is not None:
        why = "its attention has a gate"
    else:
        heads = next(
            (value for name in ("num_heads", "num_attention_heads", "heads")
             if isinstance(value := getattr(a, name, None), int)), None,
        )  # fmt: skip
        scale = next(
            (value for name in ("scale", "scaling") if (value := getattr(a, name, None))), None
        )
        kind = "qkv" if hasattr(a, "qkv") else "apart" if hasattr(a, "q_proj") else None
        if heads and kind and isinstance(scale, float):
            return Anatomy(heads, scale, kind)
    raise UnsupportedModelError(
        f"{path}: {why}, so nothing can be done between attention and MLP. Use method='cluster' or "
        "'pool', which call blocks as they are."
    )
