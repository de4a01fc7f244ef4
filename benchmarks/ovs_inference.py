"""Part "inference": open-vocabulary DeepLabV3 on CLIP RN50, whole, backbone alone, head alone."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
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

from opentrans import TextCache
from opentrans.cli.render import Output
from opentrans.ovs import DeepLabHead, PixelSegmenter, TextClassifier, TrunkFeatures
from opentrans_kernels import accelerate
from opentrans_kernels.bench.timing import interleave
from opentrans_kernels.bench.variants import fold_batch_norms_
from opentrans_kernels.synthetic import synthetic_masks, synthetic_rn50

CLASSES = 150  # of ADE20K, for the size of the classifier
EMBED_DIM = 1024  # of CLIP RN50
FOLDED = "folded, channels_last"
# Tower accelerated; the head behind it in either layout, or compiled.
HEAD_LAST, HEAD_COMPILED = f"{OURS}, head channels_last", f"{OURS}, head compiled"


class Words(nn.Module):
    """Stands for a text encoder whose embeddings are cached: a random one per token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        table = torch.randn(4096, channels, generator=torch.Generator().manual_seed(0))
        self.register_buffer("table", table)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens[:, 0] % 4096]


def segmenter(
    tower: nn.Module, classifier: TextClassifier, embed_dim: int = EMBED_DIM
) -> PixelSegmenter:
    """DeepLabV3 with decoder on res2 and 256 channels."""
    backbone = TrunkFeatures(tower)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = DeepLabHead(backbone.channels, embed_dim)
    return PixelSegmenter(backbone, head, classifier)


def words_classifier() -> TextClassifier:
    def tokens(texts: Sequence[str]) -> torch.Tensor:
        # The number in the name, not hash(): that differs from process to process.
        return torch.tensor([[int(text.rsplit(" ", 1)[-1])] for text in texts])

    return TextClassifier(TextCache(Words(EMBED_DIM).eval(), tokens), templates=("{}",))


def measure(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    """Times of the whole model, backbone and head, and their shares."""
    tower = synthetic_rn50(image_size=options.size)
    synthetic_masks(tower, options.mask).apply_(tower)
    classifier = words_classifier()
    names = tuple(f"class {i}" for i in range(CLASSES))
    models = {"eager": segmenter(tower, classifier).eval()}
    models["channels_last"] = copy.deepcopy(models["eager"]).to(memory_format=torch.channels_last)
    folded = copy.deepcopy(models["eager"])
    fold_batch_norms_(folded.backbone.tower)
    models[FOLDED] = folded.to(memory_format=torch.channels_last)
    models[OURS] = copy.deepcopy(models["eager"])
    with out.progress("bench ovs: accelerating the tower") as told:
        told("timing every layer")
        report = accelerate(models[OURS].backbone.tower, input_size=(options.size,) * 2)
    head = copy.deepcopy(models[OURS].head).to(memory_format=torch.channels_last)
    models[HEAD_LAST] = PixelSegmenter(models[OURS].backbone, head, classifier).eval()
    plain = torch.randn(1, 3, options.size, options.size,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    last = plain.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Any]] = {}
    with torch.inference_mode():
        for name, model in models.items():
            x = last if "channels_last" in name and not name.startswith(OURS) else plain
            features = model.backbone(x)
            calls[f"whole: {name}"] = lambda m=model, x=x: m(x, names)
            if name != HEAD_LAST:  # the same backbone
                calls[f"backbone: {name}"] = lambda m=model, x=x: m.backbone(x)
            if name != FOLDED:  # the same head
                calls[f"head: {name}"] = lambda m=model, f=features: m.classifier(m.head(f), names)
    unavailable: dict[str, str] = {}
    if options.compile:
        calls |= _compiled_calls(models, plain, last, names)
    else:
        unavailable[COMPILED] = "not asked for (--compile)"
    errors = _errors(calls, models["eager"], plain, names)
    for name in [n for n, e in errors.items() if not n.startswith(OURS) and not e <= LARGEST_ERROR]:
        unavailable[name] = f"its output is off by {errors.pop(name):.1e} of the largest"
        for part in ("whole", "backbone", "head"):
            calls.pop(f"{part}: {name}", None)
    with torch.no_grad(), out.progress("bench ovs: inference") as told:
        table = interleave(
            calls, rounds=options.rounds, warmup_s=0.1, settle=0,
            on_round=lambda done, total: told(f"round {done} of {total}"),
        )  # fmt: skip
    rows = {"logits": error_row(errors)}
    return {
        **summary(table, exact=is_exact(rows)),
        "errors": rows,
        "unavailable": unavailable,
        "accelerated_layers": layers_of(models[OURS].backbone.tower),
        "tower": str(report).splitlines()[-1],
        "size": options.size,
        "classes": CLASSES,
    }


def _errors(
    calls: dict[str, Callable[[], Any]],
    model: PixelSegmenter,
    x: torch.Tensor,
    names: tuple[str, ...],
) -> dict[str, float]:
    """Error of every whole variant against the dense masked model in float64."""
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(x.double(), names)
        outputs = {
            name.removeprefix("whole: "): call()
            for name, call in calls.items()
            if name.startswith("whole: ")
        }
    return relative_errors(outputs, reference)


def _compiled_calls(
    models: dict[str, PixelSegmenter],
    plain: torch.Tensor,
    last: torch.Tensor,
    names: tuple[str, ...],
) -> dict[str, Callable[[], Any]]:
    """The dense model, compiled whole and in parts, and the accelerated tower's head compiled."""
    dense, ours = models[FOLDED], models[HEAD_LAST]
    whole = compiled(nn.Sequential(dense.backbone, dense.head), last)
    backbone = compiled(dense.backbone, last)
    with torch.no_grad():
        features = {name: value.clone() for name, value in dense.backbone(last).items()}
        own = ours.backbone(plain)
    head, own_head = compiled(dense.head, features), compiled(ours.head, own)

    def resized(logits: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(logits, plain.shape[-2:], mode="bilinear")

    return {
        f"whole: {COMPILED}": lambda: resized(dense.classifier(whole(last), names)),
        f"backbone: {COMPILED}": lambda: backbone(last),
        f"head: {COMPILED}": lambda: head(features),
        f"whole: {HEAD_COMPILED}": lambda: resized(
            ours.classifier(own_head(ours.backbone(plain)), names)
        ),
    }
