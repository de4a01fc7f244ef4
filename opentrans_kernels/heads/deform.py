"""Multi-scale deformable attention modules: softmax, locations and sampling in one op.

The module stands, copied, in many trees: ``sampling_offsets``, ``attention_weights``,
``value_proj`` and ``output_proj`` around the sampling (Deformable-DETR's ``MSDeformAttn``, whose
arguments are positional; transformers' ``*MultiscaleDeformableAttention``, whose arguments are
named). It is recognised by these children and proved by running it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..ops.ms_deform_attn import level_shapes, ms_deform_attn
from ..ops.ms_deform_attn.points import attention_of
from .linear import find_below
from .parts import Found, HeadPart, NotTheSame, prove

__all__ = [
    "DeformableAttention",
    "NamedDeformableAttention",
    "RealTokens",
    "find",
    "is_deformable",
    "trial",
]

KIND = "deformable attention"
_CHILDREN = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
_TRY = ((5, 6), (3, 4), (2, 2), (1, 3), (2, 1))  # level sizes of the trial


class _Sampling(HeadPart):
    what, how = KIND, "softmax, locations and sampling in one kernel"
    #: Reference points (2) or boxes (4) that it was tried with.
    proved: frozenset[int] = frozenset((2, 4))
    #: Whether True in a mask is padding, or a real token.
    mask_is_padding = True

    def _known(self, reference: Any) -> bool:
        return isinstance(reference, torch.Tensor) and reference.shape[-1] in self.proved

    def _attend(
        self,
        query: torch.Tensor,
        memory: torch.Tensor,
        hidden: torch.Tensor | None,
        reference: torch.Tensor,
        shapes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and the logits of the attention weights ``[N, Q, M, L, P]``."""
        n, q, _ = query.shape
        levels = (self.n_heads, self.n_levels, self.n_points)
        value = self.value_proj(memory)
        # Mostly nothing is hidden; a tracer cannot look.
        if hidden is not None and (torch.compiler.is_compiling() or bool(hidden.any())):
            value = value.masked_fill(hidden[..., None], 0.0)
        value = value.view(n, memory.shape[1], self.n_heads, -1)
        offsets = self.sampling_offsets(query).view(n, q, *levels, 2)
        logits = self.attention_weights(query).view(n, q, *levels)
        if reference.shape[2] == 1:  # one for all levels
            reference = reference.expand(-1, -1, self.n_levels, -1)
        out = ms_deform_attn(value, shapes, offsets, logits, reference=reference)
        return self.output_proj(out), logits


class DeformableAttention(_Sampling):
    """The positional form: query, reference_points, input_flatten, shapes, starts, padding mask."""

    def fast(
        self,
        query: torch.Tensor,
        reference_points: torch.Tensor,
        input_flatten: torch.Tensor,
        input_spatial_shapes: torch.Tensor,
        input_level_start_index: torch.Tensor | None = None,
        input_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self._known(reference_points):
            given = (input_level_start_index, input_padding_mask)
            return self.as_it_was(
                query, reference_points, input_flatten, input_spatial_shapes, *given
            )
        out, _ = self._attend(
            query, input_flatten, input_padding_mask, reference_points, input_spatial_shapes
        )
        return out


class NamedDeformableAttention(_Sampling):
    """transformers' form: (output, attention weights)."""

    how = f"{_Sampling.how}; weights only with output_attentions=True"

    def fast(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        reference = named.get("reference_points")
        if not self._known(reference):
            return self.as_it_was(hidden_states, attention_mask, **named)
        query, position = hidden_states, named.get("position_embeddings")
        if position is not None:
            query = query + position
        hidden = attention_mask
        if hidden is not None and not self.mask_is_padding:
            hidden = ~hidden.bool()
        shapes = named.get("spatial_shapes_list")
        shapes = named["spatial_shapes"] if shapes is None else shapes
        out, logits = self._attend(
            query, named["encoder_hidden_states"], hidden, reference, level_shapes(shapes)
        )
        return out, attention_of(logits) if named.get("output_attentions") else None


class RealTokens(NamedDeformableAttention):
    """The same, in models whose mask is True where a token is real."""

    mask_is_padding = False


def find(model: nn.Module) -> Iterator[Found]:
    """Every module with the children of deformable attention."""
    for name, module in model.named_modules():
        if is_deformable(module):
            found = _prove(name, module)
            yield found
            if found.replacement is not None:
                yield from find_below(name, module)


def is_deformable(module: nn.Module) -> bool:
    """Whether ``module`` has the children of deformable attention."""
    return all(isinstance(module._modules.get(child), nn.Linear) for child in _CHILDREN)


def _prove(name: str, module: nn.Module) -> Found:
    parameters = list(inspect.signature(module.forward).parameters)
    named = parameters[:1] == ["hidden_states"]
    kinds: tuple[type[_Sampling], ...] = (DeformableAttention,)
    if named:
        kinds = (NamedDeformableAttention, RealTokens)
    proved: dict[int, Found] = {}
    failed: list[Found] = []
    for size in (2, 4):
        for kind in kinds:
            found = prove(
                name, KIND, module, lambda original, kind=kind: _make(kind, original),
                lambda dtype, size=size: _arguments(module, dtype, size, named, parameters),
                lambda out: [out[0] if isinstance(out, tuple) else out],
            )  # fmt: skip
            if found.replacement is not None:
                proved[size] = found
                kinds = (kind,)
                break
            failed.append(found)
    if not proved:
        return failed[0]
    best = next(iter(proved.values()))
    best.replacement.__dict__["proved"] = frozenset(proved)  # type: ignore[union-attr]
    return best


def _make(kind: type[_Sampling], original: nn.Module) -> _Sampling:
    sizes = [getattr(original, key, None) for key in ("n_heads", "n_levels", "n_points")]
    if not all(isinstance(size, int) for size in sizes):
        raise NotTheSame("has no integer n_heads, n_levels and n_points")
    heads, levels, points = sizes  # type: ignore[misc]
    count = heads * levels * points  # type: ignore[operator]
    if original.sampling_offsets.out_features != 2 * count:  # type: ignore[union-attr]
        raise NotTheSame("its offsets are not two per head, level and point")
    return kind(original)


def trial(module: Any, dtype: torch.dtype, size: int, *, own: bool = False) -> dict[str, Any]:
    """Tensors of a trial call: memory, query (memory itself, if ``own``), reference, and so on."""
    made = torch.Generator().manual_seed(0)
    shapes = torch.tensor([_TRY[i % len(_TRY)] for i in range(module.n_levels)])
    pixels = int(shapes.prod(1).sum())
    queries = pixels if own else 7
    memory = torch.randn(2, pixels, module.value_proj.in_features, generator=made).to(dtype)
    query = torch.randn(2, queries, module.sampling_offsets.in_features, generator=made).to(dtype)
    return {
        "memory": memory,
        "query": query,
        "reference": torch.rand(2, queries, module.n_levels, size, generator=made).to(dtype),
        "padding": torch.rand(2, pixels, generator=made) < 0.2,
        "shapes": shapes,
        "starts": torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1])),
    }


def _arguments(
    module: Any, dtype: torch.dtype, size: int, named: bool, parameters: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = trial(module, dtype, size)
    query, shapes = given["query"], given["shapes"]
    if not named:
        rest = (given["reference"], given["memory"], shapes, given["starts"], given["padding"])
        return (query, *rest), {}
    made = torch.Generator().manual_seed(1)
    keywords = {
        "attention_mask": given["padding"],
        "encoder_hidden_states": given["memory"],
        "position_embeddings": torch.randn(query.shape, generator=made).to(dtype),
        "reference_points": given["reference"],
        "spatial_shapes": shapes,
        "spatial_shapes_list": [tuple(pair) for pair in shapes.tolist()],
        "level_start_index": given["starts"],
    }
    return (query,), {key: value for key, value in keywords.items() if key in parameters}
