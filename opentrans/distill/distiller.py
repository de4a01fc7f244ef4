"""The distillation objective as one object: teacher, regions, text and loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from opentrans_kernels.errors import OpenTransError

from .losses import TextGuidedLoss, VisualGuidedLoss
from .regions import Regions, choose_sorted, count_chosen, pool_regions
from .teacher import DenseFeatures, Teacher

__all__ = ["Distiller", "Objective"]

Objective = Literal["opentrans", "paper", "visual"]
OBJECTIVES: tuple[Objective, ...] = ("opentrans", "paper", "visual")
MAX_REGIONS = 200  # per call, as in the released code


class Distiller(nn.Module):
    """Scalar distillation loss between a student and a frozen teacher, over image regions.

    ::

        teacher = Teacher.copy_of(model)
        distiller = Distiller(teacher, loss="opentrans", text=cache.vocabulary(classes))
        loss = distiller.loss(model, images)                          # a batch of plain images
        loss = distiller(student_map, teacher_map, regions=regions)   # features from elsewhere

    Its parameters (the learned scalar of "opentrans", ``projection``) are to be trained with the
    student's; the teacher's are not among them.

    Args:
        teacher: a Teacher, or a module that becomes one (frozen in place).
        loss: "opentrans" or "paper" (see TextGuidedLoss), or "visual" (VisualGuidedLoss).
        text: [K, D] embeddings of a vocabulary, as from ``TextCache.vocabulary``. A region without
            a label takes the class that its teacher embedding is closest to (ours: the published
            objective knows the labels). Not needed for "visual".
        projection: maps pooled student features (or given region embeddings) [N, C] to [N, D];
            None: the teacher's own projection, for a student of the teacher's width.
        kd_weight, text_kd_weight: see TextGuidedLoss; for "visual" ``kd_weight`` is the weight.
        max_regions: regions per call; of more, a random subset in image order is taken.
        levels: boxes for images without regions, see ``Regions.grid``.
        generator: for that subset (CPU); None: torch's global one.
    """

    def __init__(
        self,
        teacher: Teacher | nn.Module,
        *,
        loss: Objective = "opentrans",
        text: torch.Tensor | None = None,
        projection: nn.Module | None = None,
        kd_weight: float | None = None,
        text_kd_weight: float = 0.0,
        max_regions: int = MAX_REGIONS,
        levels: Sequence[int] = (1, 2, 3),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if loss not in OBJECTIVES:
            raise OpenTransError(
                f"Distiller has no loss {loss!r}. Choose one of {', '.join(OBJECTIVES)}."
            )
        if max_regions < 1:
            raise OpenTransError(f"max_regions is {max_regions}; it must be 1 or more.")
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.objective: Objective = loss
        self.criterion: TextGuidedLoss | VisualGuidedLoss
        if loss == "visual":
            self.criterion = VisualGuidedLoss(weight=1.0 if kd_weight is None else kd_weight)
        else:
            self.criterion = TextGuidedLoss(
                loss, kd_weight=kd_weight, text_kd_weight=text_kd_weight
            )
        self.projection = projection
        self.register_buffer(
            "vocabulary", None if text is None else _vocabulary(text), persistent=False
        )
        self.max_regions = max_regions
        self.levels = tuple(levels)
        self.generator = generator
        self._last: tuple[nn.Module, nn.Module] | None = None  # a student and its dense form

    def forward(
        self,
        student_features: torch.Tensor,
        teacher_features: torch.Tensor,
        *,
        regions: Regions | Sequence[int] | None = None,
        text: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss, a scalar tensor of at least float32.

        Args:
            student_features: a map [B, C, h, w], pooled under the regions, or [N, C] with one row
                per region (query features of a head, say).
            teacher_features: a map [B, C', h', w'] of the teacher, or region embeddings [N, D].
            regions: Regions; or, where both features are per region, the number of regions of each
                image. None with maps: the boxes of ``levels``.
            text: [N, D] text embedding of each region's class; None: from ``labels``.
            labels: [N] row of the vocabulary for each region; None: the closest one.

        With no region in the whole batch the loss is zero and still reaches every parameter behind
        ``student_features``, as DistributedDataParallel requires. Raises OpenTransError if sizes
        disagree or text is missing.
        """
        regions = self._regions(regions, student_features, teacher_features)
        counts = regions.counts if isinstance(regions, Regions) else tuple(regions)
        self._check_lengths(sum(counts), student_features, teacher_features, text, labels)
        kept = choose_sorted(sum(counts), self.max_regions, self.generator)
        if kept is not None:
            if isinstance(regions, Regions):
                regions = regions[kept]
            student_features, teacher_features, text, labels = (
                t if t is None or t.dim() == 4 else t[kept.to(t.device)]
                for t in (student_features, teacher_features, text, labels)
            )
            counts = count_chosen(counts, kept)
        with torch.no_grad():
            target = self._pooled(teacher_features, regions)
            if teacher_features.dim() == 4:
                target = self.teacher.embed(target)
        student = self._pooled(student_features, regions)
        if self.projection is not None:
            student = self.projection(student)
        elif student_features.dim() == 4:
            student = self.teacher.embed(student)
        if isinstance(self.criterion, VisualGuidedLoss):
            return self.criterion(student, target, counts)
        return self.criterion(student, target, self._text(target, text, labels), counts)

    def loss(
        self,
        student: nn.Module,
        images: torch.Tensor,
        *,
        regions: Regions | None = None,
        text: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of ``student`` on images [B, 3, H, W], normalised as the teacher expects.

        student: a ResNet tower or anything DenseFeatures accepts; under
        DistributedDataParallel wrap ``DenseFeatures(model)`` and pass the wrapper.
        """
        if regions is None:
            size = (images.shape[-2], images.shape[-1])
            regions = Regions.grid(len(images), size, levels=self.levels, device=images.device)
        if self.teacher.region == "masked":
            # The towers run per region, so the subset is drawn before and not after.
            kept = choose_sorted(len(regions), self.max_regions, self.generator)
            if kept is not None:
                regions = regions[kept]
                text, labels = (t if t is None else t[kept.to(t.device)] for t in (text, labels))
            target = self.teacher.embeddings(images, regions)
        else:
            target = self.teacher.features(images)
        features = self._student(student)(images)
        return self(features, target, regions=regions, text=text, labels=labels)

    def _student(self, student: nn.Module) -> nn.Module:
        """The callable that returns the student's map; found once per student."""
        if self._last is not None and self._last[0] is student:
            return self._last[1]
        own = {id(p) for p in self.teacher.tower.parameters()}
        if any(id(p) in own for p in student.parameters()):
            raise OpenTransError(
                "the student and the teacher share parameters, so the teacher is not frozen or the "
                "student cannot learn. Make the teacher from a copy: Teacher.copy_of(model)."
            )
        inner = student
        if isinstance(student, DistributedDataParallel):
            inner = student.module
            if not isinstance(inner, DenseFeatures):
                raise OpenTransError(
                    "the student is wrapped in DistributedDataParallel around "
                    f"{type(inner).__name__}, whose trunk would run beside the wrapper. Wrap "
                    "DistributedDataParallel(DenseFeatures(model)) and pass that."
                )
        dense = student if isinstance(inner, DenseFeatures) else DenseFeatures(student)
        self._last = (student, dense)
        return dense

    def _regions(
        self, regions: Regions | Sequence[int] | None, *features: torch.Tensor
    ) -> Regions | Sequence[int]:
        if isinstance(regions, Regions):
            return regions
        maps = [f for f in features if f.dim() == 4]
        if regions is None and len(maps) == len(features):
            size = (max(f.shape[-2] for f in maps), max(f.shape[-1] for f in maps))
            size = (max(size[0], *self.levels), max(size[1], *self.levels))
            return Regions.grid(len(maps[0]), size, levels=self.levels, device=maps[0].device)
        if regions is None or maps:
            raise OpenTransError(
                f"features of shapes {[tuple(f.shape) for f in features]} need regions: pass "
                "Regions to pool a map, or the number of regions per image where both are "
                "[regions, channels]."
            )
        return regions

    def _pooled(self, features: torch.Tensor, regions: Regions | Sequence[int]) -> torch.Tensor:
        if features.dim() == 4 and isinstance(regions, Regions):
            return pool_regions(features, regions)
        return features

    def _text(
        self, target: torch.Tensor, text: torch.Tensor | None, labels: torch.Tensor | None
    ) -> torch.Tensor:
        if text is not None:
            return text
        if self.vocabulary is None:
            raise OpenTransError(
                f"loss {self.objective!r} compares with text, and there is none. Pass "
                "text=cache.vocabulary(classes) to Distiller (see TextCache), text embeddings per "
                "region to the call, or use loss='visual'."
            )
        words = self.vocabulary.to(target.device)
        if words.shape[1] != target.shape[1]:
            raise OpenTransError(
                f"the vocabulary has {words.shape[1]} channels, the teacher's region embeddings "
                f"{target.shape[1]}. Both must come from the same CLIP: pass its visual tower with "
                "the attention pool, and text from its own text encoder."
            )
        if labels is None:
            with torch.autocast(target.device.type, enabled=False):
                labels = (F.normalize(target, dim=1).to(words.dtype) @ words.T).argmax(dim=1)
        elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(words):
            raise OpenTransError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, the vocabulary has "
                f"rows 0 to {len(words) - 1}. Drop regions without a class (255, say) first."
            )
        return words[labels.to(words.device)]

    @staticmethod
    def _check_lengths(total: int, *tensors: torch.Tensor | None) -> None:
        names = ("student features", "teacher features", "text", "labels")
        for name, tensor in zip(names, tensors, strict=True):
            if tensor is not None and tensor.dim() != 4 and len(tensor) != total:
                raise OpenTransError(
                    f"{name} have {len(tensor)} rows for {total} regions. Pass one row per region, "
                    "those of the first image first."
                )


def _vocabulary(text: torch.Tensor) -> torch.Tensor:
    if text.dim() != 2 or not len(text):
        raise OpenTransError(
            f"text of shape {tuple(text.shape)} is no vocabulary. Pass [classes, channels], as "
            "TextCache.vocabulary(classes) returns."
        )
    return F.normalize(text.detach().float(), dim=1)
