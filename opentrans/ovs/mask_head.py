"""Mask classification: queries, each a mask and an embedding, from transformers' Mask2Former.

Cheng et al., arXiv 2112.01527. Pixel decoder, transformer decoder, matching and loss are those of
Hugging Face transformers, whose deformable attention is plain torch: nothing is compiled, and it
runs on a CPU. Only the classifier differs: a query's embedding is compared with text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import optional_module, require_packages

from .folder import IGNORE
from .text import TextClassifier

__all__ = ["MaskHead", "MaskHeadOptions", "MaskTargets", "mask_targets"]

LEVELS = ("res2", "res3", "res4", "res5")
STRIDES = (4, 8, 16, 32)
GROUPS = 32  # of the group norms in the pixel decoder

# Per image: masks [n, H, W] (0 or 1) and class numbers [n].
MaskTargets = list[tuple[torch.Tensor, torch.Tensor]]


#: Packages the mask head needs, as ``require_packages`` takes them.
MASK_HEAD_NEEDS = {
    "scipy": "the mask head's matcher needs scipy",
    "transformers": "the mask head is made of transformers' Mask2Former",
}


@dataclass(frozen=True)
class MaskHeadOptions:
    """Sizes and loss weights, those of Mask2Former.

    dim: channels of pixel decoder, queries and masks, a multiple of 32. heads: of attention.
    encoder_layers: deformable layers of the pixel decoder. decoder_layers: of the transformer
    decoder, 2 or more. queries: masks per image. points: pixels sampled per mask in the loss.
    """

    dim: int = 256
    heads: int = 8
    feedforward: int = 2048
    encoder_feedforward: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 10
    queries: int = 100
    points: int = 12544
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.dim % GROUPS or self.dim < GROUPS or self.dim % self.heads:
            raise OpenTransError(
                f"dim={self.dim} must be a multiple of {GROUPS} (group norms) and of "
                f"heads={self.heads}, such as 256 with 8 heads."
            )
        for name in ("encoder_layers", "queries", "points"):
            if getattr(self, name) < 1:
                raise OpenTransError(f"{name}={getattr(self, name)} must be 1 or more.")
        if self.decoder_layers < 2:
            raise OpenTransError(f"decoder_layers={self.decoder_layers} must be 2 or more.")


class MaskHead(nn.Module):
    """Features res2 to res5 -> mask logits and embeddings of all queries.

    Args:
        channels: feature name -> channels, with res2, res3, res4 and res5 (strides 4 to 32).
        embed_dim: channels of the embeddings.

    Raises OpenTransError if transformers or scipy is missing, or a feature is.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        embed_dim: int,
        options: MaskHeadOptions | None = None,
    ) -> None:
        super().__init__()
        missing = [name for name in LEVELS if name not in channels]
        if missing:
            raise OpenTransError(
                f"the backbone gives {', '.join(channels)}; the mask head needs "
                f"{', '.join(LEVELS)}. Add {missing[0]} to the backbone's output."
            )
        self.options = options or MaskHeadOptions()
        library = _library()
        config = _config(self.options)
        self.pixel_decoder = library.Mask2FormerPixelDecoder(config, [channels[n] for n in LEVELS])
        self.transformer = library.Mask2FormerTransformerModule(self.options.dim, config)
        _initialise(library, config, self.pixel_decoder, self.transformer)
        self.embed = nn.Linear(self.options.dim, embed_dim)
        # A query of no object: one more direction beside the classes.
        self.no_object = nn.Parameter(F.normalize(torch.randn(embed_dim), dim=0))
        self._loss = library.Mask2FormerLoss
        self._config = config

    def forward(
        self, features: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Mask logits [B, Q, H/4, W/4] and embeddings [B, Q, embed_dim], one of each per decoder
        layer, the last one final."""
        decoded = self.pixel_decoder([features[name] for name in LEVELS])
        out = self.transformer(
            multi_scale_features=decoded.multi_scale_features,
            mask_features=decoded.mask_features,
            output_hidden_states=True,
        )
        states = [state.transpose(0, 1) for state in out.intermediate_hidden_states]
        return list(out.masks_queries_logits), [self.embed(state) for state in states]

    def class_logits(
        self, embeddings: torch.Tensor, classifier: TextClassifier, classes: Sequence[str]
    ) -> torch.Tensor:
        """[B, Q, D] -> [B, Q, K + 1]; the last column is "no object"."""
        known = classifier(embeddings, classes)
        nothing = F.normalize(embeddings.to(known.dtype), dim=-1) @ F.normalize(
            self.no_object.to(known.dtype), dim=0
        )
        return torch.cat([known, classifier.scale() * nothing.unsqueeze(-1)], dim=-1)

    def loss(
        self,
        masks: Sequence[torch.Tensor],
        embeddings: Sequence[torch.Tensor],
        targets: MaskTargets,
        classifier: TextClassifier,
        classes: Sequence[str],
    ) -> dict[str, torch.Tensor]:
        """Weighted losses of all layers: loss_cross_entropy, loss_mask, loss_dice and auxiliary
        ones ``..._0`` to ``..._L``. Images without a target are left out; if none has one, a zero
        that still reaches every parameter, as DistributedDataParallel requires."""
        logits = [self.class_logits(e, classifier, classes) for e in embeddings]
        kept = [i for i, (mask, _) in enumerate(targets) if len(mask)]
        if not kept:
            return {"loss_mask": 0 * (sum(m.sum() for m in masks) + sum(c.sum() for c in logits))}
        weights = {
            "loss_cross_entropy": self.options.class_weight,
            "loss_mask": self.options.mask_weight,
            "loss_dice": self.options.dice_weight,
        }
        self._config.num_labels = len(classes)
        criterion = self._loss(self._config, weights).to(masks[0].device)
        layers = [
            {"masks_queries_logits": m[kept].float(), "class_queries_logits": c[kept]}
            for m, c in zip(masks, logits, strict=True)
        ]
        found = criterion(
            layers[-1]["masks_queries_logits"],
            layers[-1]["class_queries_logits"],
            [targets[i][0].to(masks[0].device, torch.float32) for i in kept],
            [targets[i][1].to(masks[0].device) for i in kept],
            layers[:-1],
        )
        return {
            name: value * next(w for key, w in weights.items() if name.startswith(key))
            for name, value in found.items()
        }


def mask_targets(labels: torch.Tensor, *, ignore: int = IGNORE) -> MaskTargets:
    """Targets from labels [B, H, W], one mask per class and image."""
    targets = []
    for image in labels:
        found = image.unique()
        found = found[found != ignore].long()
        targets.append(((image.unsqueeze(0) == found.view(-1, 1, 1)).float(), found))
    return targets


def _config(options: MaskHeadOptions) -> Any:
    return optional_module("transformers", MASK_HEAD_NEEDS["transformers"]).Mask2FormerConfig(
        feature_size=options.dim,
        mask_feature_size=options.dim,
        hidden_dim=options.dim,
        num_attention_heads=options.heads,
        dim_feedforward=options.feedforward,
        encoder_feedforward_dim=options.encoder_feedforward,
        encoder_layers=options.encoder_layers,
        decoder_layers=options.decoder_layers,
        num_queries=options.queries,
        train_num_points=options.points,
        class_weight=options.class_weight,
        mask_weight=options.mask_weight,
        dice_weight=options.dice_weight,
        no_object_weight=options.no_object_weight,
        feature_strides=list(STRIDES),
        common_stride=STRIDES[0],
    )


def _initialise(library: Any, config: Any, *parts: nn.Module) -> None:
    """Weights as the library initialises its own model: parents after their children."""
    rule = library.Mask2FormerPreTrainedModel._init_weights
    model = library.Mask2FormerPreTrainedModel(config)
    for part in parts:
        part.apply(lambda module: rule(model, module))


def _library() -> Any:
    require_packages(MASK_HEAD_NEEDS)
    name = "transformers.models.mask2former.modeling_mask2former"
    return optional_module(name, MASK_HEAD_NEEDS["transformers"])
