"""The masked transformer decoder of transformers' OneFormer, whose queries start from a task.

A small transformer makes the queries out of the mask features; it is called as it is. The layers
after it are those of the other decoders.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .decoder import MaskedDecoder, feed_forward, last_width
from .deferred import Deferred, Snapshot
from .lazy import lazy_masks
from .masked import Layer, Level, contiguous, decode, mask_product, require_attention
from .named_decoder import is_named_attention, named_attention, prove_named
from .parts import Found
from .trial import BATCH, features_of_trial, levels_of_trial

__all__ = ["TaskDecoder", "find"]

_CHILDREN = (
    "query_transformer", "decoder_norm", "layers", "query_input_projection", "class_embed",
    "mask_embed",
)  # fmt: skip
_QUERIES = 7  # of the trial; they come with the call

Tensor = torch.Tensor


class TaskDecoder(MaskedDecoder):
    """forward(task_token=..., multi_stage_features=..., mask_features=..., ...)."""

    #: Class of the results, as the original returned it in its trial.
    opentrans_result: Any = None
    called = ("query_transformer", "query_input_projection", "mask_embed")

    def unknown(self) -> str | None:
        if not len(self.layers):
            return "has no layers"
        for index, layer in enumerate(self.layers):
            if why := require_attention(layer.cross_attn.multihead_attn):
                return f"cross-attention {index} {why}"
            if not is_named_attention(layer.self_attn.self_attn):
                return f"self-attention {index} has no linear q_proj, k_proj, v_proj and out_proj"
            parts = (layer.cross_attn, layer.self_attn, layer.ffn)
            if len({part.normalize_before for part in parts}) > 1:
                return f"layer {index} has norms before and after"
        return None

    def layers_now(self) -> list[Layer]:
        return [
            Layer(
                layer.cross_attn.multihead_attn,
                layer.cross_attn.norm,
                named_attention(layer.self_attn.self_attn),
                layer.self_attn.norm,
                feed_forward(layer.ffn),
                layer.ffn.norm,
                layer.ffn.normalize_before,
            )
            for layer in self.layers
        ]

    def fast(
        self,
        task_token: Tensor,
        multi_stage_features: list[Tensor],
        multi_stage_positional_embeddings: list[Tensor],
        mask_features: Tensor,
        query_features: Tensor,
        query_embeddings: Tensor,
        query_embedder: nn.Embedding,
        size_list: list[tuple[int, int]],
        output_attentions: bool | None = None,
    ) -> Any:
        if output_attentions:
            return self.as_it_was(
                task_token, multi_stage_features, multi_stage_positional_embeddings, mask_features,
                query_features, query_embeddings, query_embedder, size_list, output_attentions,
            )  # fmt: skip
        if self.use_task_norm:
            task_token = self.decoder_norm(task_token)
        made = self.query_transformer(
            query_features, None, query_embedder.weight[:-1],
            self.query_input_projection(mask_features), task_token if self.use_task_norm else None,
        )  # fmt: skip
        queries = torch.cat([made[0].transpose(0, 1), task_token]).transpose(0, 1)
        rows = [contiguous(feature.transpose(0, 1)) for feature in multi_stage_features]
        levels = [
            Level(tokens, tokens + position.transpose(0, 1), (size[0], size[1]))
            for tokens, position, size in zip(
                rows, multi_stage_positional_embeddings, size_list, strict=True
            )
        ]
        found = decode(
            self.layers_now(), queries, query_embeddings.transpose(0, 1),
            levels[: self.num_feature_levels], mask_features, self.decoder_norm, self.mask_embed,
        )  # fmt: skip
        masks = mask_product(self.mask_embed(found.normed[-1]), mask_features)
        logits = self.class_embed(found.normed[-1])
        kept = [*found.normed, *found.embedded, mask_features]
        used = Snapshot(lambda: [*self.class_embed.parameters(), *kept])

        def later(index: int) -> dict[str, Tensor]:
            def classes() -> Tensor:
                used.require_same()
                return self.class_embed(found.normed[index])

            def mask() -> Tensor:
                used.require_same()
                return mask_product(found.embedded[index], mask_features)

            return {
                "class_queries_logits": Deferred(logits, classes),
                "masks_queries_logits": Deferred(masks, mask),
            }

        count = len(found.embedded)
        return self.opentrans_result(
            object_queries=found.states[-1],
            contrastive_logits=queries,
            prediction_masks=lazy_masks(masks),
            prediction_class=logits,
            auxiliary_predictions=(
                tuple(later(index) for index in range(count)) if self.use_auxiliary_loss else None
            ),
            attentions=((),) * count,
        )


def find(model: nn.Module) -> Iterator[Found]:
    """Every decoder of OneFormer's form."""
    for name, module in model.named_modules():
        if all(child in module._modules for child in _CHILDREN):
            yield _prove(name, module)


def _prove(name: str, module: Any) -> Found:
    def arguments(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        noise = torch.Generator().manual_seed(0)
        width = module.decoder_norm.normalized_shape[0]
        maps = levels_of_trial(noise, [width] * module.num_feature_levels, dtype)
        places = levels_of_trial(noise, [width] * module.num_feature_levels, dtype)
        features = features_of_trial(noise, last_width(module.mask_embed), dtype)
        embedder = nn.Embedding(_QUERIES, width)
        embedder.weight = nn.Parameter(torch.randn(_QUERIES, width, generator=noise).to(dtype))
        token = torch.randn(1, BATCH, width, generator=noise).to(dtype)
        full = torch.randn(BATCH, width, *features.shape[2:], generator=noise).to(dtype)
        return (), {
            "task_token": token,
            "multi_stage_features": [one.flatten(2).permute(2, 0, 1) for one in maps],
            "multi_stage_positional_embeddings": [
                one.flatten(2).permute(2, 0, 1) for one in places
            ],
            "mask_features": features,
            "query_features": full,
            "query_embeddings": embedder.weight.unsqueeze(1).repeat(1, BATCH, 1),
            "query_embedder": embedder,
            "size_list": [one.shape[-2:] for one in maps],
        }

    def outputs(out: Any) -> list[Tensor]:
        last = [
            out.object_queries, out.contrastive_logits, out.prediction_masks, out.prediction_class
        ]  # fmt: skip
        earlier = out.auxiliary_predictions
        if earlier is None:
            return last
        return [*last, *(torch.stack([one[key] for one in earlier]) for key in earlier[0])]

    return prove_named(name, module, TaskDecoder, arguments, outputs)
