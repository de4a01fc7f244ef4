"""The masked transformer decoder of transformers' Mask2Former.

Its results have the masks of all layers. Those before the last are computed when read: the model
takes them apart and puts them together again, but reads them for a loss or on request alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .decoder import KIND, MaskedDecoder, last_width
from .deferred import Deferred, Snapshot
from .lazy import lazy_masks
from .masked import Layer, decode, mask_product, project_attention, require_attention
from .parts import Found, prove
from .trial import features_of_trial, levels_of_trial

__all__ = ["ModuleDecoder", "find", "is_named_attention", "named_attention", "prove_named"]

_CHILDREN = (
    "position_embedder", "queries_embedder", "queries_features", "input_projections", "decoder",
    "level_embed",
)  # fmt: skip
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

Tensor = torch.Tensor


def is_named_attention(module: Any) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in _PROJECTIONS)


def named_attention(module: Any) -> Any:
    """Self-attention of a module with q_proj, k_proj, v_proj and out_proj; batch first."""

    def attend(x: Tensor, position: Tensor) -> Tensor:
        both = x + position
        query, key, value = module.q_proj(both), module.k_proj(both), module.v_proj(x)
        return module.out_proj(project_attention(query, key, value, module.num_heads))

    return attend


class ModuleDecoder(MaskedDecoder):
    """forward(multi_scale_features, mask_features, ...), which makes the levels."""

    #: Class of the results, as the original returned it in its trial.
    opentrans_result: Any = None
    called = ("input_projections", "decoder.mask_predictor.mask_embedder")

    def unknown(self) -> str | None:
        decoder = self.decoder
        if not len(decoder.layers):
            return "has no layers"
        for index, layer in enumerate(decoder.layers):
            if why := require_attention(layer.cross_attn):
                return f"cross-attention {index} {why}"
            if not is_named_attention(layer.self_attn):
                return f"self-attention {index} has no linear q_proj, k_proj, v_proj and out_proj"
        if next(self.position_embedder.parameters(), None) is not None:
            return "its position embeddings are learned"
        return None

    @staticmethod
    def positions(module: nn.Module, size: tuple[int, int], like: Tensor) -> Tensor:
        if next(iter(inspect.signature(module.forward).parameters)) == "shape":
            return module(like.shape, like.device, like.dtype, None)
        return module(like, None)

    def layers_now(self) -> list[Layer]:
        return [
            Layer(
                layer.cross_attn,
                layer.cross_attn_layer_norm,
                named_attention(layer.self_attn),
                layer.self_attn_layer_norm,
                lambda x, layer=layer: layer.fc2(layer.activation_fn(layer.fc1(x))),
                layer.final_layer_norm,
                layer.pre_norm,
            )
            for layer in self.decoder.layers
        ]

    def fast(
        self,
        multi_scale_features: list[Tensor],
        mask_features: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Any:
        count = self.num_feature_levels
        if output_attentions or len(multi_scale_features) < count:
            return self.as_it_was(
                multi_scale_features, mask_features, output_hidden_states, output_attentions
            )
        decoder = self.decoder
        levels = self.levels(
            multi_scale_features[:count], self.input_projections, self.level_embed.weight,
            self.position_embedder,
        )  # fmt: skip
        queries = self.queries_features.weight.repeat(mask_features.shape[0], 1, 1)
        embed = decoder.mask_predictor.mask_embedder
        found = decode(
            self.layers_now(), queries, self.queries_embedder.weight.unsqueeze(0), levels,
            mask_features, decoder.layernorm, embed,
        )  # fmt: skip
        masks = mask_product(embed(found.normed[-1]), mask_features)
        used = Snapshot(lambda: [*found.embedded, mask_features])

        def later(embedded: Tensor) -> Tensor:
            def compute() -> Tensor:
                used.require_same()
                return mask_product(embedded, mask_features)

            return Deferred(masks, compute)

        return self.opentrans_result(
            last_hidden_state=found.states[-1],
            hidden_states=_queries_first(found.states) if output_hidden_states else None,
            attentions=None,
            intermediate_hidden_states=_queries_first(found.normed),
            # Enlarged tile by tile, where classes meet them.
            masks_queries_logits=(*map(later, found.embedded), lazy_masks(masks)),
        )  # fmt: skip


def _queries_first(states: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(state.transpose(0, 1) for state in states)


def find(model: nn.Module) -> Iterator[Found]:
    """Every decoder of transformers' form."""
    for name, module in model.named_modules():
        if all(child in module._modules for child in _CHILDREN):
            yield _prove(name, module)


def prove_named(
    name: str,
    module: nn.Module,
    kind: type[MaskedDecoder],
    arguments: Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]],
    outputs: Callable[[Any], list[Tensor]],
) -> Found:
    """Prove a replacement that returns results of the class that the original returns."""
    made: list[MaskedDecoder] = []

    def make(original: nn.Module) -> MaskedDecoder:
        made.append(kind(original))
        return made[0]

    def tensors(out: Any) -> list[Tensor]:
        made[0].__dict__["opentrans_result"] = type(out)
        return outputs(out)

    return prove(name, KIND, module, make, arguments, tensors)


def _prove(name: str, module: Any) -> Found:
    def outputs(out: Any) -> list[Tensor]:
        masks, states = out.masks_queries_logits, out.intermediate_hidden_states
        hidden = (*out.hidden_states, out.last_hidden_state.transpose(0, 1))
        return [masks[-1], states[-1], *(torch.stack(x) for x in (masks[:-1], states, hidden))]

    def arguments(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        noise = torch.Generator().manual_seed(0)
        width = module.level_embed.weight.shape[1]
        widths = [getattr(one, "in_channels", width) for one in module.input_projections]
        maps = levels_of_trial(noise, widths, dtype)
        features = features_of_trial(noise, last_width(module.decoder.mask_predictor), dtype)
        return (), {
            "multi_scale_features": maps,
            "mask_features": features,
            "output_hidden_states": True,
        }

    return prove_named(name, module, ModuleDecoder, arguments, outputs)
