"""mIoU and panoptic quality against plain loops over their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from opentrans.ovs import PanopticQuality, SemanticQuality
from opentrans.ovs.metrics import naming_chance
from opentrans_kernels.errors import OpenTransError

CLASSES = ("a", "b", "c", "d")


def test_iou_is_intersection_over_union_per_class() -> None:
    random = np.random.default_rng(0)
    quality = SemanticQuality(CLASSES)
    images = []
    for _ in range(3):
        predicted, truth = random.integers(0, 4, (2, 9, 7))
        truth = np.where(truth == 3, 255, truth)  # "d" never occurs
        quality.add(predicted, truth)
        images.append((predicted, truth))
    for i, name in enumerate(CLASSES[:3]):
        both = sum(((p == i) & (t == i)).sum() for p, t in images)
        either = sum((((p == i) | (t == i)) & (t != 255)).sum() for p, t in images)
        assert quality.iou()[name] == pytest.approx(100 * both / either)
    assert "d" not in quality.iou()
    assert quality.mean() == pytest.approx(np.mean(list(quality.iou().values())))
    assert quality.mean(["a"]) == pytest.approx(np.mean([quality.iou()[n] for n in "bc"]))
    assert np.isnan(SemanticQuality(CLASSES).mean())
    with pytest.raises(OpenTransError, match="size of the label"):
        quality.add(np.zeros((2, 2), int), np.zeros((2, 3), int))


@pytest.mark.parametrize("count", [2, 4, 12])
def test_naming_chance_is_what_random_names_get(count: int) -> None:
    random = np.random.default_rng(0)
    truth = np.repeat(np.arange(count), 20_000)
    quality = SemanticQuality([str(i) for i in range(count)])
    quality.add(random.integers(0, count, truth.shape)[None], truth[None])
    assert quality.mean() == pytest.approx(naming_chance(count), rel=0.03)


def panoptic_by_definition(images: list, kind: int) -> tuple[float, float, float]:
    """PQ, SQ, RQ of one class, by loops over pairs of segments."""
    iou, hit, false, missed = 0.0, 0, 0, 0
    for predicted, found, truth, segments in images:
        known = truth > 0
        taken, met = set(), set()
        for a in found:
            for b in segments:
                if not a["category_id"] == b["category_id"] == kind:
                    continue
                x, y = (predicted == a["id"]) & known, truth == b["id"]
                value = (x & y).sum() / (x | y).sum()
                if value > 0.5:
                    iou, hit = iou + value, hit + 1
                    taken.add(a["id"])
                    met.add(b["id"])
        missed += sum(b["category_id"] == kind and b["id"] not in met for b in segments)
        for a in found:
            own = predicted == a["id"]
            if a["category_id"] == kind and a["id"] not in taken:
                false += bool((own & known).sum() * 2 >= own.sum()) and bool((own & known).any())
    weight = hit + false / 2 + missed / 2
    if not weight:
        return float("nan"), float("nan"), float("nan")
    return iou / weight, iou / hit if hit else 0.0, hit / weight


def test_panoptic_quality_matches_the_definition() -> None:
    random = np.random.default_rng(1)
    quality = PanopticQuality(CLASSES, things=("b", "c"))
    images = []
    for _ in range(6):
        truth = np.kron(random.integers(0, 5, (4, 4)), np.ones((5, 5), int))
        noise = random.random(truth.shape) < 0.15
        predicted = np.where(noise, random.integers(0, 5, truth.shape), truth)
        segments = [{"id": int(i), "category_id": int(i) % 4} for i in np.unique(truth) if i]
        found = [{"id": int(i), "category_id": int(i) % 4} for i in np.unique(predicted) if i]
        if found:
            found[0]["category_id"] = 2  # wrong, mostly
        quality.add(predicted, found, truth, segments)
        images.append((predicted, found, truth, segments))
    per_class = np.array([panoptic_by_definition(images, kind) for kind in range(4)])
    assert np.isfinite(per_class).sum() >= 9, "too few classes occur for the comparison"
    result = quality.result()
    for column, name in enumerate(("PQ", "SQ", "RQ")):
        assert result[name] == pytest.approx(100 * np.nanmean(per_class[:, column])), name
    assert result["PQ_th"] == pytest.approx(100 * np.nanmean(per_class[[1, 2], 0]))
    assert result["PQ_st"] == pytest.approx(100 * np.nanmean(per_class[[0, 3], 0]))


def test_perfect_and_empty_predictions() -> None:
    truth = np.array([[1, 1, 2], [1, 2, 2]])
    segments = [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 1}]
    perfect, empty = PanopticQuality(CLASSES, ("b",)), PanopticQuality(CLASSES, ("b",))
    perfect.add(truth, segments, truth, segments)
    assert perfect.result() == {"PQ": 100, "SQ": 100, "RQ": 100, "PQ_th": 100, "PQ_st": 100}
    empty.add(np.zeros_like(truth), [], truth, segments)
    assert empty.result()["PQ"] == empty.result()["RQ"] == 0
    with pytest.raises(OpenTransError, match="Use one size"):
        empty.add(truth[:1], [], truth, segments)
