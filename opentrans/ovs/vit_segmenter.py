"""Segmenter: a plain vision transformer with a linear or a mask-transformer decoder.

Strudel et al., arXiv 2105.05633. The names of parameters are those of the published checkpoints,
so that these load as they are. Without dropout, which only their training uses. Its tokens can be
reduced (:meth:`Segmenter.reduce`): then the decoder works on reduced tokens, and the logits, not
the features, come back to the full map.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.masks import read_state_dict
from opentrans_kernels.tokens import TokenPlan, TokenState, reduce_tokens, token_state

from ..systems_tokens import SHAPES

__all__ = ["Segmenter", "build_vit_segmenter", "load_vit_segmenter"]

HEAD_WIDTH = 64
#: Of a published encoder, but of no use here: its head for whole images.
_UNUSED = ("encoder.head.", "encoder.head_dist.", "encoder.pre_logits.")


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*three, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, 4 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.proj(image)


class VitEncoder(nn.Module):
    """[B, 3, H, W], sides multiples of the patch -> tokens [B, prefix + H W / patch^2, width].

    grid: (height, width) of the position table, which is resized bilinearly for other maps.
    """

    def __init__(
        self, width: int, depth: int, heads: int, patch: int, grid: tuple[int, int], distilled: bool
    ) -> None:
        super().__init__()
        self.patch, self.grid, self.prefix = patch, grid, 2 if distilled else 1
        self.patch_embed = PatchEmbedding(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + grid[0] * grid[1], width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def positions(self, size: tuple[int, int]) -> torch.Tensor:
        """[1, prefix + h w, width], for a map of (h, w) tokens."""
        if size == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        table = F.interpolate(table, size, mode="bilinear", align_corners=False)
        return torch.cat([self.pos_embed[:, : self.prefix], table.flatten(2).transpose(1, 2)], 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = self.patch_embed(image)
        first = [self.cls_token] + ([self.dist_token] if self.prefix == 2 else [])
        first = [token.expand(len(maps), -1, -1) for token in first]
        x = torch.cat([*first, maps.flatten(2).transpose(1, 2)], 1)
        x = x + self.positions(tuple(maps.shape[2:]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class LinearDecoder(nn.Module):
    """Tokens [B, n, width] -> logits [B, n, K]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class MaskTransformer(nn.Module):
    """Tokens [B, n, width] -> logits [B, n, K]: cosines of patches and class tokens, normalised."""

    def __init__(self, width: int, classes: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.cls_emb = nn.Parameter(torch.zeros(1, classes, width))
        self.proj_dec = nn.Linear(width, width)
        self.proj_patch = nn.Parameter(torch.zeros(width, width))
        self.proj_classes = nn.Parameter(torch.zeros(width, width))
        self.decoder_norm = nn.LayerNorm(width)
        self.mask_norm = nn.LayerNorm(classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        x = torch.cat([self.proj_dec(x), self.cls_emb.expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches, classes = x[:, :n] @ self.proj_patch, x[:, n:] @ self.proj_classes
        patches = patches / patches.norm(dim=-1, keepdim=True)
        classes = classes / classes.norm(dim=-1, keepdim=True)
        return self.mask_norm(patches @ classes.mT)


class Segmenter(nn.Module):
    """Images [B, 3, H, W], normalised as for training, any size -> logits [B, K, H, W].

    Args:
        width, depth, heads, patch: of the encoder. grid: (height, width) of its position table.
        classes: K. decoder_layers: of the mask transformer; 0: a linear decoder.
        distilled: with the second prefix token of DeiT.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        patch: int = 16,
        grid: tuple[int, int] = (32, 32),
        classes: int = 150,
        decoder_layers: int = 2,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.classes = patch, classes
        self.encoder = VitEncoder(width, depth, heads, patch, grid, distilled)
        if decoder_layers:
            self.decoder: nn.Module = MaskTransformer(width, classes, decoder_layers, heads)
        else:
            self.decoder = LinearDecoder(width, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if image.dim() != 4 or image.shape[1] != 3:
            raise OpenTransError(
                f"a Segmenter takes images [B, 3, H, W], got {tuple(image.shape)}."
            )
        height, width = image.shape[2:]
        image = F.pad(image, (0, -width % self.patch, 0, -height % self.patch))
        logits = self.token_logits(image)
        maps = (image.shape[2] // self.patch, image.shape[3] // self.patch)
        # Planes: as channels_last it would be enlarged so, and copied at full size afterwards.
        logits = logits.transpose(1, 2).unflatten(2, maps).contiguous()
        logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def token_logits(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W], sides multiples of the patch -> logits [B, H W / patch^2, K]."""
        logits = self.decoder(self.encoder(image)[:, self.encoder.prefix :])
        state = token_state(self.encoder)
        return logits if state is None or state.plan.expand else state.expand(logits)

    def reduce(self, plan: TokenPlan) -> TokenState:
        """:func:`~opentrans_kernels.tokens.reduce_tokens` of the encoder. With ``expand=False`` the
        decoder works on reduced tokens, as in the published version."""
        return reduce_tokens(self.encoder, plan)

    def slide(
        self, image: torch.Tensor, window: int, stride: int | None = None, batch: int = 1
    ) -> torch.Tensor:
        """Logits [1, K, H, W] of one image [1, 3, H, W] from square windows, averaged where they
        overlap. A smaller image is enlarged first, until its short side is the window.

        window, stride (default: the window) in pixels; batch: windows per call.

        Raises:
            OpenTransError: another shape, or windows that leave gaps.
        """
        stride = window if stride is None else stride
        if image.dim() != 4 or image.shape[:2] != (1, 3) or not 0 < stride <= window or batch < 1:
            raise OpenTransError(
                f"slide: one image [1, 3, H, W], 0 < stride <= window and batch >= 1 are needed, "
                f"got {tuple(image.shape)}, window {window}, stride {stride}, batch {batch}."
            )
        size = tuple(image.shape[2:])
        if (short := min(size)) < window:
            larger = [max(window, side * window // short) for side in size]
            image = F.interpolate(image, larger, mode="bilinear", align_corners=False)
        height, width = image.shape[2:]
        places = [(y, x) for y in _starts(height, window, stride)
                  for x in _starts(width, window, stride)]  # fmt: skip
        total = image.new_zeros(1, self.classes, height, width)
        count = image.new_zeros(1, 1, height, width)
        for first in range(0, len(places), batch):
            some = places[first : first + batch]
            crops = [image[..., y : y + window, x : x + window] for y, x in some]
            for (y, x), logits in zip(some, self(torch.cat(crops)), strict=True):
                total[0, :, y : y + window, x : x + window] += logits
                count[..., y : y + window, x : x + window] += 1
        return F.interpolate(total / count, size, mode="bilinear", align_corners=False)


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    """Where windows begin: every stride, and one that ends at the end."""
    yield from range(0, length - window, stride)
    yield length - window


def build_vit_segmenter(
    name: str,
    *,
    classes: int = 150,
    decoder: str = "mask",
    image_size: int = 512,
    seed: int = 0,
) -> Segmenter:
    """A Segmenter of a published size with random weights, in eval mode.

    name: "segmenter-s16", "segmenter-b16" or "segmenter-l16". decoder: "mask" or "linear".

    Raises:
        OpenTransError: another name, decoder or size.
    """
    if name not in SHAPES or decoder not in ("mask", "linear") or image_size < 16 or classes < 1:
        raise OpenTransError(
            f"no Segmenter is {name!r} with decoder {decoder!r}, {classes} classes, image size "
            f"{image_size}. Names: {', '.join(SHAPES)}; decoders: mask, linear; image_size from 16."
        )
    shape, side = SHAPES[name], image_size // 16
    layers = shape.decoder_layers if decoder == "mask" else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Segmenter(
            shape.width, shape.depth, shape.heads, patch=shape.patch, grid=(side, side),
            classes=classes, decoder_layers=layers,
        )  # fmt: skip
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in key and "proj.weight" not in key:
                scale = shape.width**-0.5 if "proj_" in key and key[-6:] != "weight" else 0.02
                nn.init.trunc_normal_(parameter, std=scale)
    return model.eval()


def load_vit_segmenter(
    path: str | os.PathLike[str], *, grid: tuple[int, int] | None = None
) -> Segmenter:
    """A Segmenter from a published checkpoint, in eval mode; its sizes are read from the weights.

    grid: (height, width) of the position table, where it is not square. Heads are 64 wide, as in
    all published ones.

    Raises:
        CheckpointError: an unreadable file, or weights of something else.
    """
    state = {k: v for k, v in read_state_dict(path).items() if not k.startswith(_UNUSED)}
    try:
        options = _options(state, grid)
        with torch.device("meta"):
            model = Segmenter(**options)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise _foreign(path, f"{type(error).__name__}: {error}") from error
    own = model.state_dict()
    odd = sorted(set(own) ^ set(state))
    odd += [k for k in own if k in state and own[k].shape != state[k].shape]
    if odd:
        raise _foreign(path, f"{odd[0]} is missing, left over or of another shape")
    if bad := [k for k, v in state.items() if not v.is_floating_point()]:
        raise _foreign(path, f"{bad[0]} is {state[bad[0]].dtype}")
    model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return model.eval()


def _options(state: Mapping[str, torch.Tensor], grid: tuple[int, int] | None) -> dict[str, Any]:
    width, _, patch, _ = state["encoder.patch_embed.proj.weight"].shape
    distilled = "encoder.dist_token" in state
    count = state["encoder.pos_embed"].shape[1] - 1 - distilled
    side = math.isqrt(max(count, 0))
    if grid is None and side * side != count:
        raise ValueError(
            f"its position table has {count} entries, which is no square; pass grid=(height, width)"
        )
    linear = "decoder.head.weight" in state
    key = "decoder.head.weight" if linear else "decoder.mask_norm.weight"
    if width % HEAD_WIDTH:
        raise ValueError(f"its width {width} is no multiple of {HEAD_WIDTH}")
    return {
        "width": width,
        "depth": _count(state, "encoder.blocks."),
        "heads": width // HEAD_WIDTH,
        "patch": patch,
        "grid": tuple(grid or (side, side)),
        "classes": len(state[key]),
        "decoder_layers": 0 if linear else _count(state, "decoder.blocks."),
        "distilled": distilled,
    }


def _count(state: Mapping[str, torch.Tensor], start: str) -> int:
    return len({key[len(start) :].partition(".")[0] for key in state if key.startswith(start)})


def _foreign(path: str | os.PathLike[str], why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} does not hold a Segmenter with ViT encoder and linear or mask-transformer decoder "
        f"({why}). Give a checkpoint as its authors publish them."
    )
