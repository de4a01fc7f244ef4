"""A vision transformer with a dense head, trained to say where people look: ViT-S/14, saliency.

Blocks have the names timm gives them, so token reduction and acceleration find their way.
"""

from __future__ import annotations

import os
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .filling import fill, other_network
from .onnx_file import Graph, read_onnx

__all__ = ["MEAN", "STD", "FocusNet", "load_focus"]

WHAT = "saliency transformer"
#: Of the images it was trained on, per channel, values from 0 to 1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD_WIDTH = 64
EPS = 1e-6  # of its layer norms


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        three = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*three, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(width, 4 * width), nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class Encoder(nn.Module):
    """[B, 3, H, W] -> tokens [B, 1 + h w, width], h and w the whole patches in H and W.

    grid: (height, width) of the position table, which is resized bicubically for other maps.
    """

    def __init__(self, width: int, depth: int, patch: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patch, self.grid = patch, grid
        self.patch_embed = PatchEmbedding(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width))
        heads = max(1, width // HEAD_WIDTH)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, EPS)

    def positions(self, size: tuple[int, int]) -> Tensor:
        """[1, 1 + h w, width], for a map of (h, w) tokens."""
        if size == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        table = F.interpolate(table, size, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], 1)

    def forward(self, image: Tensor) -> Tensor:
        maps = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(len(maps), -1, -1), maps.flatten(2).mT], 1)
        x = x + self.positions((maps.shape[2], maps.shape[3]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """Map of tokens [B, width, h, w] -> logits [B, 1, 8 h, 8 w]."""

    def __init__(self, width: int, channels: tuple[int, int, int]) -> None:
        super().__init__()
        for i, outputs in enumerate(channels, 1):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(width, outputs, 4, 2, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(outputs))
            width = outputs
        self.relu = nn.ReLU(inplace=True)
        self.final_conv = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.upconv1(x)))
        x = self.relu(self.bn2(self.upconv2(x)))
        x = self.relu(self.bn3(self.upconv3(x)))
        return self.final_conv(x)


class FocusNet(nn.Module):
    """Saliency of an image. ``forward(image)``: float32 [B, 3, H, W], RGB from 0 to 1 less ``MEAN``
    over ``STD``, sides of at least a patch (224x224 as it was trained); returns logits
    [B, 1, H, W], whose ``sigmoid`` is the saliency.

    Args:
        width, depth, patch: of the transformer; heads are 64 wide.
        grid: (height, width) of the position table.
        channels: of the head's three transposed convolutions.
    """

    def __init__(
        self,
        width: int = 384,
        depth: int = 12,
        patch: int = 14,
        grid: tuple[int, int] = (37, 37),
        channels: tuple[int, int, int] = (256, 128, 64),
    ) -> None:
        super().__init__()
        self.encoder = Encoder(width, depth, patch, grid)
        self.decoder = Decoder(width, channels)

    def forward(self, image: Tensor) -> Tensor:
        size = (image.shape[2] // self.encoder.patch, image.shape[3] // self.encoder.patch)
        maps = self.encoder(image)[:, 1:].mT.unflatten(2, size)
        logits = self.decoder(maps)
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)


def load_focus(path: str | os.PathLike[str], model: FocusNet | None = None) -> FocusNet:
    """The saliency network with the weights of its ONNX file, eval mode, no gradients.

    Biases, norms and the head are stored under their names; weights of linear layers are found by
    the product that uses them. Queries, keys and values become one layer.

    Args:
        model: another shape of the same network; by default the published one.

    Raises CheckpointError if the file is not of this network, OpenTransError if onnx is missing.
    """
    model = FocusNet() if model is None else model
    graph = read_onnx(path)
    found: dict[str, Tensor] = {}
    for name, tensor in graph.tensors.items():
        if (own := _own_name(name)) is not None:
            found[own] = tensor
    for node in graph.of_kind("MatMul"):
        weight = graph.constant(node)
        place = re.fullmatch(r"/(.+)/MatMul", node.name)
        own = None if place is None else _own_name(place[1].replace("/", ".") + ".weight")
        if weight is not None and own is not None:
            found[own] = weight.t() if weight.dim() == 2 else weight
    found |= _positions(graph, path)
    try:
        _join(found, len(model.encoder.blocks))
    except (KeyError, RuntimeError) as error:
        raise other_network(path, WHAT, f"lacks queries, keys or values ({error})") from error
    fill(model, found, path, WHAT)
    return model


_EMBEDDING = "backbone.embeddings."
_NAMES = {
    f"{_EMBEDDING}cls_token": "encoder.cls_token",
    f"{_EMBEDDING}patch_embeddings.projection.weight": "encoder.patch_embed.proj.weight",
    f"{_EMBEDDING}patch_embeddings.projection.bias": "encoder.patch_embed.proj.bias",
}
_LINEAR = {
    "attention.attention.query": "attn.query",
    "attention.attention.key": "attn.key",
    "attention.attention.value": "attn.value",
    "attention.output.dense": "attn.proj",
}


def _own_name(name: str) -> str | None:
    """The module's name for a name in the file; None for one that stands for nothing there."""
    if name in _NAMES:
        return _NAMES[name]
    if name.startswith("decoder."):
        return name
    if name.startswith("backbone.layernorm."):
        return name.replace("backbone.layernorm", "encoder.norm")
    place = re.fullmatch(r"backbone\.encoder\.layer\.(\d+)\.(.+)\.(\w+)", name)
    if place is None:
        return None
    part = _LINEAR.get(place[2], place[2].replace("layer_scale", "ls"))
    leaf = "gamma" if place[3] == "lambda1" else place[3]
    return f"encoder.blocks.{int(place[1])}.{part}.{leaf}"


def _positions(graph: Graph, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The table that is resized, behind the class token's own row."""
    for resize in graph.of_kind("Resize"):
        rows = _before(graph, resize.input[0])
        after = graph.chain(resize, ("Cast", "Transpose", "Reshape"), 1)
        first = graph.constant(after[0]) if after and after[0].op_type == "Concat" else None
        if rows is not None and first is not None and rows.dim() == first.dim() == 3:
            if rows.shape[2] == first.shape[2]:
                return {"encoder.pos_embed": torch.cat([first, rows], 1)}
    raise other_network(path, WHAT, "has no table of positions")


def _before(graph: Graph, name: str) -> Tensor | None:
    """The stored tensor that ``name`` is made of by changes of shape."""
    made = {node.output[0]: node for node in graph.nodes}
    while name not in graph.tensors:
        node = made.get(name)
        if node is None or node.op_type not in ("Cast", "Transpose", "Reshape"):
            return None
        name = node.input[0]
    return graph.tensors[name]


def _join(found: dict[str, Tensor], depth: int) -> None:
    for i in range(depth):
        for leaf in ("weight", "bias"):
            names = [f"encoder.blocks.{i}.attn.{part}.{leaf}" for part in ("query", "key", "value")]
            found[f"encoder.blocks.{i}.attn.qkv.{leaf}"] = torch.cat([found.pop(n) for n in names])
