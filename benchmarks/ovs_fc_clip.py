"""Part "fc-clip": the real FC-CLIP with RN50 on a CPU, its backbone path and the whole model.

Needs checkouts of fc-clip and detectron2. The tower has synthetic weights, the head random ones.
The backbone path goes from the image to the maps that FC-CLIP's head reads, its ``.contiguous()``
calls included. Dense variants run FC-CLIP's own backbone; the rest is FC-CLIP's eager code, the
same on both sides.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ovs_result import (
    COMPILED,
    LARGEST_ERROR,
    OURS,
    compiled,
    error_row,
    is_exact,
    layers_of,
    relative_errors,
    summary,
)
from torch import nn

from opentrans.cli.render import Output
from opentrans.d2 import attach, trees
from opentrans_kernels.bench.timing import interleave
from opentrans_kernels.bench.variants import fold_batch_norms_
from opentrans_kernels.synthetic import synthetic_rn50

PROMPTS = 150  # class names of ADE20K
LAST, FOLDED = "channels_last", "folded, channels_last"
WITHOUT_OP = (
    "FC-CLIP's PyTorch path, because its compiled op runs on CUDA only; that makes the head slower "
    "than on a GPU and the backbone's share smaller"
)


def find_tree(given: Path | None) -> Path | None:
    """The fc-clip checkout: ``given``, or the one on ``PYTHONPATH``; None if there is neither.

    Raises OpenTransError if ``given`` is no checkout.
    """
    if given is None and importlib.util.find_spec("fcclip") is None:
        return None
    return trees.find_tree("fc-clip", given)


def measure(options: argparse.Namespace, out: Output, tree: Path) -> dict[str, Any]:
    """Times of the whole model and of the backbone path, and the backbone's share."""
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(3, options.size, options.size, generator=generator)
    given = {"image": image, "height": options.size, "width": options.size}
    with out.progress("bench ovs: fc-clip") as told:
        told("building")
        model = build(tree)
        attach(model, masks=options.mask)
        x = _backbone_input(model, given)
        backbones = {name: _copy(model.backbone) for name in ("eager", LAST, FOLDED)}
        reference = _copy(model.backbone)
        told("timing every layer")
        report = attach(model, accelerate=True, input_size=tuple(x.shape[-2:])).report
    backbones[OURS] = model.backbone
    fold_batch_norms_(backbones[FOLDED].clip_model.visual)
    for name in (LAST, FOLDED):
        _to_channels_last(backbones[name])
    reference.clip_model.visual.double()
    unavailable: dict[str, str] = {}
    if not options.compile:
        unavailable[COMPILED] = "not asked for (--compile)"
    else:
        try:
            backbones[COMPILED] = _compiled_copy(backbones[FOLDED], x)
        except Exception as error:  # a competitor that fails is a result
            unavailable[COMPILED] = f"{type(error).__name__}: {str(error).strip()[:300]}"

    def predict(backbone: nn.Module) -> torch.Tensor:
        model.backbone = backbone
        with torch.no_grad():
            return model([given])[0]["sem_seg"]

    maps = {name: backbone(x) for name, backbone in backbones.items()}
    # Dictionary of maps -> per map, the error of every variant.
    apart = {
        key: relative_errors({name: own[key] for name, own in maps.items()}, exact)
        for key, exact in reference(x.double()).items()
    }
    del reference, maps
    for name in [n for n in backbones if n != OURS]:
        if not (worst := max(row[name] for row in apart.values())) <= LARGEST_ERROR:
            unavailable[name] = f"its maps are off by {worst:.1e} of the largest value"
            del backbones[name]
    errors = {key: error_row({name: row[name] for name in backbones}) for key, row in apart.items()}
    # The whole model has no float64 twin (its code makes float32 tensors), and its attention masks
    # are thresholds, so one rounding can move a pixel: compared with eager, to a fixed limit.
    scores = relative_errors(
        {name: predict(own) for name, own in backbones.items()}, predict(backbones["eager"])
    )
    errors["sem_seg"] = error_row(scores, LARGEST_ERROR)
    calls: dict[str, Callable[[], Any]] = {}
    for name, backbone in backbones.items():
        calls[f"whole: {name}"] = lambda b=backbone: predict(b)
        calls[f"backbone: {name}"] = lambda b=backbone: b(x)
    with out.progress("bench ovs: fc-clip") as told:
        table = interleave(
            calls, rounds=options.rounds, warmup_s=0.1, settle=0,
            on_round=lambda done, total: told(f"round {done} of {total}"),
        )  # fmt: skip
    return {
        **summary(table, exact=is_exact(errors)),
        "errors": errors,
        "unavailable": unavailable,
        "accelerated_layers": layers_of(backbones[OURS]),
        "tower": str(report).splitlines()[-1],
        "deformable_attention": WITHOUT_OP,
        "size": options.size,
        "prompts": PROMPTS,
    }


def build(tree: Path) -> Any:
    """FC-CLIP with RN50 in eval mode: synthetic tower, random head and text embeddings."""
    model, _ = trees.build("fc-clip", tree, PROMPTS)
    # Magnitudes of freshly initialised layers differ by their size, so a global mask would empty
    # whole layers and flatter the sparse side.
    model.backbone.clip_model.visual.load_state_dict(synthetic_rn50().state_dict())
    return model


def _backbone_input(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """What the model gives its backbone: normalised and padded."""
    seen: list[torch.Tensor] = []
    handle = model.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(*inputs))
    try:
        with torch.no_grad():
            model([given])
    finally:
        handle.remove()
    return seen[0]


def _copy(backbone: Any) -> Any:
    """A copy with its own visual tower; the text encoder is shared."""
    parts = backbone.clip_model.named_children()
    return copy.deepcopy(backbone, {id(part): part for name, part in parts if name != "visual"})


def _to_channels_last(backbone: Any) -> None:
    """Weights and input; the maps come out contiguous, as FC-CLIP asks for."""
    backbone.clip_model.visual.to(memory_format=torch.channels_last)
    own = backbone.extract_features
    backbone.extract_features = lambda x: own(x.contiguous(memory_format=torch.channels_last))


class _Path(nn.Module):
    """The backbone path as a module of its own, so that its weights can become constants."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return type(self.backbone).extract_features(self.backbone, x)


def _compiled_copy(backbone: Any, x: torch.Tensor) -> Any:
    """A copy of a folded channels_last backbone whose path is compiled."""
    own = _copy(backbone)
    last = x.contiguous(memory_format=torch.channels_last)
    call = compiled(_Path(own), last)
    own.extract_features = lambda x: call(x.contiguous(memory_format=torch.channels_last))
    return own
