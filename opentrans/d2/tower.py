"""The CLIP ResNet tower: built from open_clip's blocks, loaded from a file, giving dense features.

Parameters have the names of CLIP's ``visual`` module, so weights and masks fit by name. Needs no
detectron2; ``backbone.py`` registers it there.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.bench.subject import load_weights_from
from opentrans_kernels.errors import CheckpointError, UnsupportedModelError
from opentrans_kernels.lazy import optional_module
from opentrans_kernels.masks import read_state_dict, split_entry

from ..ovs.clip import RANDOM
from .config import OpenTransConfig
from .config_nodes import ConfigError
from .config_options import FEATURES

__all__ = ["ClipTower", "clip_resnet", "pool_positions", "resize_positions", "tower_arguments"]

log = logging.getLogger(__name__)

BUILT_FROM = "the CLIP tower is built from open_clip"
_TABLE = "attnpool.positional_embedding"
_PARTS = tuple(f"{kind}{i}" for i in (1, 2, 3) for kind in ("conv", "bn", "act"))
_STAGES = ("layer1", "layer2", "layer3", "layer4")
#: Feature -> stride; clip_embedding is a vector per region and has none.
STRIDES = {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32, "clip_vis_dense": 32}
STRIDES |= {"attn": 32, "clip_embedding": -1}
_POOLED = ("attn", "clip_embedding")  # features that need the attention pool


class ClipTower(nn.Module):
    """CLIP's ModifiedResNet (Radford et al. 2021), giving its feature maps.

    Args:
        arch: a CLIP ResNet of open_clip; width, layers and so on are taken from it.
        weights: file with the weights: open_clip's or OpenAI's (TorchScript, its code is not run)
            or a state dict under any prefix. "random": random weights, with a warning. "": the
            weights must be loaded before the first forward, which raises otherwise.
        width: channels after the stem, a multiple of 16; 0: the arch's.
        layers: blocks of the four stages; empty: the arch's.
        output_dim: channels of ``attn``; 0: the arch's.
        input_resolution: side in pixels that the position table is made for; 0: the arch's. Any
            input size works, the table is interpolated.
        out_features: of ``config.FEATURES``. Without ``attn`` and ``clip_embedding`` the tower has
            no attention pool. ``clip_embedding`` asks for the pool and ``clip_vis_dense``, to
            which the caller applies it (:func:`pool_positions`).

    Raises:
        OpenTransError: open_clip is missing, or arch or features are unknown.
        CheckpointError, UnsupportedModelError: the file cannot be read or is of another tower.
    """

    def __init__(
        self,
        arch: str = "RN50",
        weights: str = "",
        *,
        width: int = 0,
        layers: Sequence[int] = (),
        output_dim: int = 0,
        input_resolution: int = 0,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
    ) -> None:
        super().__init__()
        unknown = [name for name in out_features if name not in FEATURES]
        if unknown or not out_features:
            raise ConfigError(
                f"out_features={list(out_features)!r} must be some of {', '.join(FEATURES)}."
            )
        state = None if weights in ("", RANDOM) else _read(weights)
        shape = _shape_of(arch, width, layers, output_dim, input_resolution)
        pooled = any(name in _POOLED for name in out_features)
        source = _build(shape, state, weights, pooled)
        if pooled:
            _fit_table(source, shape["image_size"] // 32)
        for name in (*_PARTS, "avgpool", *_STAGES):
            setattr(self, name, getattr(source, name))
        self.attnpool = source.attnpool if pooled else None
        self.image_size = shape["image_size"]
        self.out_features = tuple(out_features)
        channels = [shape["width"] * 4 * 2**i for i in range(4)]
        self.channels = {
            "stem": shape["width"],
            **{f"res{i + 2}": count for i, count in enumerate(channels)},
            "clip_vis_dense": channels[-1],
            "attn": shape["output_dim"],
            "clip_embedding": shape["output_dim"],
        }
        #: Where the weights are from: a file, "random", "checkpoint", or "" as long as unknown.
        self.weights = weights
        self.register_load_state_dict_pre_hook(_before_load)
        if weights == RANDOM:
            log.warning(
                "%s has RANDOM weights, as MODEL.OPENTRANS.WEIGHTS says: features mean nothing "
                "until it is trained. Name a weights file to change that.",
                arch,
            )

    def feature_shapes(self) -> dict[str, tuple[int, int]]:
        """Feature -> (channels, stride), in the order asked for."""
        return {name: (self.channels[name], STRIDES[name]) for name in self.out_features}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features [B, C, H, W] of a batch of normalised images [B, 3, H, W], any H and W."""
        if not self.weights and not x.is_meta:
            raise CheckpointError(
                "the CLIP tower still has its random initial weights: MODEL.OPENTRANS.WEIGHTS is "
                "empty and no checkpoint with its weights was loaded. Set MODEL.OPENTRANS.WEIGHTS "
                "to a weights file, or MODEL.WEIGHTS to a checkpoint that holds the tower, or "
                f"write MODEL.OPENTRANS.WEIGHTS {RANDOM}."
            )
        x = x.to(self.conv1.weight.dtype)
        found: dict[str, torch.Tensor] = {}
        for i in (1, 2, 3):
            x = getattr(self, f"conv{i}")(x)
            x = getattr(self, f"act{i}")(getattr(self, f"bn{i}")(x))
        found["stem"] = x
        x = self.avgpool(x)
        for i, stage in enumerate(_STAGES):
            x = getattr(self, stage)(x)
            found[f"res{i + 2}"] = x
        found["clip_vis_dense"] = x
        if self.attnpool is not None and "attn" in self.out_features:
            found["attn"] = pool_positions(self.attnpool, x)[1]
        # FC-CLIP's backbone lists clip_embedding in its shapes and returns clip_vis_dense.
        wanted = {"clip_vis_dense" if n == "clip_embedding" else n for n in self.out_features}
        return {name: value for name, value in found.items() if name in wanted}


def tower_arguments(options: OpenTransConfig) -> dict[str, Any]:
    """Arguments of :class:`ClipTower` from a config."""
    return {
        "arch": options.ARCH,
        "weights": options.WEIGHTS,
        "width": options.WIDTH,
        "layers": options.LAYERS,
        "output_dim": options.OUTPUT_DIM,
        "input_resolution": options.INPUT_RESOLUTION,
        "out_features": options.OUT_FEATURES,
    }


def pool_positions(pool: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's attention pool with an answer for every position.

    Tokens are the mean of the map and its positions, plus the position table, bilinearly
    interpolated to the map; every token attends to all.

    Args:
        pool: CLIP's AttentionPool2d (``q_proj``, ``k_proj``, ``v_proj``, ``c_proj``,
            ``positional_embedding`` [1 + S*S, C], ``num_heads``).
        x: [B, C, H, W].

    Returns:
        The answer of the mean [B, D], which is CLIP's image embedding, and the map [B, D, H, W].
    """
    batch, channels, height, width = x.shape
    tokens = x.flatten(2).transpose(1, 2)  # [B, HW, C]
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
    table: torch.Tensor = pool.positional_embedding  # type: ignore[assignment]
    tokens = tokens + resize_positions(table, (height, width)).to(tokens.dtype)
    heads = int(pool.num_heads)  # type: ignore[arg-type]

    def split(project: Any) -> torch.Tensor:
        return project(tokens).unflatten(2, (heads, channels // heads)).transpose(1, 2)

    answer = F.scaled_dot_product_attention(
        split(pool.q_proj), split(pool.k_proj), split(pool.v_proj)
    )
    answer = pool.c_proj(answer.transpose(1, 2).flatten(2))  # type: ignore[operator]
    positions = answer[:, 1:].transpose(1, 2).unflatten(2, (height, width))
    return answer[:, 0], positions


def resize_positions(table: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A position table [1 + S*S, C] for a map of ``size``: [1 + H*W, C], bilinear."""
    side = math.isqrt(len(table) - 1)
    if size == (side, side):
        return table
    grid = table[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
    return torch.cat([table[:1], grid[0].flatten(1).transpose(0, 1)])


def _shape_of(
    arch: str, width: int, layers: Sequence[int], output_dim: int, resolution: int
) -> dict[str, Any]:
    """Arguments of open_clip's ModifiedResNet."""
    open_clip = optional_module("open_clip", BUILT_FROM)
    config = open_clip.get_model_config(arch) or {}
    vision = config.get("vision_cfg", {})
    if not isinstance(vision.get("layers"), list):
        known = [name for name in open_clip.list_models() if name.startswith("RN")]
        raise ConfigError(
            f"MODEL.OPENTRANS.ARCH={arch!r} is not a CLIP ResNet known to open_clip. Use one "
            f"of {', '.join(known)}."
        )
    width = width or vision["width"]
    return {
        "layers": list(layers) or vision["layers"],
        "output_dim": output_dim or config["embed_dim"],
        "heads": width * 32 // vision.get("head_width", 64),
        "image_size": resolution or vision["image_size"],
        "width": width,
    }


def clip_resnet(arch: str, *, image_size: int = 0) -> nn.Module:
    """open_clip's own tower ``arch`` with its random initial weights, for counting and tests."""
    shape = _shape_of(arch, 0, (), 0, image_size)
    return _modified_resnet()(**shape)


def _modified_resnet() -> Any:
    """open_clip's class of CLIP ResNets. Raises OpenTransError if open_clip is missing."""
    return optional_module("open_clip.modified_resnet", BUILT_FROM).ModifiedResNet


def _build(
    shape: dict[str, Any], state: dict[str, torch.Tensor] | None, file: str, pooled: bool
) -> nn.Module:
    """The tower with the weights of ``state``, its position table as large as the file's."""
    tables = [] if state is None else [v for k, v in state.items() if k.endswith(_TABLE)]
    side = math.isqrt(len(tables[0]) - 1) if tables else shape["image_size"] // 32
    tower = _modified_resnet()(**{**shape, "image_size": side * 32})
    if state is None:
        return tower
    if not tables and pooled:
        raise CheckpointError(
            f"MODEL.OPENTRANS.WEIGHTS={file!r} has no attention pool, and {' and '.join(_POOLED)} "
            "come from it: they would be random. Name a file of the whole CLIP tower, or take them "
            "out of MODEL.OPENTRANS.OUT_FEATURES."
        )
    if not tables:  # saved without its pool, which is not kept here either
        state = {**_own(tower, "attnpool.", state), **state}
    try:
        load_weights_from(tower, state, os.path.basename(file))
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(
            f"MODEL.OPENTRANS.WEIGHTS={file!r}: {error} Check MODEL.OPENTRANS.ARCH, WIDTH, LAYERS "
            "and OUTPUT_DIM against the file."
        ) from error
    return tower


def _own(tower: nn.Module, part: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tower's own values for ``part``, under the prefix the file uses."""
    anchor = next((k for k in state if k.endswith("layer1.0.conv1.weight")), "")
    prefix = anchor.removesuffix("layer1.0.conv1.weight")
    return {prefix + k: v for k, v in tower.state_dict().items() if k.startswith(part)}


def _fit_table(tower: nn.Module, side: int) -> None:
    pool = tower.attnpool
    table = pool.positional_embedding.detach()
    pool.positional_embedding = nn.Parameter(resize_positions(table, (side, side)).clone())


def _read(path: str) -> dict[str, torch.Tensor]:
    if not os.path.isfile(split_entry(path)[0]):
        raise CheckpointError(
            f"MODEL.OPENTRANS.WEIGHTS={path!r} is not a file. Name a weights file (OpenAI's "
            f"RN50.pt, an open_clip checkpoint), or write {RANDOM} to start from random weights."
        )
    return read_state_dict(path)


def _before_load(
    tower: ClipTower, state: dict[str, torch.Tensor], prefix: str, *_rest: Any
) -> None:
    """Folds pruned pairs, so that a masked checkpoint never leaves convolutions as they were."""
    ends = ("_orig", "_mask")
    pairs = [k[: -len(ends[0])] for k in state if k.startswith(prefix) and k.endswith(ends[0])]
    kept = total = 0
    for key in pairs:
        if key + ends[1] in state:
            mask = state.pop(key + ends[1])
            state[key] = state.pop(key + ends[0]).masked_fill(mask == 0, 0)
            kept, total = kept + int(torch.count_nonzero(mask)), total + mask.numel()
    if total:
        log.info(
            "folded %d masked layers of the checkpoint: density %.4f", len(pairs), kept / total
        )
    # Part of the weights would leave the rest random; old files lack the counters of batch norms.
    needed = (key for key in tower.state_dict() if not key.endswith("num_batches_tracked"))
    if not tower.weights and all(prefix + key in state for key in needed):
        tower.weights = "checkpoint"
