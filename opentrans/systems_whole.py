"""Whole segmentation models with random heads and synthetic towers, built for measuring.

The published systems from their own checkouts (``opentrans.d2.trees``), our own ones, and
transformers' Mask2Former; the last two need no checkout. Text embeddings are random unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from opentrans_kernels.bench.whole import Whole
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import optional_module, require_packages
from opentrans_kernels.synthetic import synthetic_rn50

from .d2 import trees
from .d2.towers import find_tower
from .distill import TextCache

__all__ = ["WHOLE_SYSTEMS", "build_whole"]

EMBED_DIM = 1024  # of CLIP RN50
_CLIP = {"open_clip": "the tower is built from open_clip"}
HF_NEEDS = "Mask2Former is transformers' model"


def build_whole(
    system: str,
    size: tuple[int, int],
    *,
    queries: int | None = None,
    classes: int = 150,
    tree: Path | None = None,
) -> Whole:
    """A dense model of ``WHOLE_SYSTEMS`` and how it is run on one image of noise.

    Args:
        size: (height, width) in pixels, at least 64.
        queries: masks per image; None: the system's own number; DeepLab has none.
        classes: of the vocabulary.
        tree: checkout, for the published systems.

    Raises:
        OpenTransError: no such system, an option it has not, or what it needs is not there.
    """
    if system not in WHOLE_SYSTEMS:
        raise OpenTransError(f"no system {system!r}. Choose {', '.join(WHOLE_SYSTEMS)}.")
    if min(size) < 64:
        raise OpenTransError(f"size {size[0]}x{size[1]} is too small: 64 pixels are needed.")
    if queries is not None and system in ("deeplab", "ovs-pixel"):
        raise OpenTransError(f"{system} classifies pixels and has no queries. Leave --queries out.")
    if tree is not None and system not in trees.SYSTEMS:
        raise OpenTransError(f"{system} needs no checkout. Leave --tree out.")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = WHOLE_SYSTEMS[system](system, size, queries, classes, tree)
    made.model.eval().requires_grad_(False)
    made.facts |= {"classes": classes}
    return made


def _published(
    system: str, size: tuple[int, int], queries: int | None, classes: int, tree: Path | None
) -> Whole:
    folder = trees.find_tree(system, tree)
    options = ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", str(queries)) if queries else ()
    model, cfg = trees.build(system, folder, classes, options)
    tower = find_tower(model)
    if system == "fc-clip":
        # Magnitudes of freshly initialised layers differ by their size, so a global mask would
        # empty whole layers and flatter the sparse side.
        tower.module.load_state_dict(synthetic_rn50().state_dict())
    record = trees.image_record(size, classes)

    def run(model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        return model([{**record, "image": record["image"].to(dtype)}])[0]["sem_seg"]

    asked = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES if system != "deeplab" else None
    return Whole(system, model, tower.path, run, {"queries": asked}, "sem_seg_head")


def _own(
    system: str, size: tuple[int, int], queries: int | None, classes: int, tree: Path | None
) -> Whole:
    from .ovs import (
        DeepLabHead,
        MaskHead,
        MaskHeadOptions,
        MaskSegmenter,
        PixelSegmenter,
        TextClassifier,
        TrunkFeatures,
    )
    from .ovs.mask_head import MASK_HEAD_NEEDS

    require_packages(_CLIP | (MASK_HEAD_NEEDS if system == "ovs-mask" else {}))
    backbone = TrunkFeatures(synthetic_rn50())
    classifier = TextClassifier(TextCache(_Words(EMBED_DIM).eval(), _tokens), templates=("{}",))
    names = tuple(f"class {i}" for i in range(classes))
    model: nn.Module
    if system == "ovs-mask":
        options = MaskHeadOptions(queries=queries or MaskHeadOptions.queries)
        model = MaskSegmenter(backbone, MaskHead(backbone.channels, EMBED_DIM, options), classifier)
        queries = options.queries
    else:
        model = PixelSegmenter(backbone, DeepLabHead(backbone.channels, EMBED_DIM), classifier)
    image = _image(size)

    def run(model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        return model(image.to(dtype), names)[0]

    return Whole(system, model, "backbone.tower", run, {"queries": queries})


def _hugging_face(
    system: str, size: tuple[int, int], queries: int | None, classes: int, tree: Path | None
) -> Whole:
    library = optional_module("transformers", HF_NEEDS)
    resnet = library.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = library.Mask2FormerConfig(
        backbone_config=resnet, num_queries=queries or 100, num_labels=classes
    )
    model = library.Mask2FormerForUniversalSegmentation(config)
    image = _image(size)

    def run(model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        found = model(pixel_values=image.to(dtype))
        masks = nn.functional.interpolate(
            found.masks_queries_logits, size, mode="bilinear", align_corners=False
        )
        shares = found.class_queries_logits.softmax(-1)[..., :-1]
        return torch.einsum("qc,qhw->chw", shares[0], masks[0].sigmoid())

    tower = "model.pixel_level_module.encoder"
    return Whole(system, model, tower, run, {"queries": config.num_queries})


class _Words(nn.Module):
    """Stands for a text encoder whose embeddings are cached: a random one per token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        table = torch.randn(4096, channels, generator=torch.Generator().manual_seed(0))
        self.register_buffer("table", table)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens[:, 0] % 4096]


def _tokens(texts: Sequence[str]) -> torch.Tensor:
    # The number in the name, not hash(): that differs from process to process.
    return torch.tensor([[int(text.rsplit(" ", 1)[-1])] for text in texts])


def _image(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


Builder = Callable[[str, tuple[int, int], int | None, int, Path | None], Whole]
#: Name -> builder.
WHOLE_SYSTEMS: dict[str, Builder] = {
    **dict.fromkeys(trees.SYSTEMS, _published),
    "mask2former-hf": _hugging_face,
    "ovs-mask": _own,
    "ovs-pixel": _own,
}
