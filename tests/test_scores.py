"""Scores of lazy masks: resized to their own size they are themselves; otherwise plain tensors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from opentrans_kernels.heads import lazy_masks
from opentrans_kernels.heads.scores import Scores


def scores(size=(24, 32)) -> torch.Tensor:
    made = torch.Generator().manual_seed(0)
    masks = lazy_masks(torch.randn(2, 5, 6, 8, generator=made))
    full = F.interpolate(masks, size, mode="bilinear", align_corners=False)[0]
    return torch.einsum("qc,qhw->chw", torch.rand(5, 3, generator=made), full.sigmoid())


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(torch.Tensor).clone()


@pytest.mark.parametrize("crop", [(24, 32), (20, 31)])
def test_a_resize_to_the_same_size_is_the_same(crop: tuple[int, int]) -> None:
    found = scores()
    assert type(found) is Scores
    cut = found[:, : crop[0], : crop[1]].expand(1, -1, -1, -1)
    resized = F.interpolate(cut, size=crop, mode="bilinear", align_corners=False)[0]
    assert type(resized) is torch.Tensor and resized.is_contiguous()
    right = plain(found)[:, : crop[0], : crop[1]][None]
    right = F.interpolate(right, size=crop, mode="bilinear", align_corners=False)[0]
    assert torch.equal(resized, right)


@pytest.mark.parametrize(
    "options",
    [
        {"size": (20, 32), "mode": "bilinear"},
        {"size": (24, 32), "mode": "bilinear", "align_corners": True},
        {"size": (24, 32), "mode": "nearest"},
        {"size": (24, 32), "mode": "bicubic"},
        {"size": (24, 32), "mode": "bilinear", "antialias": True},
        {"scale_factor": 2.0, "mode": "bilinear"},
        {"size": 40, "mode": "bilinear"},
    ],
)
def test_any_other_resize_is_computed(options: dict) -> None:
    found = scores()[None]
    assert type(found) is Scores
    resized = F.interpolate(found, **options)
    assert type(resized) is torch.Tensor
    assert torch.equal(resized, F.interpolate(plain(found), **options))


def test_everything_else_is_an_ordinary_tensor() -> None:
    found = scores()
    for out in (found + 1, found.argmax(0), torch.stack([found]), found.clone(), found.float() * 1):
        assert type(out) is torch.Tensor
    assert type(copy.deepcopy(found)) is torch.Tensor
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert type(again) is torch.Tensor and torch.equal(again, plain(found))
