"""Quality of segmentations: mean intersection over union, and panoptic quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opentrans_kernels.errors import OpenTransError

from .folder import IGNORE

__all__ = ["PanopticQuality", "SemanticQuality", "naming_chance"]


def naming_chance(classes: int) -> float:
    """Expected IoU of every class for perfect masks with random names, in percent.

    Of K classes of equal area A, a share 1/K of each is named rightly and as much falls to each
    class in all: IoU = (A/K) / (2A - A/K) = 1 / (2K - 1).
    """
    return 100.0 / (2 * classes - 1)


class SemanticQuality:
    """Confusion of classes over images; IoU as detectron2's SemSegEvaluator defines it."""

    def __init__(self, classes: Sequence[str], ignore: int = IGNORE) -> None:
        self.classes, self.ignore = tuple(classes), ignore
        # Row: prediction; column: truth.
        self.confusion = np.zeros((len(self.classes), len(self.classes)), np.int64)

    def add(self, predicted: np.ndarray, truth: np.ndarray) -> None:
        """Class numbers [H, W] of one image, both."""
        if predicted.shape != truth.shape:
            raise OpenTransError(
                f"the prediction is {predicted.shape}, the label {truth.shape}. Bring the scores "
                "to the size of the label before taking their maximum."
            )
        known = truth != self.ignore
        n = len(self.classes)
        pairs = n * predicted[known].astype(np.int64) + truth[known].astype(np.int64)
        self.confusion += np.bincount(pairs, minlength=n * n).reshape(n, n)

    def iou(self) -> dict[str, float]:
        """Percent per class that occurs in the truth."""
        right = self.confusion.diagonal()
        truth, predicted = self.confusion.sum(0), self.confusion.sum(1)
        return {
            name: 100.0 * right[i] / (truth[i] + predicted[i] - right[i])
            for i, name in enumerate(self.classes)
            if truth[i]
        }

    def mean(self, without: Sequence[str] = ()) -> float:
        """mIoU in percent, over the classes that occur, some left out; NaN without any."""
        values = [value for name, value in self.iou().items() if name not in without]
        return float(np.mean(values)) if values else float("nan")


class PanopticQuality:
    """PQ = sum of IoU over matches / (matches + half of the misses + half of the false alarms).

    Kirillov et al., arXiv 1801.00868: segments of one class match if their IoU is above 0.5, and
    then match one another only. Pixels without a true segment (0) count for nothing, and a false
    alarm of which more than half is such pixels is none.
    """

    def __init__(self, classes: Sequence[str], things: Sequence[str] = ()) -> None:
        self.classes, self.things = tuple(classes), frozenset(things)
        # Per class: sum of IoU, matches, false alarms, misses.
        self.counts = np.zeros((len(self.classes), 4))

    def add(
        self,
        predicted: np.ndarray,
        found: Sequence[dict[str, Any]],
        truth: np.ndarray,
        segments: Sequence[dict[str, Any]],
    ) -> None:
        """Segment numbers [H, W] and the segments (``id``, ``category_id``) of one image."""
        if predicted.shape != truth.shape:
            raise OpenTransError(
                f"the prediction is {predicted.shape}, the truth {truth.shape}. Use one size."
            )
        factor = int(truth.max()) + 1
        pairs, areas = np.unique(predicted.astype(np.int64) * factor + truth, return_counts=True)
        shared = {divmod(int(p), factor): int(a) for p, a in zip(pairs, areas, strict=True)}
        area_of, area_in = _sums(shared, 0), _sums(shared, 1)
        kind_of = {s["id"]: s["category_id"] for s in found}
        kind_in = {s["id"]: s["category_id"] for s in segments}
        matched: set[int] = set()
        done: set[int] = set()
        for (a, b), both in shared.items():
            if a not in kind_of or b not in kind_in or kind_of[a] != kind_in[b]:
                continue
            union = area_of[a] + area_in[b] - both - shared.get((a, 0), 0)
            if both > 0.5 * union:
                self.counts[kind_of[a], :2] += (both / union, 1)
                matched.add(a)
                done.add(b)
        for b, kind in kind_in.items():
            self.counts[kind, 3] += b not in done and area_in.get(b, 0) > 0
        for a, kind in kind_of.items():
            unknown = shared.get((a, 0), 0)
            false = a not in matched and area_of.get(a, 0) > 2 * unknown
            self.counts[kind, 2] += false

    def result(self) -> dict[str, float]:
        """PQ, SQ, RQ in percent over classes that occur; PQ_th and PQ_st over things and stuff."""
        occurs = self.counts[:, 1:].sum(1) > 0
        iou, hit, false, missed = self.counts.T
        weight = hit + 0.5 * false + 0.5 * missed
        pq = np.divide(iou, weight, out=np.zeros_like(iou), where=weight > 0)
        sq = np.divide(iou, hit, out=np.zeros_like(iou), where=hit > 0)
        rq = np.divide(hit, weight, out=np.zeros_like(iou), where=weight > 0)
        thing = np.array([name in self.things for name in self.classes])

        def mean(values: np.ndarray, of: np.ndarray) -> float:
            return 100.0 * float(values[of].mean()) if of.any() else float("nan")

        return {
            "PQ": mean(pq, occurs),
            "SQ": mean(sq, occurs),
            "RQ": mean(rq, occurs),
            "PQ_th": mean(pq, occurs & thing),
            "PQ_st": mean(pq, occurs & ~thing),
        }


def _sums(shared: dict[tuple[int, int], int], side: int) -> dict[int, int]:
    sums: dict[int, int] = {}
    for pair, area in shared.items():
        sums[pair[side]] = sums.get(pair[side], 0) + area
    return sums
