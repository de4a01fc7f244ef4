"""CLIP's attention pool under masks: FC-CLIP's classes out of the vocabulary."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels.bench.parts import REST, Toggle, boundaries, time_parts
from opentrans_kernels.heads.masked_pool import MaskedPool

pytestmark = pytest.mark.usefixtures("extension")
WIDTH, EMBED, HEADS, SIDE = 64, 48, 4, 3


class Pool(nn.Module):
    """The children and parameters of CLIP's attention pool."""

    def __init__(self) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(SIDE**2 + 1, WIDTH) / WIDTH**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.c_proj = nn.Linear(WIDTH, EMBED)
        self.num_heads = HEADS


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.attnpool = Pool()


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.text = nn.Linear(2, 3)


class Backbone(nn.Module):
    """Attention of the mean over the pixels of each mask, by PyTorch's own function."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_model = Clip()

    @property
    def stride(self) -> int:
        return 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.clip_model.visual.conv(images).relu()

    def visual_prediction_forward(self, x: torch.Tensor, masks: Any = None) -> torch.Tensor:
        pool = self.clip_model.visual.attnpool
        width, size, count = x.shape[1], x.shape[2:], masks.shape[1]
        table = pool.positional_embedding.to(x)
        grid = table[1:].t().reshape(1, width, SIDE, SIDE)
        grid = F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
        keys = (x + grid).flatten(2).permute(2, 0, 1)
        query = (x.flatten(2).mean(2) + table[:1]).expand(count, -1, -1)
        hidden = ~(masks.flatten(2) > 0).repeat_interleave(HEADS, 0)
        found, _ = F.multi_head_attention_forward(
            query, keys, keys, width, HEADS, None,
            torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False,
            0.0, pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False,
            attn_mask=hidden, use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight,
            k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
        )  # fmt: skip
        return found.transpose(0, 1)


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone, self.head = Backbone(), nn.Conv2d(WIDTH, 7, 1)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.backbone(images)
        return self.backbone.visual_prediction_forward(x, self.head(x))


def inputs(batch: int = 2, count: int = 5, size: tuple[int, int] = (4, 6)) -> tuple[Any, Any]:
    made = torch.Generator().manual_seed(batch + count)
    x = torch.randn(batch, WIDTH, *size, generator=made)
    masks = torch.randn(batch, count, *size, generator=made)
    masks[0, 1], masks[-1, 2] = -1.0, 2.0  # no pixel at all, and all of them
    return x, masks


def pooled(model: Model, x: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.backbone.visual_prediction_forward(x, masks)


def accelerated() -> tuple[Model, Model]:
    dense = Model()
    model = copy.deepcopy(dense)
    report = otk.accelerate_heads(model)
    assert [type(part.replacement) for part in report.replaced] == [MaskedPool]
    assert "attention pool of masks" in str(report) and "error" in str(report)
    return dense, model


@pytest.fixture
def originals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every call of the original method."""
    seen: list[str] = []
    plain = Backbone.visual_prediction_forward

    def counted(*given: Any) -> torch.Tensor:
        seen.append("called")
        return plain(*given)

    monkeypatch.setattr(Backbone, "visual_prediction_forward", counted)
    return seen


@pytest.mark.parametrize(
    ("batch", "count", "size"), [(1, 5, (4, 6)), (2, 3, (3, 3)), (3, 40, (9, 5)), (1, 3, (1, 1))]
)
def test_pools_err_no_more_than_dense(
    batch: int, count: int, size: tuple[int, int], originals: list[str]
) -> None:
    dense, model = accelerated()
    x, masks = inputs(batch, count, size)
    del originals[:]
    found = pooled(model, x, masks)
    assert not originals
    rough, exact = pooled(dense, x, masks), pooled(dense.double(), x.double(), masks.double())
    assert found.shape == (batch, count, EMBED)
    top = exact.abs().max()
    assert (found - exact).abs().max() / top <= 2 * (rough - exact).abs().max() / top + 5e-7
    assert pooled(dense.float(), x, masks[:, :0]).shape == pooled(model, x, masks[:, :0]).shape


def test_a_mask_without_pixels_is_what_it_was() -> None:
    dense, model = accelerated()
    x, masks = inputs()
    assert pooled(dense, x, masks).isfinite().all()
    torch.testing.assert_close(pooled(model, x, masks), pooled(dense, x, masks))
    masks[:] = float("nan")
    torch.testing.assert_close(pooled(model, x, masks), pooled(dense, x, masks))


def test_scores_far_apart_run_the_original(originals: list[str]) -> None:
    dense, model = accelerated()
    x, masks = inputs()
    for one in (dense, model):
        one.backbone.clip_model.visual.attnpool.q_proj.weight.data.mul_(1000)
    del originals[:]
    assert torch.equal(pooled(model, x, masks), pooled(dense, x, masks))
    assert len(originals) == 2
    x[0, 0, 0, 0] = float("inf")
    right = pooled(dense, x, masks)
    torch.testing.assert_close(pooled(model, x, masks), right, equal_nan=True)
    assert len(originals) == 4


def test_the_backbone_is_still_itself() -> None:
    dense, model = accelerated()
    images = torch.randn(1, 3, 16, 24)
    seen: list[torch.Size] = []
    handle = model.backbone.register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    with torch.no_grad():
        torch.testing.assert_close(model(images), dense(images))
    handle.remove()
    assert seen == [(1, WIDTH, 4, 6)] and model.backbone.stride == 4
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in dense.named_modules()]
    with torch.no_grad():
        for one in (dense, model):
            one.backbone.clip_model.visual.attnpool.k_proj.weight.mul_(3)
        torch.testing.assert_close(model(images), dense(images))
    x, masks = inputs()
    double = pooled(model.double(), x.double(), masks.double())
    assert torch.equal(double, pooled(dense.double(), x.double(), masks.double()))
    model.float()
    assert isinstance(model.backbone, MaskedPool)
    otk.restore_heads(model)
    assert type(model.backbone) is Backbone


def test_what_else_happens_in_the_method_stays() -> None:
    class Colder(Backbone):
        def visual_prediction_forward(self, x: torch.Tensor, masks: Any = None) -> torch.Tensor:
            return super().visual_prediction_forward(0.5 * x, masks)

    model = Model()
    model.backbone = Colder().eval()
    (left,) = otk.accelerate_heads(model).left
    assert left.path == "backbone" and "computes something else" in left.reason
    model = Model()
    model.backbone.register_forward_hook(lambda *_: None)
    (left,) = otk.accelerate_heads(model).left
    assert left.reason == "has hooks"
    model = Model()
    model.backbone.clip_model.visual.attnpool.v_proj = nn.Identity()
    assert not otk.accelerate_heads(model).parts


def test_projections_most_of_which_is_zero_are_packed(caplog: pytest.LogCaptureFixture) -> None:
    dense = Model()
    pool = dense.backbone.clip_model.visual.attnpool
    with torch.no_grad():
        for layer in (pool.v_proj, pool.c_proj):
            layer.weight.mul_(torch.rand(layer.weight.shape) < 0.1)
    model = copy.deepcopy(dense)
    (part,) = (p for p in otk.accelerate_heads(model).replaced if p.path == "backbone")
    assert part.reason.endswith("packed where most weights are zero")
    assert all(model.backbone.opentrans_packed.values())
    x, masks = inputs()
    torch.testing.assert_close(pooled(model, x, masks), pooled(dense, x, masks))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for one in (dense, model):
            one.backbone.clip_model.visual.attnpool.v_proj.weight.add_(0.1)
    torch.testing.assert_close(pooled(model, x, masks), pooled(dense, x, masks))
    assert "v_proj.weight was written to" in caplog.text


def test_its_time_is_what_comes_after_the_head() -> None:
    _, model = accelerated()
    rows = boundaries(model, "backbone.clip_model.visual", ["backbone"])
    assert rows["backbone"] == "trunk"
    otk.restore_heads(model)
    report = otk.accelerate_heads(model)
    images = torch.randn(1, 3, 16, 24)
    times = time_parts(
        model, lambda: model(images), "backbone.clip_model.visual", report, rounds=1
    )  # fmt: skip
    what = {part: done for part, _, _, done in times.rows()}
    assert what[REST] == "1 x attention pool of masks" and what["trunk"] == ""
    toggle = Toggle(model)
    toggle.dense()
    assert type(model.backbone) is Backbone
    toggle.accelerated()
    assert isinstance(model.backbone, MaskedPool)
