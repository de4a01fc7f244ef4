"""CLIP from a file: the tower for pictures and the encoder for text, never silently random."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.lazy import optional_module
from opentrans_kernels.masks import (
    atomic_write,
    open_checkpoint,
    read_state_dict,
    split_entry,
)
from opentrans_kernels.masks.files import CheckpointFile
from opentrans_kernels.masks.limits import parse_json

__all__ = ["RANDOM", "Clip", "build_clip", "load_clip", "save_clip"]

log = logging.getLogger(__name__)

RANDOM = "random"
COMES_FROM = "CLIP comes from open_clip"
METADATA = "opentrans_clip"  # the shape of a CLIP, in the metadata of a safetensors file
# Numbers that OpenAI's archives keep beside the weights.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class Clip:
    """model: an open_clip CLIP, frozen, eval mode. tokenizer: strings -> token ids [n, L].

    embed_dim: channels of image and text embeddings. random: the weights are not trained ones.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], torch.Tensor]
    embed_dim: int
    random: bool


def load_clip(weights: str, arch: str = "RN50") -> Clip:
    """CLIP with the weights of a file.

    Args:
        weights: a file (or FILE:ENTRY): one of :func:`save_clip` (which knows its own shape), an
            open_clip state dict, or OpenAI's TorchScript archive; or a tag that open_clip
            downloads, such as "openai"; or "random", for tests and timing.
        arch: a CLIP of open_clip; not used for files of ``save_clip``.

    Raises:
        OpenTransError: no weights are named, open_clip is missing, or it knows neither arch nor
            tag.
        CheckpointError: the file is missing, damaged or of another CLIP.
    """
    open_clip = _open_clip()
    if not weights:
        raise OpenTransError(
            "no CLIP weights are named, and random ones are never used unasked. Name a file (an "
            f"open_clip or OpenAI checkpoint of {arch}), a tag such as 'openai', or "
            f"{RANDOM!r} if random weights are what you want."
        )
    path = split_entry(weights)[0]
    file = open_checkpoint(path) if os.path.exists(path) else None
    if file is not None and (shape := _shape_of(file)) is not None:
        model = build_clip(shape)
        _fill(model, read_state_dict(weights), weights)
        return _frozen(
            model, open_clip.SimpleTokenizer(context_length=shape["text"]["context_length"]), False
        )
    if arch not in open_clip.list_models():
        raise OpenTransError(
            f"open_clip knows no model {arch!r}. Use one of "
            f"{', '.join(n for n in open_clip.list_models() if n.startswith('RN'))}."
        )
    if weights == RANDOM:
        log.warning("CLIP %s has random weights: its embeddings mean nothing.", arch)
        model = open_clip.create_model(arch)
    elif file is None and not os.path.splitext(weights)[1] and "/" not in weights:
        tags = open_clip.list_pretrained_tags_by_model(arch)
        if weights not in tags:
            raise OpenTransError(
                f"{weights!r} is neither a file nor weights that open_clip has for {arch}. Name a "
                f"file, or one of {', '.join(tags)}."
            )
        model = open_clip.create_model(arch, pretrained=weights)
    else:
        # OpenAI's models have another activation, which their archives do not mention.
        openai = (file or open_checkpoint(path)).container == "torchscript"
        model = open_clip.create_model(arch, force_quick_gelu=openai)
        _fill(model, read_state_dict(weights), weights)
    return _frozen(model, open_clip.get_tokenizer(arch), weights == RANDOM)


def build_clip(shape: Mapping[str, Any]) -> nn.Module:
    """An open_clip CLIP of ``{"embed_dim": int, "vision": {...}, "text": {...}}``, random weights.

    "vision" and "text" are the options of open_clip's CLIPVisionCfg and CLIPTextCfg.
    """
    model = optional_module("open_clip.model", COMES_FROM)
    return model.CLIP(shape["embed_dim"], dict(shape["vision"]), dict(shape["text"]))


def save_clip(path: str | os.PathLike[str], model: nn.Module, shape: Mapping[str, Any]) -> Path:
    """Write weights and shape of ``build_clip(shape)`` into one safetensors file, whole or not."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    metadata = {METADATA: json.dumps(shape)}  # one entry: safetensors writes several in any order
    atomic_write(path, to_safetensors(state, metadata))
    return Path(path)


def _shape_of(file: CheckpointFile) -> dict[str, Any] | None:
    text = file.metadata.get(METADATA)
    if text is None:
        return None
    try:
        shape = parse_json(text)
        context = shape["text"]["context_length"]
        valid = type(context) is int and type(shape["embed_dim"]) is int
        valid &= isinstance(shape["vision"], dict)
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise CheckpointError(
            f"{file.path} is a file of save_clip, but the shape of its CLIP is damaged. Copy it "
            "again from its source, or save it again."
        )
    return shape


def _fill(model: nn.Module, state: Mapping[str, torch.Tensor], name: str) -> None:
    own = model.state_dict()
    given = {
        key.removeprefix("module."): value
        for key, value in state.items()
        if key.removeprefix("module.") not in NOT_WEIGHTS
    }
    # A causal mask that some versions keep as a buffer; it follows from the context length.
    wanted = {key for key in own if key != "attn_mask" and not key.endswith("num_batches_tracked")}
    odd = sorted(key for key in wanted if key not in given or given[key].shape != own[key].shape)
    if odd:
        held = tuple(given[odd[0]].shape) if odd[0] in given else "absent"
        raise CheckpointError(
            f"{name} is not this CLIP: {len(odd)} of {len(wanted)} tensors are missing or differ, "
            f"such as {odd[0]} ({held} in the file, {tuple(own[odd[0]].shape)} here). Name the "
            "file of the whole CLIP, text encoder included, and its arch."
        )
    model.load_state_dict({key: given[key] for key in own if key in given}, strict=False)


def _frozen(model: nn.Module, tokenizer: Any, random: bool) -> Clip:
    model = model.float().eval().requires_grad_(False)
    projection = getattr(model, "text_projection", None)
    width = projection.shape[1] if isinstance(projection, torch.Tensor) else model.visual.output_dim
    return Clip(model, tokenizer, int(width), random)


def _open_clip() -> Any:
    return optional_module("open_clip", COMES_FROM)
