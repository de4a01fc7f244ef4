"""DeepLab decoders: enlarged maps are convolved small, embeddings meet words unmade."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import opentrans_kernels as otk
from opentrans.ovs.deeplab import DeepLabHead
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.heads import atrous, packed
from opentrans_kernels.heads.embeddings import LateEmbeddings, late_embeddings
from opentrans_kernels.heads.enlarged import add_convolution_of_enlarged, pays
from opentrans_kernels.heads.zeros import PackedConv

pytestmark = pytest.mark.usefixtures("extension")
WIDTHS = {"res2": 12, "res3": 10, "res5": 24}
SIZES = {"res2": (13, 9), "res3": (7, 6), "res5": (3, 4)}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Eval mode, batch norms that do something, some scales negative."""
    made = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                tensor.data.copy_(torch.randn(tensor.shape, generator=made))
            module.running_var.copy_(torch.rand(module.num_features, generator=made) + 0.3)
    return model.eval().requires_grad_(False)


def features(n: int = 2) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    return {k: torch.randn(n, WIDTHS[k], *SIZES[k], generator=made) for k in WIDTHS}


def assert_exact(found: torch.Tensor, rough: torch.Tensor, exact: torch.Tensor) -> None:
    """Within twice the error of float32, and an ulp of the largest."""
    allowed = 2 * (rough.double() - exact).abs().max() + 2e-7 * exact.abs().max()
    assert float((found.double() - exact).abs().max()) <= float(allowed)


class Holder(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.eval()

    def forward(self, *args):
        return self.head(*args)


def pair(head: nn.Module) -> tuple[nn.Module, nn.Module, otk.heads.HeadReport]:
    dense = Holder(randomised(head))
    ours = copy.deepcopy(dense)
    return dense, ours, otk.accelerate_heads(ours)


class Staged(nn.Module):
    """In detectron2's form."""

    class Conv(nn.Conv2d):
        def __init__(self, *args, norm=True, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.norm = nn.BatchNorm2d(self.out_channels) if norm else None
            self.activation = F.relu

        def forward(self, x):
            x = super().forward(x)
            return self.activation(x if self.norm is None else self.norm(x))

    def __init__(self, classes: int | None = 5, norm: bool = True, wide: int = 16) -> None:
        super().__init__()
        self.in_features, self.common_stride = list(WIDTHS), 4
        self.decoder_only = classes is None
        self.decoder = nn.ModuleDict()
        for name, width in WIDTHS.items():
            if name == "res5":
                stage = {"project_conv": self.Conv(width, wide, 1), "fuse_conv": None}
            else:
                stage = {
                    "project_conv": self.Conv(width, 6, 1),
                    "fuse_conv": nn.Sequential(
                        self.Conv(6 + wide, wide, 3, padding=1, norm=norm),
                        self.Conv(wide, wide, 3, padding=1, bias=False),
                    ),
                }
            self.decoder[name] = nn.ModuleDict(stage)
        if classes is not None:
            self.predictor = nn.Conv2d(wide, classes, 1)

    def layers(self, maps):
        for name in self.in_features[::-1]:
            x = self.decoder[name]["project_conv"](maps[name])
            if self.decoder[name]["fuse_conv"] is None:
                y = x
            else:
                y = F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False)
                y = self.decoder[name]["fuse_conv"](torch.cat([x, y], 1))
        return y if self.decoder_only else self.predictor(y)

    def forward(self, maps, targets=None):
        y = self.layers(maps)
        if self.decoder_only:
            return y
        return F.interpolate(y, scale_factor=4.0, mode="bilinear", align_corners=False), {}


class TwoInputs(nn.Module):
    """In ZS3's form."""

    def __init__(self, align: bool, wide: int = 16, second: int = 8) -> None:
        super().__init__()
        self.align = align
        self.conv1, self.bn1 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.last_conv = nn.Sequential(
            nn.Conv2d(22, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(wide, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(second, 5, 1),
        )  # fmt: skip

    def forward(self, x, low):
        low = self.relu(self.bn1(self.conv1(low)))
        x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=self.align)
        return self.last_conv(torch.cat((x, low), 1))


@pytest.mark.parametrize("align", (False, True))
@pytest.mark.parametrize(
    "small, size, kernel, padding, dilation",
    [
        ((3, 4), (13, 9), (3, 3), (1, 1), (1, 1)),
        ((1, 1), (5, 6), (3, 3), (1, 1), (1, 1)),
        ((4, 5), (4, 5), (1, 1), (0, 0), (1, 1)),
        ((3, 2), (12, 11), (5, 3), (4, 2), (2, 2)),
        ((2, 6), (9, 12), (3, 5), (0, 3), (1, 1)),
        ((9, 8), (4, 3), (3, 3), (1, 1), (1, 1)),
    ],
)
def test_a_convolution_of_an_enlarged_map(small, size, kernel, padding, dilation, align) -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, *small, generator=made)
    weight = torch.randn(5, 7, *kernel, generator=made)

    def convolved(dtype):
        full = F.interpolate(x.to(dtype), size, mode="bilinear", align_corners=align)
        return F.conv2d(full, weight.to(dtype), None, 1, padding, dilation)

    rough, exact = convolved(torch.float32), convolved(torch.float64)
    to = torch.randn(exact.shape, generator=made).contiguous(memory_format=torch.channels_last)
    before = to.clone()
    options = {"padding": padding, "dilation": dilation, "align_corners": align}
    found = add_convolution_of_enlarged(to, x, weight, size, **options)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_exact(found, before + rough, before.double() + exact)


def test_what_does_not_pay_is_enlarged_first() -> None:
    weight = torch.empty(256, 256, 3, 3, device="meta")
    at = (128, 128)
    assert pays(torch.empty(1, 256, 16, 16, device="meta"), weight, at, at)
    assert not pays(torch.empty(1, 256, 128, 128, device="meta"), weight, at, at)


@pytest.mark.parametrize("shallow", [("res2",), ("res3", "res2"), ()])
def test_our_own_head(shallow: tuple[str, ...]) -> None:
    head = DeepLabHead(WIDTHS, 40, shallow=shallow, width=16, project=6, rates=(1, 2, 3))
    dense, ours, report = pair(head)
    assert [part.path for part in report.replaced] == ["head"] and "DeepLab" in str(report)
    maps = features()
    exact = copy.deepcopy(dense).double()({k: v.double() for k, v in maps.items()})
    with torch.no_grad():
        rough, found = dense(maps), ours(maps)
        assert isinstance(found, LateEmbeddings) and found.shape == rough.shape
        assert_exact(found + 0, rough, exact)
        words = F.normalize(torch.randn(9, 40), dim=1)[:, :, None, None]
        scores = F.conv2d(F.normalize(ours(maps), dim=1), words)
        assert type(scores) is torch.Tensor
        assert_exact(
            scores,
            F.conv2d(F.normalize(rough, dim=1), words),
            F.conv2d(F.normalize(exact, dim=1), words.double()),
        )
    torch.testing.assert_close(ours(maps), dense(maps))  # with gradients on
    otk.restore_heads(ours)
    assert type(ours.head) is DeepLabHead


@pytest.mark.parametrize("classes", (5, None))
@pytest.mark.parametrize("norm", (True, False))
def test_the_form_of_detectron2(classes: int | None, norm: bool) -> None:
    dense, ours, report = pair(Staged(classes, norm))
    assert [type(part.replacement) for part in report.replaced] == [atrous.StagedAtrousHead]
    maps = features()
    with torch.no_grad():
        exact = copy.deepcopy(dense).double()({k: v.double() for k, v in maps.items()})
        rough, found = dense(maps), ours(maps)
    if classes is not None:
        (rough, _), (found, losses), (exact, _) = rough, found, exact
        assert losses == {}
    assert_exact(found, rough, exact)


@pytest.mark.parametrize("align", (False, True))
def test_a_decoder_of_two_inputs(align: bool) -> None:
    dense, ours, report = pair(TwoInputs(align))
    kind = atrous.AlignedAtrousDecoder if align else atrous.AtrousDecoder
    assert [type(part.replacement) for part in report.replaced] == [kind]
    made = torch.Generator().manual_seed(1)
    x, low = (torch.randn(2, *s, generator=made) for s in ((16, 3, 4), (12, 11, 13)))
    with torch.no_grad():
        exact = copy.deepcopy(dense).double()(x.double(), low.double())
        assert_exact(ours(x, low), dense(x, low), exact)
        last = low.contiguous(memory_format=torch.channels_last)
        assert_exact(ours(x, last), dense(x, low), exact)


def sparse(head: nn.Module) -> nn.Module:
    """Most weights of the convolutions with a window are zero."""
    made = torch.Generator().manual_seed(5)
    for module in head.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.weight.data.mul_(torch.rand(module.weight.shape, generator=made) < 0.1)
    return head


@pytest.mark.parametrize("form", ("own", "detectron2", "two inputs"))
def test_convolutions_most_of_which_is_zero(form: str, caplog: pytest.LogCaptureFixture) -> None:
    made = torch.Generator().manual_seed(1)
    given: tuple[Any, ...] = (features(),)
    if form == "own":
        options = {"shallow": ("res3", "res2"), "width": 16, "project": 6, "rates": (1, 2, 3)}
        head: nn.Module = DeepLabHead(WIDTHS, 40, **options)
    elif form == "detectron2":
        head = Staged(None)
    else:
        head = TwoInputs(True)
        given = tuple(torch.randn(2, *s, generator=made) for s in ((16, 3, 4), (12, 11, 13)))
    dense, ours, report = pair(sparse(head))
    names = [part.path for part in report.replaced if isinstance(part.replacement, PackedConv)]
    assert names and any(isinstance(p.replacement, atrous._Atrous) for p in report.replaced)

    def double(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one.double() for key, one in value.items()}
        return value.double()

    with torch.no_grad():
        exact = copy.deepcopy(dense).double()(*map(double, given))
        assert_exact(ours(*given) + 0, dense(*given), exact)
        for model in (dense, ours):
            for name, weight in model.named_parameters():
                if name.removesuffix(".weight") in names:
                    weight.mul_(2)
        with caplog.at_level(logging.WARNING):
            assert_exact(ours(*given) + 0, dense(*given), copy.deepcopy(dense).double()(
                *map(double, given)))  # fmt: skip
    assert "was written to" in caplog.text
    otk.restore_heads(ours)
    assert not any(isinstance(module, PackedConv) for module in ours.modules())


@pytest.mark.parametrize("form", ("own", "detectron2", "two inputs"))
def test_wide_convolutions_behind_run_by_winograds_method(
    form: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = torch.Generator().manual_seed(1)
    maps = {k: torch.randn(2, WIDTHS[k], *map(lambda s: 2 * s, SIZES[k]), generator=made)
            for k in WIDTHS}  # fmt: skip
    given: tuple[Any, ...] = (maps,)
    if form == "own":
        head: nn.Module = DeepLabHead(WIDTHS, 40, width=32, project=6, rates=(1, 2, 3))
    elif form == "detectron2":
        head = Staged(None, wide=33)
    else:
        head = TwoInputs(True, wide=40, second=32)
        given = tuple(torch.randn(2, *s, generator=made) for s in ((16, 3, 4), (12, 11, 14)))
    dense, ours, report = pair(head)
    (part,) = (m for m in ours.modules() if isinstance(m, atrous._Atrous))
    calls = []
    convolve = packed.Transformed.convolve
    monkeypatch.setattr(
        packed.Transformed, "convolve", lambda *given: (calls.append(1), convolve(*given))[1]
    )

    def check(used: int) -> None:
        plain = [
            {k: v.double() for k, v in one.items()} if isinstance(one, dict) else one.double()
            for one in given
        ]
        with torch.no_grad():
            exact = copy.deepcopy(dense).double()(*plain)
            assert_exact(ours(*given) + 0, dense(*given), exact)
        assert len(calls) == used
        calls.clear()

    # Of detectron2's stages, the map of res3 has 12 x 14 pixels, that of res2 26 x 18.
    count = len(part.opentrans_smooth)
    assert count == (2 if form == "detectron2" else 1) and "Winograd" in str(report)
    check(count)
    ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    check(count)
    (part,) = (m for m in ours.modules() if isinstance(m, atrous._Atrous))
    link = atrous.links_of(next(iter(part.fuse_modules().values())))[1]
    twin = atrous.links_of(next(iter(_chains(dense.head, part))))[1]
    for one in (link, twin):
        one.norm.running_var.mul_(3)
    with caplog.at_level(logging.WARNING):
        check(count - 1)
        check(count - 1)
    assert caplog.text.count("running_var was written to") == 1


def _chains(head: Any, part: Any) -> list[nn.Module]:
    return [head.get_submodule(path) for path in part.fuse_modules()]


def test_what_is_not_a_chain_stays_with_its_reason() -> None:
    head = TwoInputs(True)
    head.last_conv[2] = nn.GELU()
    _, ours, report = pair(head)
    assert not report.replaced and "GELU" in report.left[0].reason
    assert type(ours.head) is TwoInputs


def test_a_hook_inside_runs_the_original(caplog: pytest.LogCaptureFixture) -> None:
    _, ours, _ = pair(TwoInputs(True))
    seen = []
    ours.head.last_conv[4].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        ours(torch.randn(1, 16, 3, 4), torch.randn(1, 12, 11, 13))
    assert seen == [1] and "hooks" in caplog.text


def test_weights_may_be_written_to() -> None:
    dense, ours, _ = pair(TwoInputs(True))
    x, low = torch.randn(1, 16, 3, 4), torch.randn(1, 12, 11, 13)
    for model in (dense, ours):
        model.head.last_conv[0].weight.data.mul_(0.5)
        model.head.last_conv[1].running_var.mul_(3)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, low), dense(x, low))


def scores_of(conv: nn.Conv2d, x: torch.Tensor, words: torch.Tensor, late: bool) -> torch.Tensor:
    with torch.no_grad():
        y = late_embeddings(x, conv) if late else conv(x)
        return F.conv2d(F.normalize(y, dim=1), words.to(y.dtype)[:, :, None, None])


@pytest.mark.parametrize(
    "case", ["plain", "no bias", "zero bias", "dead inputs", "dependent", "fewer rows", "zero"]
)
def test_embeddings_that_meet_words(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(8, 6 if case == "fewer rows" else 20, 1, bias=case != "no bias")
    if case == "zero bias":
        conv.bias.data.zero_()
    if case == "dead inputs":
        conv.weight.data[:, ::3] = 0
    if case == "dependent":
        conv.weight.data[:, 1] = conv.weight.data[:, 0]
    if case == "zero":
        conv.weight.data.zero_()
        conv.bias.data.zero_()
    x = torch.randn(2, 8, 5, 3)
    words = F.normalize(torch.randn(7, conv.out_channels), dim=1)
    exact = scores_of(copy.deepcopy(conv).double(), x.double(), words, False)
    rough, made = scores_of(conv, x, words, False), []
    own = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *args: (made.append(1), own(*args))[1])
    assert_exact(scores_of(conv, x, words, True), rough, exact)
    assert bool(made) == (case in ("dependent", "fewer rows")), "embeddings are made only for these"


def test_embeddings_are_made_for_anything_else() -> None:
    conv, x = nn.Conv2d(8, 20, 1), torch.randn(2, 8, 5, 3)
    with torch.no_grad():
        right = conv(x)
        late = late_embeddings(x, conv)
        assert torch.equal(late.flatten(2).sum(1), right.flatten(2).sum(1))
        unit = F.normalize(late_embeddings(x, conv), dim=1)
        assert torch.equal(unit * 2, F.normalize(right, dim=1) * 2)
        assert torch.equal(F.normalize(late, dim=2), F.normalize(right, dim=2))
        late = late_embeddings(x, conv)
        conv.weight.data.mul_(2)
        conv.weight.add_(1)
        with pytest.raises(OpenTransError, match="changed"):
            late + 1
        with pytest.raises(OpenTransError, match="changed"):
            F.conv2d(F.normalize(late, dim=1), torch.randn(3, 20, 1, 1))
