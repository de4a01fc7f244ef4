"""Small modules with the structure of segmentation heads, as several trees write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from deform_cases import sampled
from torch import nn


class Attention(nn.Module):
    """Deformable attention with positional arguments."""

    def __init__(self, width=32, levels=3, heads=4, points=4, seed=0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.d_model, self.n_levels, self.n_heads, self.n_points = width, levels, heads, points
        count = heads * levels * points
        self.sampling_offsets = nn.Linear(width, 2 * count)
        self.attention_weights = nn.Linear(width, count)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.im2col_step = 128
        self.eval()

    def points_of(self, query, reference, shapes):
        n, q, _ = query.shape
        form = (n, q, self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).view(*form, 2)
        weights = self.attention_weights(query).view(*form[:3], -1).softmax(-1).view(form)
        at = reference[:, :, None, :, None]
        if reference.shape[-1] == 2:
            return at + offsets / shapes.flip(1)[:, None], weights
        return at[..., :2] + offsets / self.n_points * at[..., 2:] * 0.5, weights

    def forward(self, query, reference_points, flat, shapes, starts=None, padding=None):
        value = self.value_proj(flat)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.view(*flat.shape[:2], self.n_heads, -1)
        where, weights = self.points_of(query, reference_points, shapes)
        return self.output_proj(sampled(value, shapes, where, weights))


class Another(Attention):
    """The same children; each value is squared."""

    def forward(self, query, reference_points, flat, shapes, starts=None, padding=None):
        return super().forward(query, reference_points, flat.square(), shapes, starts, padding)


class Layer(nn.Module):
    """An encoder layer around it."""

    def __init__(self, width=32, hidden=48, **options) -> None:
        super().__init__()
        self.self_attn = Attention(width, **options)
        self.dropout1, self.norm1 = nn.Dropout(0.1), nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout2, self.dropout3 = nn.Dropout(0.1), nn.Dropout(0.1)
        self.norm2 = nn.LayerNorm(width)
        self.activation = F.relu
        self.eval()

    def forward(self, src, pos, reference_points, shapes, starts, padding=None):
        query = src if pos is None else src + pos
        found = self.self_attn(query, reference_points, src, shapes, starts, padding)
        src = self.norm1(src + self.dropout1(found))
        hidden = self.linear2(self.dropout2(self.activation(self.linear1(src))))
        return self.norm2(src + self.dropout3(hidden))


class Encoder(nn.Module):
    def __init__(self, layers=2, layer=Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.eval()

    def forward(self, src, pos, reference_points, shapes, starts, padding=None):
        for layer in self.layers:
            src = layer(src, pos, reference_points, shapes, starts, padding)
        return src


def encoder_inputs(n=2, width=32, levels=((7, 9), (4, 5), (2, 3)), seed=1):
    """Arguments of an :class:`Encoder`: one query per pixel."""
    made = torch.Generator().manual_seed(seed)
    shapes = torch.tensor(levels)
    sizes = shapes.prod(1)
    pixels = int(sizes.sum())
    src = torch.randn(n, pixels, width, generator=made)
    pos = torch.randn(n, pixels, width, generator=made)
    reference = torch.rand(n, pixels, len(levels), 2, generator=made)
    padding = torch.rand(n, pixels, generator=made) < 0.1
    return src, pos, reference, shapes, sizes.cumsum(0) - sizes, padding
