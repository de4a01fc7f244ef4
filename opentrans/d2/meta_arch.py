"""Our open-vocabulary models in detectron2's ``META_ARCH_REGISTRY``.

``OpenTransDeepLab``: an embedding per pixel, from detectron2's own DeepLab heads.
``OpenTransMaskClassifier``: queries with a mask and an embedding, ``opentrans.ovs.MaskHead``.
``OpenTransDistillation``: no head; the tower learns from a frozen CLIP (distillation-only pruning).

Class names come with the data (``vocabulary`` in each record), so one model is evaluated on
datasets of any classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.heads import lazy_masks

from ..distill import Distiller, Regions, Teacher, TextCache
from ..ovs.clip import Clip, load_clip
from ..ovs.folder import IGNORE
from ..ovs.inference import panoptic_segments, semantic_scores
from ..ovs.mask_head import MaskHead, MaskHeadOptions, mask_targets
from ..ovs.segmenter import pixel_loss
from ..ovs.text import TextClassifier
from .config import OpenTransConfig
from .config_nodes import ConfigError
from .data import vocabulary_of
from .meta_arch_config import PIXEL_HEADS, OvsConfig
from .presence import require_detectron2

require_detectron2()

from detectron2.modeling import META_ARCH_REGISTRY, build_backbone  # noqa: E402
from detectron2.modeling.postprocessing import sem_seg_postprocess  # noqa: E402
from detectron2.projects.deeplab import DeepLabV3Head, DeepLabV3PlusHead  # noqa: E402
from detectron2.structures import ImageList  # noqa: E402

__all__ = ["OpenTransDeepLab", "OpenTransDistillation", "OpenTransMaskClassifier"]

STRIDE = 32  # of the deepest feature; images are padded to multiples


class OpenVocabularyModel(nn.Module):
    """Input and output of detectron2 around a backbone; heads are the business of subclasses."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.options = OvsConfig.from_cfg(cfg)
        opentrans = OpenTransConfig.from_cfg(cfg)
        self.backbone = build_backbone(cfg)
        self.tower_trains = self.options.BACKBONE_MULTIPLIER > 0
        self.backbone.requires_grad_(self.tower_trains)
        clip = load_clip(*self.options.clip(opentrans))
        cache = opentrans.TEXT_CACHE
        self.classifier = TextClassifier(
            TextCache(
                clip.model.to(cfg.MODEL.DEVICE),
                clip.tokenizer,
                max_rows=cache.MAX_ROWS,
                chunk=cache.CHUNK,
            ),
            templates=self.options.TEMPLATES,
            scale=self.options.SCALE,
            cached=cache.ENABLED,
        )
        names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
        self._default = vocabulary_of(names[0]) if names else None
        for name, value in (
            ("pixel_mean", cfg.MODEL.PIXEL_MEAN),
            ("pixel_std", cfg.MODEL.PIXEL_STD),
        ):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)
        self._add_head(cfg, clip)

    def _add_head(self, cfg: Any, clip: Clip) -> None:
        """Build what comes behind the backbone."""

    def train(self, mode: bool = True) -> Any:
        """As everywhere; the batch norms of a frozen tower keep their statistics."""
        super().train(mode)
        if not self.tower_trains:
            self.backbone.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Of the model; inputs are moved there."""
        return self.pixel_mean.device  # type: ignore[return-value, union-attr]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Training: losses by name. Else one dict per image, ``sem_seg`` [K, height, width] in the
        order of the record's ``vocabulary``, and ``panoptic_seg`` where that is on."""
        images = self._images(batched_inputs)
        if self.training:
            return self._losses(images.tensor, batched_inputs)
        results = []
        for number, record in enumerate(batched_inputs):
            # One by one: the vocabulary may differ from image to image.
            size = images.image_sizes[number]
            results.append(self._predict(images.tensor[number : number + 1], size, record))
        return results

    def _losses(self, images: torch.Tensor, records: Sequence[dict[str, Any]]) -> Any:
        raise OpenTransError(f"{type(self).__name__} cannot be trained.")

    def _predict(
        self, image: torch.Tensor, size: tuple[int, int], record: dict[str, Any]
    ) -> dict[str, Any]:
        raise OpenTransError(
            f"{type(self).__name__} has no segmentation head, so it cannot be evaluated. Leave "
            "DATASETS.TEST empty for distillation, and evaluate a model with a head "
            "(OpenTransDeepLab, OpenTransMaskClassifier)."
        )

    def _images(self, records: Sequence[dict[str, Any]]) -> ImageList:
        images = [
            (record["image"].to(self.device) - self.pixel_mean) / self.pixel_std
            for record in records
        ]
        return ImageList.from_tensors(images, STRIDE)

    def _labels(self, records: Sequence[dict[str, Any]], size: Sequence[int]) -> torch.Tensor:
        """[B, H, W], padded like the images."""
        labels = torch.full((len(records), *size), IGNORE, dtype=torch.int64, device=self.device)
        for row, record in zip(labels, records, strict=True):
            own = record["sem_seg"].to(self.device)
            row[: own.shape[0], : own.shape[1]] = own
        return labels

    def _vocabulary(self, record: dict[str, Any]) -> tuple[tuple[str, ...], frozenset[int]]:
        if "vocabulary" in record:
            return tuple(record["vocabulary"]), frozenset(record.get("things", ()))
        if self._default is None:
            raise OpenTransError(
                "the input names no classes, and the config no dataset whose classes could be "
                "used. Add 'vocabulary': ('sky', 'tree', ...) to each input, or set DATASETS.TEST."
            )
        return self._default


@META_ARCH_REGISTRY.register()
class OpenTransDeepLab(OpenVocabularyModel):
    """A pixel is the class whose text embedding is closest to its own.

    ``MODEL.SEM_SEG_HEAD.NAME``: ``DeepLabV3PlusHead`` (joins every feature of ``IN_FEATURES``) or
    ``DeepLabV3Head`` (one feature); their other keys mean what they mean in detectron2, but for
    NUM_CLASSES and the loss, which are not used.
    """

    def _add_head(self, cfg: Any, clip: Clip) -> None:
        head, name = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.SEM_SEG_HEAD.NAME
        shapes = self.backbone.output_shape()
        missing = [feature for feature in head.IN_FEATURES if feature not in shapes]
        if name not in PIXEL_HEADS or missing:
            wrong = f"IN_FEATURES has {missing[0]!r}" if missing else f"NAME is {name!r}"
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.{wrong}; the head must be one of {', '.join(PIXEL_HEADS)} on "
                f"features of the backbone ({', '.join(shapes)})."
            )
        if name == "DeepLabV3Head":
            own = cfg.clone()
            own.defrost()
            own.MODEL.SEM_SEG_HEAD.NUM_CLASSES = clip.embed_dim
            own.INPUT.CROP.ENABLED = False  # pool over the whole map: any image size
            self.sem_seg_head = DeepLabV3Head(own, shapes)
            return
        shallow = len(head.IN_FEATURES) - 1
        self.sem_seg_head = DeepLabV3PlusHead(
            {feature: shapes[feature] for feature in head.IN_FEATURES},
            project_channels=[self.options.PROJECT_CHANNELS] * shallow,
            aspp_dilations=head.ASPP_DILATIONS,
            aspp_dropout=head.ASPP_DROPOUT,
            decoder_channels=[head.CONVS_DIM] * shallow + [head.ASPP_CHANNELS],
            common_stride=head.COMMON_STRIDE,
            norm=head.NORM,
            train_size=None,
        )
        width = head.CONVS_DIM if shallow else head.ASPP_CHANNELS
        self.embedding = nn.Conv2d(width, clip.embed_dim, 1)

    def _logits(self, images: torch.Tensor, classes: tuple[str, ...]) -> torch.Tensor:
        features, head = self.backbone(images), self.sem_seg_head
        if isinstance(head, DeepLabV3Head):
            embeddings = head.predictor(head.aspp(features[head.in_features[0]]))
        else:
            embeddings = self.embedding(head(features))
        logits = self.classifier(embeddings, classes)
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)

    def _losses(self, images: torch.Tensor, records: Sequence[dict[str, Any]]) -> Any:
        labels = self._labels(records, images.shape[-2:])
        logits = self._logits(images, self._vocabulary(records[0])[0])
        return {"loss_sem_seg": pixel_loss(logits, labels, IGNORE)}

    def _predict(
        self, image: torch.Tensor, size: tuple[int, int], record: dict[str, Any]
    ) -> dict[str, Any]:
        logits = self._logits(image, self._vocabulary(record)[0])[0]
        height, width = record.get("height", size[0]), record.get("width", size[1])
        return {"sem_seg": sem_seg_postprocess(logits, size, height, width)}


@META_ARCH_REGISTRY.register()
class OpenTransMaskClassifier(OpenVocabularyModel):
    """Masks by queries, each named by the closest text embedding; semantic or panoptic."""

    def _add_head(self, cfg: Any, clip: Clip) -> None:
        channels = {name: shape.channels for name, shape in self.backbone.output_shape().items()}
        keys = vars(self.options.MASK_HEAD)
        self.mask_head = MaskHead(
            channels, clip.embed_dim, MaskHeadOptions(**{k.lower(): v for k, v in keys.items()})
        )

    def _losses(self, images: torch.Tensor, records: Sequence[dict[str, Any]]) -> Any:
        size = images.shape[-2:]
        if self.options.PANOPTIC.ENABLED and all("mask_targets" in record for record in records):
            targets = [_padded(record["mask_targets"], size, self.device) for record in records]
        else:
            targets = mask_targets(self._labels(records, size), ignore=IGNORE)
        masks, embeddings = self.mask_head(self.backbone(images))
        classes, _ = self._vocabulary(records[0])
        return self.mask_head.loss(masks, embeddings, targets, self.classifier, classes)

    def _predict(
        self, image: torch.Tensor, size: tuple[int, int], record: dict[str, Any]
    ) -> dict[str, Any]:
        classes, things = self._vocabulary(record)
        masks, embeddings = self.mask_head(self.backbone(image))
        logits = self.mask_head.class_logits(embeddings[-1], self.classifier, classes)[0]
        last = lazy_masks(masks[-1])
        full = F.interpolate(last, image.shape[-2:], mode="bilinear", align_corners=False)
        height, width = record.get("height", size[0]), record.get("width", size[1])
        full = sem_seg_postprocess(full[0], size, height, width)
        result: dict[str, Any] = {"sem_seg": semantic_scores(logits, full)}
        panoptic = self.options.PANOPTIC
        if panoptic.ENABLED:
            result["panoptic_seg"] = panoptic_segments(
                logits,
                full,
                things,
                least_score=panoptic.LEAST_SCORE,
                least_overlap=panoptic.LEAST_OVERLAP,
            )
        return result


@META_ARCH_REGISTRY.register()
class OpenTransDistillation(OpenVocabularyModel):
    """The tower alone, against the CLIP it comes from: for iterative magnitude pruning.

    The teacher is the visual tower of ``MODEL.OVS.CLIP_WEIGHTS``, dense and frozen; it is neither
    trained nor saved. With ``DISTILL.REGIONS labels`` the regions of an image are its classes, with
    ``grid`` they are boxes and labels are not used.
    """

    def _add_head(self, cfg: Any, clip: Clip) -> None:
        keys = self.options.DISTILL
        if not self.tower_trains:
            raise ConfigError(
                "MODEL.OVS.BACKBONE_MULTIPLIER=0 freezes the tower, and distillation trains "
                "nothing else. Set it to 1."
            )
        text = None
        if keys.LOSS != "visual":
            if self._default is None:
                raise ConfigError(
                    f"MODEL.OVS.DISTILL.LOSS={keys.LOSS!r} needs the classes of DATASETS.TRAIN, "
                    "which is empty. Name a dataset, or use the loss 'visual'."
                )
            text = self.classifier.weights(self._default[0])
        # Plain attributes would register the teacher's tower; a Teacher is no module.
        self.distiller = Distiller(
            Teacher(clip.model.visual, region=keys.REGION),
            loss=keys.LOSS,  # type: ignore[arg-type]
            text=text,
            kd_weight=keys.KD_WEIGHT,
            text_kd_weight=keys.TEXT_KD_WEIGHT,
            max_regions=keys.MAX_REGIONS,
        )
        self.classifier.requires_grad_(False)  # not part of the loss
        if "res5" not in self.backbone.output_shape():
            raise ConfigError(
                "distillation compares the last stage of the tower. Add res5 to "
                "MODEL.OPENTRANS.OUT_FEATURES."
            )

    def _losses(self, images: torch.Tensor, records: Sequence[dict[str, Any]]) -> Any:
        labels = None
        if self.options.DISTILL.REGIONS == "labels":
            regions, labels = Regions.from_labels(self._labels(records, images.shape[-2:]))
        else:
            size = (images.shape[-2], images.shape[-1])
            regions = Regions.grid(len(images), size, device=images.device)
        teacher = self.distiller.teacher.to(self.device)
        masked = teacher.region == "masked"
        target = teacher.embeddings(images, regions) if masked else teacher.features(images)
        student = self.backbone(images)["res5"]
        return {"loss_kd": self.distiller(student, target, regions=regions, labels=labels)}


def _padded(
    targets: tuple[torch.Tensor, torch.Tensor], size: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    masks, classes = targets
    full = masks.new_zeros(len(masks), *size)
    full[:, : masks.shape[1], : masks.shape[2]] = masks
    return full.float().to(device), classes.to(device)
