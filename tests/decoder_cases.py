"""Masked decoders in the form of the Mask2Former trees, small: same children, same calls."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor


class Sine(nn.Module):
    calls: ClassVar[list[Tensor]] = []

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.base = width, 10.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.append(x)
        parts = []
        for side, other in ((x.shape[2], 0), (x.shape[3], 1)):
            steps = torch.arange(1, side + 1) / side * 2 * math.pi
            waves = steps[:, None] / self.base ** (torch.arange(self.width // 2) / self.width)
            lines = torch.stack([waves.sin(), waves.cos()], 2).flatten(1).t().flatten(0, 1)
            lines = lines.view(self.width, side)
            plane = lines[:, :, None] if other == 0 else lines[:, None, :]
            parts.append(plane.expand(-1, x.shape[2], x.shape[3])[: self.width])
        return torch.cat(parts).expand(x.shape[0], -1, -1, -1)


class _Block(nn.Module):
    def __init__(self, width: int, norm_first: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.0)
        self.activation = F.relu
        self.normalize_before = norm_first

    def around(self, x: Tensor, change: Any) -> Tensor:
        if self.normalize_before:
            return x + self.dropout(change(self.norm(x)))
        return self.norm(x + self.dropout(change(x)))


class Cross(_Block):
    def __init__(self, width: int, heads: int, norm_first: bool) -> None:
        super().__init__(width, norm_first)
        self.multihead_attn = nn.MultiheadAttention(width, heads)

    def forward(self, x: Tensor, memory: Tensor, hidden: Tensor, pos: Tensor, at: Tensor) -> Tensor:
        return self.around(
            x, lambda y: self.multihead_attn(y + at, memory + pos, memory, attn_mask=hidden)[0]
        )


class Own(_Block):
    def __init__(self, width: int, heads: int, norm_first: bool) -> None:
        super().__init__(width, norm_first)
        self.self_attn = nn.MultiheadAttention(width, heads)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return self.around(x, lambda y: self.self_attn(y + at, y + at, y)[0])


class Feed(_Block):
    def __init__(self, width: int, norm_first: bool) -> None:
        super().__init__(width, norm_first)
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.around(x, lambda y: self.linear2(self.activation(self.linear1(y))))


class Steps(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        pairs = zip(widths, widths[1:], strict=False)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Decoder(nn.Module):
    """Mask2Former's form. Relatives change ``resize``, ``hide`` or the class head."""

    def __init__(
        self, width: int = 32, heads: int = 4, queries: int = 11, layers: int = 4,
        norm_first: bool = False, in_channels: int = 24,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mask_classification = True
        self.num_heads, self.num_layers, self.num_feature_levels = heads, layers, 3
        self.num_queries = queries
        self.pe_layer = Sine(width // 2)
        self.transformer_self_attention_layers = nn.ModuleList(
            Own(width, heads, norm_first) for _ in range(layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            Cross(width, heads, norm_first) for _ in range(layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(Feed(width, norm_first) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.query_feat, self.query_embed = (nn.Embedding(queries, width) for _ in range(2))
        self.level_embed = nn.Embedding(3, width)
        self.input_proj = nn.ModuleList(
            nn.Conv2d(in_channels, width, 1) if in_channels != width else nn.Sequential()
            for _ in range(3)
        )
        self.mask_embed = Steps(width, width, width)
        self.make_class_head(width)

    def make_class_head(self, width: int) -> None:
        self.class_embed = nn.Linear(width, 6)

    def forward(self, x: list[Tensor], mask_features: Tensor, mask: Any = None) -> dict[str, Any]:
        return self.decode(x, mask_features)

    def decode(self, x: list[Tensor], mask_features: Tensor, **extra: Any) -> dict[str, Any]:
        assert len(x) == self.num_feature_levels
        batch = x[0].shape[0]
        sizes = [one.shape[-2:] for one in x]
        pos = [self.pe_layer(one, None).flatten(2).permute(2, 0, 1) for one in x]
        src = [
            (self.input_proj[i](one).flatten(2) + self.level_embed.weight[i][None, :, None])
            .permute(2, 0, 1)
            for i, one in enumerate(x)
        ]  # fmt: skip
        at = self.query_embed.weight[:, None].repeat(1, batch, 1)
        output = self.query_feat.weight[:, None].repeat(1, batch, 1)
        found = [self.forward_prediction_heads(output, mask_features, sizes[0], **extra)]
        for i in range(self.num_layers):
            hidden = found[-1][2].clone()
            hidden[hidden.all(-1)] = False
            level = i % 3
            output = self.transformer_cross_attention_layers[i](
                output, src[level], hidden, pos[level], at
            )
            output = self.transformer_self_attention_layers[i](output, at)
            output = self.transformer_ffn_layers[i](output)
            size = sizes[(i + 1) % 3]
            found.append(self.forward_prediction_heads(output, mask_features, size, **extra))
        every = [{"pred_logits": one[0], "pred_masks": one[1]} for one in found]
        return {**every[-1], "aux_outputs": every[:-1]}

    def forward_prediction_heads(
        self, output: Tensor, mask_features: Tensor, attn_mask_target_size: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.decoder_norm(output).transpose(0, 1)
        masks = self.masks_of(normed, mask_features)
        return self.class_embed(normed), masks, self.hide(masks, attn_mask_target_size)

    def masks_of(self, normed: Tensor, features: Tensor) -> Tensor:
        return torch.einsum("bqc,bchw->bqhw", self.mask_embed(normed), features)

    def resize(self, masks: Tensor, size: Any) -> Tensor:
        return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)

    def hide(self, masks: Tensor, size: Any) -> Tensor:
        hidden = self.resize(masks, size).sigmoid().flatten(2) < 0.5
        return hidden[:, None].repeat(1, self.num_heads, 1, 1).flatten(0, 1).detach()


def get_classification_logits(
    x: Tensor, text_classifier: Tensor, logit_scale: Tensor, num_templates: list[int]
) -> Tensor:
    scores = logit_scale.exp().clamp(max=100) * F.normalize(x, dim=-1) @ text_classifier.T
    *known, nothing = scores.split([*num_templates, 1], dim=-1)
    return torch.stack([one.amax(-1) for one in known] + [nothing[..., 0]], dim=-1)


class Pooling(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        inside = (mask.detach() > 0).to(mask.dtype)
        weight = inside / (inside.sum((-1, -2), keepdim=True) + 1e-8)
        return torch.einsum("bchw,bqhw->bqc", x, weight)


class TextDecoder(Decoder):
    """FC-CLIP's form."""

    def make_class_head(self, width: int) -> None:
        self.mask_pooling = Pooling()
        self._mask_pooling_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.class_embed = Steps(width, width, 20)
        self.logit_scale = nn.Parameter(torch.tensor(2.6))

    def forward(
        self, x: list[Tensor], mask_features: Tensor, mask: Any = None,
        text_classifier: Any = None, num_templates: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        return self.decode(
            x, mask_features, text_classifier=text_classifier, num_templates=num_templates
        )

    def forward_prediction_heads(
        self, output: Tensor, mask_features: Tensor, attn_mask_target_size: Any,
        text_classifier: Any, num_templates: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        normed = self.decoder_norm(output).transpose(0, 1)
        masks = self.masks_of(normed, mask_features)
        pooled = self._mask_pooling_proj(self.mask_pooling(x=mask_features, mask=masks))
        logits = get_classification_logits(
            self.class_embed(pooled + normed), text_classifier, self.logit_scale, num_templates
        )
        return logits, masks, self.hide(masks, attn_mask_target_size)


def inputs(
    module: nn.Module,
    seed: int = 0,
    batch: int = 2,
    sizes: tuple[tuple[int, int], ...] = ((3, 4), (6, 8), (12, 16)),
    full: tuple[int, int] = (48, 64),
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Noise for a decoder of this file, float32."""
    made = torch.Generator().manual_seed(seed)
    first = module.input_proj[0]
    width = module.query_feat.embedding_dim
    channels = getattr(first, "in_channels", width)
    x = [torch.randn(batch, channels, *size, generator=made) for size in sizes]
    features = torch.randn(batch, width, *full, generator=made)
    if not hasattr(module, "_mask_pooling_proj"):
        return (x, features), {}
    text = F.normalize(torch.randn(6, 20, generator=made), dim=-1)
    return (x, features), {"text_classifier": text, "num_templates": [1, 3, 1]}


def to(dtype: torch.dtype, value: Any) -> Any:
    """The same arguments in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(to(dtype, one) for one in value)
    return {k: to(dtype, v) for k, v in value.items()} if isinstance(value, dict) else value
