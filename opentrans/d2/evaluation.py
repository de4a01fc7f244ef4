"""Evaluators: detectron2's mIoU with the mean over things, and panoptic quality."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ovs.metrics import PanopticQuality, naming_chance
from .data import read_panoptic, vocabulary_of
from .presence import require_detectron2

require_detectron2()

from detectron2.data import DatasetCatalog  # noqa: E402
from detectron2.evaluation import (  # noqa: E402
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.utils import comm  # noqa: E402

__all__ = ["OpenVocabularyEvaluator", "PanopticEvaluator", "build_evaluator"]


class OpenVocabularyEvaluator(SemSegEvaluator):
    """SemSegEvaluator, and two numbers that tell naming from finding.

    ``mIoU_things``: mean IoU over the thing classes. ``chance_things``: what perfect masks with
    random names would get there.
    """

    def evaluate(self) -> Any:
        """As detectron2's, on the first process."""
        result = super().evaluate()
        if result is None:
            return None
        classes, things = vocabulary_of(self._dataset_name)
        values = [result["sem_seg"][f"IoU-{classes[i]}"] for i in sorted(things)]
        known = [value for value in values if not np.isnan(value)]
        if known:
            result["sem_seg"]["mIoU_things"] = float(np.mean(known))
            result["sem_seg"]["chance_things"] = naming_chance(len(things))
        return result


class PanopticEvaluator(DatasetEvaluator):
    """PQ, SQ and RQ of ``panoptic_seg``; for datasets with ``pan_seg_file_name``."""

    def __init__(self, name: str) -> None:
        classes, things = vocabulary_of(name)
        self._new = lambda: PanopticQuality(classes, [classes[i] for i in things])
        self._truth = {record["file_name"]: record for record in DatasetCatalog.get(name)}
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._quality = self._new()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add a batch."""
        for given, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            truth = self._truth[given["file_name"]]
            self._quality.add(
                ids.cpu().numpy(),
                segments,
                read_panoptic(truth["pan_seg_file_name"]),
                truth["segments_info"],
            )

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Percent, summed over all processes, on the first one."""
        counts = comm.gather(self._quality.counts)
        if not comm.is_main_process():
            return None
        self._quality.counts = sum(counts)
        return {"panoptic_seg": self._quality.result()}


def build_evaluator(name: str, output: str, panoptic: bool) -> DatasetEvaluator:
    """mIoU, and panoptic quality where it is on and the dataset has the ground truth."""
    evaluators: list[DatasetEvaluator] = [OpenVocabularyEvaluator(name, output_dir=output)]
    if panoptic and "pan_seg_file_name" in DatasetCatalog.get(name)[0]:
        evaluators.append(PanopticEvaluator(name))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
