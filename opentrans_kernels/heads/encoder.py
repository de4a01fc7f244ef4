"""Encoder layers of deformable attention and two linear layers, as one pass over each tensor.

Deformable-DETR's form has ``linear1``, ``linear2``, ``norm1`` and ``norm2``, transformers' form
``fc1``, ``fc2``, ``self_attn_layer_norm`` and ``final_layer_norm``. Both normalise after adding.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..activations import RELU
from ..ops.sparse_mlp import sparse_mlp
from .deform import is_deformable, trial
from .linear import has_kernel, linear
from .packed import packed
from .parts import Found, HeadPart, prove

__all__ = ["EncoderLayer", "NamedEncoderLayer", "find"]

KIND = "encoder layer"
_POSITIONAL = ("linear1", "linear2", "norm1", "norm2")
_NAMED = ("fc1", "fc2", "self_attn_layer_norm", "final_layer_norm")


class _Layer(HeadPart):
    what, how = KIND, "activation inside the product, sums in place"
    names = _POSITIONAL

    def __init__(self, original: nn.Module, path: str = "") -> None:
        super().__init__(original)
        both = [packed(f"{path}.{name}", self._modules[name]) for name in self.names[:2]]
        self.__dict__["opentrans_packed"] = both if None not in both else None
        if None not in both:
            self.__dict__["how"] = "most weights are zero: both linear layers packed, one op"

    def bypassed(self) -> Iterator[tuple[str, nn.Module]]:
        called = {"self_attn", *self.names[2:]}
        for key, child in self._modules.items():
            if key not in called and child is not None:
                yield key, child

    def _rest(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """All that follows attention, for the input ``x`` of the layer."""
        first, second, norm, last = (self._modules[name] for name in self.names)
        x = norm(attended.add_(x) if not attended.requires_grad else attended + x)
        both = self.opentrans_packed
        if both is not None and all([one.serves(x) for one in both]):
            return last(sparse_mlp(x, both[0].weight, both[1].weight, RELU, residual=x))
        hidden = linear(x, first.weight, first.bias, relu=True)
        out = linear(hidden, second.weight, second.bias)
        return last(out.add_(x) if not out.requires_grad else out + x)


class EncoderLayer(_Layer):
    """src, pos, reference_points, spatial_shapes, level_start_index, padding_mask."""

    def fast(
        self,
        src: torch.Tensor,
        pos: torch.Tensor | None,
        reference_points: torch.Tensor,
        spatial_shapes: torch.Tensor,
        level_start_index: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query = src if pos is None else src + pos
        given = (spatial_shapes, level_start_index, padding_mask)
        return self._rest(src, self.self_attn(query, reference_points, src, *given))


class NamedEncoderLayer(_Layer):
    """transformers' form: a tuple of the output alone, or with attention weights on request."""

    names = _NAMED

    def fast(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **named: Any
    ) -> tuple[torch.Tensor, ...]:
        if named.get("output_attentions"):
            return self.as_it_was(hidden_states, attention_mask, **named)
        attended, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=hidden_states,
            encoder_attention_mask=attention_mask,
            **named,
        )
        return (self._rest(hidden_states, attended),)


def find(model: nn.Module) -> Iterator[Found]:
    """Modules with a deformable ``self_attn`` and the linear layers and norms of either form."""
    if not has_kernel():
        return
    for name, module in model.named_modules():
        attention = module._modules.get("self_attn")
        if attention is None or not is_deformable(attention):
            continue
        for kind in (EncoderLayer, NamedEncoderLayer):
            children = [module._modules.get(child) for child in kind.names]
            if all(isinstance(c, nn.Linear) for c in children[:2]) and all(children[2:]):
                yield prove(
                    name, KIND, module, functools.partial(kind, path=name),
                    lambda dtype, m=module: _arguments(m, dtype),
                    lambda out: [out[0] if isinstance(out, tuple) else out],
                )  # fmt: skip


def _arguments(module: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = trial(module.self_attn, dtype, 2, own=True)
    source, shapes, padding = given["memory"], given["shapes"], given["padding"]
    position = torch.randn(source.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    parameters = list(inspect.signature(module.forward).parameters)
    if parameters[:1] != ["hidden_states"]:
        return (source, position, given["reference"], shapes, given["starts"], padding), {}
    named = {
        "attention_mask": padding,
        "position_embeddings": position,
        "reference_points": given["reference"],
        "spatial_shapes": shapes,
        "spatial_shapes_list": [tuple(pair) for pair in shapes.tolist()],
        "level_start_index": given["starts"],
    }
    return (source,), {key: value for key, value in named.items() if key in parameters}
