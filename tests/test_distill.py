"""Distillation losses against double loops in float64; regions, teacher, distiller."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from accel_nets import random_masks, tower
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opentrans.distill import (
    DenseFeatures,
    Distiller,
    Regions,
    Teacher,
    TextGuidedLoss,
    VisualGuidedLoss,
    pool_regions,
)
from opentrans.distill.regions import choose_sorted, count_chosen
from opentrans_kernels import OpenTransError

COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(lambda c: sum(c) > 0)


def embeddings(counts: list[int], width: int = 6, seed: int = 0) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shape = (sum(counts), width)
    return [torch.randn(shape, generator=gen, dtype=torch.float64) for _ in range(3)]


def unit(rows: torch.Tensor) -> list[list[float]]:
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows.tolist()]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def distance(a: list[float], b: list[float]) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def pairs_of(counts: list[int]) -> list[tuple[int, int]]:
    found, start = [], 0
    for count in counts:
        numbers = range(start, start + count)
        found += [(i, j) for i in numbers for j in numbers]
        start += count
    return found


@given(COUNTS, st.sampled_from([0.0, 3.0]), st.floats(0.5, 2.0))
def test_text_guided_as_coded(counts: list[int], weight: float, scale: float) -> None:
    v, c, t = embeddings(counts)
    loss = TextGuidedLoss("opentrans", text_kd_weight=weight).double()
    with torch.no_grad():
        loss.scale.fill_(scale)
    V, C, T = unit(v), unit(c), unit(t)
    terms = [(scale * dot(T[i], T[j]) - dot(V[i], C[j])) ** 2 for i, j in pairs_of(counts)]
    points = [distance(V[i], C[i]) ** 2 for i in range(sum(counts))]
    if weight > 0:
        expected = 10 * sum(points) / len(points) + weight * sum(terms) / len(terms)
    else:
        expected = 10 * sum(terms + points) / len(terms + points)
    assert loss(v, c, t, counts).item() == pytest.approx(expected, rel=1e-12)


@given(COUNTS)
def test_text_guided_by_the_paper(counts: list[int]) -> None:
    v, c, t = embeddings(counts)
    V, C, T = unit(v), unit(c), unit(t)
    gaps = [abs(distance(V[i], C[j]) - distance(T[i], T[j])) for i, j in pairs_of(counts)]
    expected = sum(gaps) / sum(counts)
    assert float(TextGuidedLoss("paper")(v, c, t, counts)) == pytest.approx(expected, rel=1e-12)


@given(COUNTS)
def test_visual_guided(counts: list[int]) -> None:
    v, c, _ = embeddings(counts)
    V, C = unit(v), unit(c)
    gaps = [abs(distance(V[i], C[j]) - distance(V[i], V[j])) for i, j in pairs_of(counts)]
    expected = 2.5 * sum(gaps) / sum(counts)
    loss = VisualGuidedLoss(weight=2.5)
    assert float(loss(v, c, counts)) == pytest.approx(expected, rel=1e-12)


LOSSES = {
    "opentrans": TextGuidedLoss("opentrans"),
    "two-weights": TextGuidedLoss("opentrans", text_kd_weight=2.0),
    "paper": TextGuidedLoss("paper"),
    "visual": VisualGuidedLoss(),
}


def call(loss: nn.Module, v: Any, c: Any, t: Any, counts: list[int]) -> torch.Tensor:
    return loss(v, c, counts) if isinstance(loss, VisualGuidedLoss) else loss(v, c, t, counts)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    counts = [3, 0, 2]
    v, c, t = embeddings(counts)
    loss = copy.deepcopy(LOSSES[name]).double()
    v.requires_grad_(), c.requires_grad_(), t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call(loss, x, c, t, counts), (v,))
    call(loss, v, c, t, counts).backward()
    assert v.grad.any() and c.grad is None and t.grad is None
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    # A student that repeats itself has distances of zero, where a square root has no slope.
    same = torch.ones(3, 6, dtype=torch.float64, requires_grad=True)
    call(loss, same, c[:3], t[:3], [3]).backward()
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_and_autocast_compute_in_float32(name: str) -> None:
    counts = [2, 3]
    v, c, t = (x.half() for x in embeddings(counts))
    exact = call(LOSSES[name].double(), v.double(), c.double(), t.double(), counts)
    loss = LOSSES[name].float()
    with torch.autocast("cpu", torch.bfloat16):
        found = call(loss, v, c, t, counts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_no_region_reaches_every_student_parameter_with_zero(name: str) -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1))
    regions = Regions(torch.zeros(0, 8, 8, dtype=torch.bool), (0, 0))
    pooled = pool_regions(student(torch.randn(2, 3, 8, 8)), regions)
    loss = copy.deepcopy(LOSSES[name]).float()
    empty = torch.zeros(0, 6)
    value = call(loss, pooled, empty, empty, [0, 0])
    value.backward()
    assert value.item() == 0
    for parameter in [*student.parameters(), *loss.parameters()]:
        assert parameter.grad is not None and not parameter.grad.any()


def test_wrong_embeddings_and_forms() -> None:
    v, c, t = embeddings([3])
    with pytest.raises(OpenTransError, match="Choose one of opentrans, paper"):
        TextGuidedLoss("eq3")  # type: ignore[arg-type]
    with pytest.raises(OpenTransError, match="use form='opentrans'"):
        TextGuidedLoss("paper", text_kd_weight=1.0)
    with pytest.raises(OpenTransError, match=r"Distiller\(projection=\.\.\.\)"):
        VisualGuidedLoss()(v, c[:, :4], [3])
    with pytest.raises(OpenTransError, match="add up to 4 regions.*in image order"):
        VisualGuidedLoss()(v, c, [2, 2])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 12))
def test_a_subset_keeps_every_region_with_its_image(counts: list[int], limit: int) -> None:
    total = sum(counts)
    kept = choose_sorted(total, limit, torch.Generator().manual_seed(3))
    if total <= limit:
        assert kept is None
        return
    assert kept is not None and len(kept) == limit and bool((kept.diff() > 0).all())
    owner = [image for image, count in enumerate(counts) for _ in range(count)]
    chosen = [owner[n] for n in kept.tolist()]
    assert count_chosen(counts, kept) == tuple(chosen.count(i) for i in range(len(counts)))
    masks = torch.ones(total, 1, 1) * torch.arange(1.0, total + 1).view(-1, 1, 1)
    regions = Regions(masks, tuple(counts))[kept]
    assert regions.image_of().tolist() == chosen
    assert (regions.masks.flatten() - 1).long().tolist() == kept.tolist()


def test_regions_from_masks_boxes_labels_and_grids() -> None:
    grid = Regions.grid(2, (12, 18))
    assert len(grid) == 28 and grid.counts == (14, 14)
    per_level = grid.masks[:14].flatten(1).sum(1)
    assert per_level.tolist() == [216] + 4 * [54] + 9 * [24]
    assert bool((grid.masks[1:5].sum(0) == 1).all()) and bool((grid.masks[5:14].sum(0) == 1).all())
    labels = torch.tensor([[[0, 0], [255, 3]], [[3, 3], [3, 3]]])
    regions, classes = Regions.from_labels(labels)
    assert regions.counts == (2, 1) and classes.tolist() == [0, 3, 3]
    assert regions.masks.flatten(1).sum(1).tolist() == [2, 1, 4]
    boxes = Regions.from_boxes([torch.tensor([[0, 0, 2, 1]]), torch.zeros(0, 4)], (3, 4))
    assert boxes.counts == (1, 0) and boxes.masks[0].sum() == 2
    with pytest.raises(OpenTransError, match="1 of 2 masks cover no pixel.*Drop them"):
        Regions(torch.tensor([[[True]], [[False]]]), (2,))
    with pytest.raises(OpenTransError, match="how many of the N belong"):
        Regions(torch.ones(2, 1, 1), (1,))
    with pytest.raises(OpenTransError, match="Regions.from_labels"):
        Regions(torch.ones(2, 1, 1, dtype=torch.long), (2,))
    with pytest.raises(OpenTransError, match="numbers must rise.*Sort"):
        grid[torch.tensor([3, 1])]
    with pytest.raises(OpenTransError, match="whole numbers from 1 to 2"):
        Regions.grid(1, (2, 2), levels=(3,))


def test_pooling_is_the_mean_over_the_mask() -> None:
    features = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    masks = torch.rand(3, 4, 6) < 0.4
    masks[:, 0, 0] = True
    found = pool_regions(features, Regions(masks, (1, 2)))
    for row, (mask, image) in enumerate(zip(masks, (0, 1, 1), strict=True)):
        torch.testing.assert_close(found[row], features[image][:, mask].mean(dim=1))
    fine = masks.repeat_interleave(3, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(pool_regions(features, Regions(fine, (1, 2))), found)
    speck = torch.zeros(1, 12, 18, dtype=torch.bool)
    speck[0, 4, 4] = True  # smaller than a cell: the cell it lies in
    assert torch.equal(pool_regions(features[:1], Regions(speck, (1,)))[0], features[0, :, 1, 1])
    with pytest.raises(OpenTransError, match="of the same batch"):
        pool_regions(features, Regions(masks, (3,)))


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    return tower()


def student_of(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).requires_grad_(True)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return twin


IMAGES = (2, 3, 64, 64)


@pytest.mark.parametrize("region", ["pooled", "masked"])
@pytest.mark.parametrize("loss", ["opentrans", "paper", "visual"])
def test_images_teach_the_trunk(clip: nn.Module, loss: Any, region: Any) -> None:
    teacher = Teacher.copy_of(clip, region=region)
    before = {k: v.clone() for k, v in teacher.tower.state_dict().items()}
    student = student_of(clip).train()
    text = torch.randn(9, clip.attnpool.c_proj.out_features)
    distiller = Distiller(teacher, loss=loss, text=text, max_regions=11)
    own = [name for name, _ in distiller.named_parameters()]
    assert own == (["criterion.scale"] if loss == "opentrans" else [])
    images = torch.randn(IMAGES)
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], lr=1e-3)
    history = []
    for _ in range(6):
        optimizer.zero_grad()
        torch.manual_seed(1)  # the same subset of regions
        value = distiller.loss(student, images)
        value.backward()
        history.append(value.item())
        trunk = [p for n, p in student.named_parameters() if not n.startswith("attnpool")]
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trunk)
        optimizer.step()
    assert history[-1] < history[0]
    assert all(torch.equal(v, before[k]) for k, v in teacher.tower.state_dict().items())
    assert not teacher.tower.training and not any(
        p.requires_grad for p in teacher.tower.parameters()
    )


def test_the_teachers_own_loss_is_smallest_for_itself(clip: nn.Module) -> None:
    teacher = Teacher.copy_of(clip)
    images, text = torch.randn(IMAGES), torch.randn(4, clip.attnpool.c_proj.out_features)
    distiller = Distiller(teacher, text=text, text_kd_weight=1e-9)
    with torch.no_grad():
        own = distiller.loss(copy.deepcopy(clip), images)
        other = distiller.loss(student_of(clip).eval(), images)
    assert own < 1e-5 < other


def test_embeddings_pooled_and_masked(clip: nn.Module) -> None:
    images = torch.randn(IMAGES)
    whole = Regions.from_masks([torch.ones(1, 64, 64), torch.ones(1, 64, 64)])
    masked = Teacher.copy_of(clip, region="masked")
    with torch.no_grad():
        torch.testing.assert_close(masked.embeddings(images, whole), clip(images))
    half = torch.zeros(1, 64, 64)
    half[:, :, :32] = 1
    regions = Regions.from_masks([half, torch.ones(1, 64, 64)])
    found = Teacher.copy_of(clip, region="masked", chunk=1).embeddings(images, regions)
    with torch.no_grad():
        torch.testing.assert_close(found[:1], clip(images[:1] * half))
        pool = clip.attnpool
        dense = DenseFeatures(clip)(images)
        wanted = pool.c_proj(pool.v_proj(dense.mean(dim=(2, 3))))
    torch.testing.assert_close(Teacher.copy_of(clip).embeddings(images, whole), wanted)
    big = torch.randn(2, 3, 96, 96)  # the attention pool takes 64 x 64 only
    assert masked.embeddings(big, regions).shape == found.shape


def test_features_from_elsewhere(clip: nn.Module) -> None:
    """Maps of other widths and sizes, rows per region, labels and text per region."""
    width = clip.attnpool.c_proj.out_features
    teacher, text = Teacher.copy_of(clip), torch.randn(5, width)
    projection = nn.Linear(10, width)
    distiller = Distiller(teacher, text=text, projection=projection)
    regions = Regions.from_masks([torch.rand(n, 32, 32) < 0.5 for n in (3, 2)])
    with torch.no_grad():
        target = teacher.features(torch.randn(IMAGES))
    student = torch.randn(2, 10, 7, 9)
    labels = torch.tensor([0, 4, 4, 1, 2])
    value = distiller(student, target, regions=regions, labels=labels)
    per_region = teacher.embed(pool_regions(target, regions))
    rows = pool_regions(student, regions)
    same = distiller(rows, per_region, regions=(3, 2), text=text[labels])
    torch.testing.assert_close(value, same)
    expected = TextGuidedLoss()(projection(rows), per_region, text[labels], (3, 2))
    torch.testing.assert_close(value, expected)
    guessed = torch.nn.functional.normalize(per_region) @ torch.nn.functional.normalize(text).T
    nearest = distiller(student, target, regions=regions)
    torch.testing.assert_close(
        nearest, TextGuidedLoss()(projection(rows), per_region, text[guessed.argmax(1)], (3, 2))
    )
    with pytest.raises(OpenTransError, match="Drop regions without a class"):
        distiller(student, target, regions=regions, labels=labels + 3)
    with pytest.raises(OpenTransError, match="labels have 4 rows for 5 regions"):
        distiller(student, target, regions=regions, labels=labels[:4])
    with pytest.raises(OpenTransError, match="need regions"):
        distiller(rows, target)
    with pytest.raises(OpenTransError, match=r"projection=nn.Linear\(10, "):
        Distiller(teacher, text=text)(student, target, regions=regions)


def test_the_cap_draws_text_and_labels_along(clip: nn.Module) -> None:
    width = clip.attnpool.c_proj.out_features
    v, c, t = (torch.randn(30, width) for _ in range(3))
    counts = (4, 0, 26)
    gen = torch.Generator().manual_seed(5)
    distiller = Distiller(Teacher.copy_of(clip), max_regions=8, generator=gen)
    found = distiller(v, c, regions=counts, text=t)
    kept = choose_sorted(30, 8, torch.Generator().manual_seed(5))
    assert kept is not None
    expected = TextGuidedLoss()(v[kept], c[kept], t[kept], count_chosen(counts, kept))
    torch.testing.assert_close(found, expected)


def test_no_region_in_a_batch_of_images(clip: nn.Module) -> None:
    student = student_of(clip)
    distiller = Distiller(
        Teacher.copy_of(clip), text=torch.randn(3, clip.attnpool.c_proj.out_features)
    )
    none = Regions(torch.zeros(0, 64, 64, dtype=torch.bool), (0, 0))
    value = distiller.loss(student, torch.randn(IMAGES), regions=none)
    value.backward()
    assert value.item() == 0
    trunk = [p for n, p in student.named_parameters() if not n.startswith("attnpool")]
    assert all(p.grad is not None and not p.grad.any() for p in [*trunk, *distiller.parameters()])


def test_an_accelerated_teacher_gives_the_same_loss(clip: nn.Module) -> None:
    masks = random_masks(clip)
    pruned = copy.deepcopy(clip)
    masks.apply_(pruned)
    images, student = torch.randn(IMAGES), student_of(clip).eval()
    slow = Teacher.copy_of(pruned)
    fast = Teacher.copy_of(pruned, accelerate=True, masks=masks, input_size=(64, 64))
    assert fast.report is not None and slow.report is None
    values = [Distiller(t, loss="visual").loss(student, images) for t in (slow, fast)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(OpenTransError, match="accelerate=True"):
        Teacher(pruned, masks=masks)


def test_what_a_distiller_refuses(clip: nn.Module) -> None:
    images = torch.randn(IMAGES)
    model = copy.deepcopy(clip)
    with pytest.raises(OpenTransError, match=r"Teacher.copy_of\(model\)"):
        Distiller(Teacher(model), loss="visual").loss(model, images)
    with pytest.raises(OpenTransError, match="use loss='visual'"):
        Distiller(Teacher.copy_of(clip)).loss(model, images)
    with pytest.raises(OpenTransError, match="Both must come from the same CLIP"):
        Distiller(Teacher.copy_of(clip), text=torch.randn(4, 3)).loss(student_of(clip), images)
    with pytest.raises(OpenTransError, match="is no vocabulary"):
        Distiller(Teacher.copy_of(clip), text=torch.randn(4))
    with pytest.raises(OpenTransError, match="Choose one of opentrans, paper, visual"):
        Distiller(Teacher.copy_of(clip), loss="kd")  # type: ignore[arg-type]
    with pytest.raises(OpenTransError, match="1 or more"):
        Distiller(Teacher.copy_of(clip), max_regions=0)
    with pytest.raises(OpenTransError, match="Choose one of pooled, masked"):
        Teacher.copy_of(clip, region="crop")
    flat = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(OpenTransError, match="returns its last feature map"):
        Distiller(Teacher.copy_of(clip), loss="visual").loss(flat, images)
    maps = nn.Conv2d(3, 4, 1)
    with pytest.raises(OpenTransError, match="region='pooled'"):
        Teacher(maps, region="masked").embeddings(images, Regions.grid(2, (64, 64)))
