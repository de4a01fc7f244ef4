"""A whole segmenter in one file: tower, head, text encoder and what is needed to build them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors

from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.lazy import optional_module
from opentrans_kernels.masks import atomic_write, open_checkpoint, read_state_dict, split_entry
from opentrans_kernels.masks.limits import brief, parse_json

from ..distill import TextCache
from .clip import COMES_FROM, build_clip
from .deeplab import DeepLabHead
from .mask_head import MaskHead, MaskHeadOptions
from .segmenter import MaskSegmenter, PixelSegmenter, TrunkFeatures
from .text import TEMPLATES, TextClassifier

__all__ = ["Design", "build_segmenter", "is_segmenter", "load_segmenter", "save_segmenter"]

METADATA = "opentrans_segmenter"  # the design, in the metadata of a safetensors file
HEADS = {"pixel": PixelSegmenter, "mask": MaskSegmenter}
TEXT = "text."  # before the names of the text encoder's tensors


@dataclass(frozen=True)
class Design:
    """What a segmenter is built from.

    clip: as ``build_clip`` takes it. head: "pixel" (options of :class:`DeepLabHead`) or "mask" (of
    :class:`MaskHeadOptions`). templates: prompts. size: short side in pixels it was trained for.
    note: what must be said wherever it is used, such as that its weights are synthetic.
    """

    clip: Mapping[str, Any]
    head: str = "pixel"
    options: Mapping[str, Any] = field(default_factory=dict)
    templates: tuple[str, ...] = TEMPLATES
    size: int = 512
    note: str = ""


def build_segmenter(design: Design) -> PixelSegmenter | MaskSegmenter:
    """The model of a design with random weights, in eval mode; its text encoder is frozen.

    Raises OpenTransError for a head that does not exist or options it does not have.
    """
    if design.head not in HEADS:
        raise OpenTransError(f"head={design.head!r} must be one of {', '.join(HEADS)}.")
    clip = build_clip(design.clip).float().eval().requires_grad_(False)
    tokenizer = _tokenizer(int(design.clip["text"]["context_length"]))
    backbone = TrunkFeatures(clip.visual)
    classifier = TextClassifier(TextCache(clip, tokenizer), templates=design.templates)
    width = int(design.clip["embed_dim"])
    try:
        if design.head == "pixel":
            head: Any = DeepLabHead(backbone.channels, width, **design.options)
        else:
            head = MaskHead(backbone.channels, width, MaskHeadOptions(**design.options))
    except TypeError as error:
        raise OpenTransError(
            f"the options of a {design.head!r} head cannot be {brief(dict(design.options))} "
            f"({error})."
        ) from error
    return HEADS[design.head](backbone, head, classifier).eval()


def save_segmenter(
    path: str | os.PathLike[str], model: PixelSegmenter | MaskSegmenter, design: Design
) -> Path:
    """Write weights and design of ``build_segmenter(design)`` into one safetensors file, whole or
    not at all. The model must not be accelerated: restore it first.

    Raises OpenTransError if it is not of this design.
    """
    state = _state(model)
    expected = _state(build_segmenter(design))
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in expected.items()}:
        raise OpenTransError(
            f"the model is not of the design it is to be saved with ({len(state)} tensors, the "
            f"design has {len(expected)}). Pass the design it was built from."
        )
    kept = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    metadata = {METADATA: json.dumps(dataclasses.asdict(design))}
    atomic_write(path, to_safetensors(kept, metadata))
    return Path(path)


def is_segmenter(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of :func:`save_segmenter`. Raises CheckpointError if unreadable."""
    return METADATA in open_checkpoint(split_entry(os.fspath(path))[0]).metadata


def load_segmenter(
    path: str | os.PathLike[str],
) -> tuple[PixelSegmenter | MaskSegmenter, Design]:
    """The model of :func:`save_segmenter`, in eval mode, and its design.

    Raises CheckpointError for another file or one that is damaged.
    """
    text = open_checkpoint(os.fspath(path)).metadata.get(METADATA)
    if text is None:
        raise CheckpointError(
            f"{path} is no file of save_segmenter. For a checkpoint of detectron2 name its config "
            "too: --config FILE."
        )
    design = _design(path, text)
    try:
        model = build_segmenter(design)
    except (OpenTransError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, OpenTransError) and "pip install" in str(error):
            raise
        raise _damaged(path, f"no model can be built from its design ({error})") from error
    own, given = _state(model), read_state_dict(os.fspath(path))
    odd = sorted(k for k in own if k not in given or given[k].shape != own[k].shape)
    if odd or set(given) - set(own):
        raise _damaged(path, f"its tensors are not those of its design ({brief(odd[:3])})")
    for name, value in own.items():
        value.copy_(given[name])
    return model, design


@functools.cache
def _tokenizer(context_length: int) -> Any:
    """open_clip's, which takes a second to read its words."""
    return optional_module("open_clip", COMES_FROM).SimpleTokenizer(context_length=context_length)


@torch.no_grad()
def _state(model: PixelSegmenter | MaskSegmenter) -> dict[str, torch.Tensor]:
    """Tensors by name, those of the text encoder included, which is no child of the model."""
    encoder = model.classifier.cache.encoder.state_dict()
    text = {TEXT + k: v for k, v in encoder.items() if not k.startswith("visual.")}
    return {name: value.detach() for name, value in {**model.state_dict(), **text}.items()}


def _design(path: str | os.PathLike[str], text: str) -> Design:
    try:
        content = parse_json(text)
        names = {one.name for one in dataclasses.fields(Design)}
        valid = isinstance(content, dict) and set(content) == names
        valid = valid and isinstance(content["clip"], dict) and isinstance(content["options"], dict)
        valid = valid and type(content["size"]) is int and content["size"] >= 32
        valid = valid and all(isinstance(content[key], str) for key in ("head", "note"))
        valid = valid and all(isinstance(one, str) for one in content["templates"])
    except (ValueError, TypeError):
        valid = False
    if not valid:
        raise _damaged(path, "its design is not as it was written")
    return Design(**{**content, "templates": tuple(content["templates"])})


def _damaged(path: str | os.PathLike[str], what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a file of save_segmenter, but {what}. Copy it again from its source, or save "
        "it again."
    )
