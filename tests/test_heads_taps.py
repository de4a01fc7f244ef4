"""Dilated convolutions on maps that are small beside their rate."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from kernel_cases import assert_within
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import opentrans_kernels as otk
from opentrans_kernels.heads.taps import Taps, trimmed
from opentrans_kernels.heads.zeros import PackedConv, TrimmedConv

pytestmark = pytest.mark.usefixtures("extension")


def conv_of(kernel: int = 3, dilation: int = 6, **changes: Any) -> nn.Conv2d:
    torch.manual_seed(kernel + dilation)
    options = {"padding": dilation * (kernel - 1) // 2, "dilation": dilation} | changes
    return nn.Conv2d(33, 40, kernel, **options).eval().requires_grad_(False)


class Pyramid(nn.Module):
    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.far, self.near = conv_of(dilation=18, **changes), conv_of(dilation=2, **changes)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.far(x) + self.near(x)


@pytest.mark.parametrize(
    ("kernel", "dilation", "padding", "bias"),
    [(3, 6, 6, True), (3, 18, 18, False), (3, 2, 2, True), (5, 4, 8, True), (3, 5, 7, True),
     (3, 3, 0, False), (2, 9, 5, True), (3, 4, 9, True)],
)  # fmt: skip
@pytest.mark.parametrize("size", [(9, 9), (7, 16), (20, 8)])
def test_taps_are_the_convolution(kernel, dilation, padding, bias, size) -> None:
    conv = conv_of(kernel, dilation, padding=padding, bias=bias)
    taps = Taps("conv", conv)
    x = torch.randn(2, 33, *size, generator=torch.Generator().manual_seed(1))
    ones = conv_of(kernel, dilation, padding=padding, bias=False)
    ones.weight.fill_(1.0)
    if min(map(taps.out_side, size)) < 1:
        with torch.no_grad():
            assert not taps.serves(x)
        return
    with torch.no_grad():
        exact, dense = copy.deepcopy(conv).double()(x.double()), conv(x)
        for same in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            found = taps.convolve(same)
            assert found.shape == dense.shape
            assert_within(found, exact, dense, (kernel, dilation, size))
        assert taps.convolve(x[:0]).shape == (0, *dense.shape[1:])
        # Every product with a number of the map is a one here.
        read = ones(torch.ones(1, 33, *size)).sum() / ones(torch.ones(1, 33, *size)).shape[1]
    products = 33 * kernel**2 * taps.out_side(size[0]) * taps.out_side(size[1])
    assert taps.share(*size) == pytest.approx(float(read) / products)


def test_only_small_maps_are_computed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Pyramid()
    model = copy.deepcopy(plain)
    report = otk.accelerate_heads(model)
    assert type(model.far) is type(model.near) is TrimmedConv
    assert "2 x convolution: on small maps without the taps that read padding" in str(report)
    rates = []
    convolve = Taps.convolve
    monkeypatch.setattr(
        Taps, "convolve", lambda taps, x: (rates.append(taps.dilation), convolve(taps, x))[1]
    )
    for size, used in (((16, 16), [18]), ((3, 4), [18, 2]), ((60, 60), []), ((30, 20), [18])):
        x = torch.randn(1, 33, *size)
        with torch.no_grad():
            exact = copy.deepcopy(plain).double()(x.double())
            assert_within(model(x), exact, plain(x), size)
        assert rates == used, size
        rates.clear()
    torch.testing.assert_close(model(x), plain(x))
    assert not rates, "with gradients on the modules run"
    with torch.no_grad():
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.equal(twin(x), model(x)) and rates == [18, 18]
    otk.restore_heads(model)
    assert type(model.far) is nn.Conv2d


def test_nothing_is_kept_for_maps_that_are_never_small() -> None:
    model, plain = Pyramid(), Pyramid()
    otk.accelerate_heads(model)
    taps = model.far.opentrans_copied
    with torch.no_grad():
        assert taps.weight is None
        model(torch.randn(1, 33, 60, 60))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.randn(1, 33, 16, 16))
        assert taps.weight is None, "another mode's tensor"
        x = torch.randn(1, 33, 16, 16)
        torch.testing.assert_close(model(x), plain(x))
        assert taps.weight is not None
        # What nobody saw before the matrices were made is not in them later.
        model, kept = Pyramid(), plain.far.weight.clone()
        otk.accelerate_heads(model)
        model.far.weight.data[0, 0, 0, 0] = 99.0
        model(x)
        model.far.weight.data.copy_(kept)
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.filterwarnings("ignore")
def test_traces_hold_for_maps_of_any_size() -> None:
    model, plain = Pyramid(), Pyramid()
    otk.accelerate_heads(model)
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(1, 33, 9, 9))
        for x in (torch.randn(2, 33, 9, 9), torch.randn(1, 33, 24, 25), torch.randn(1, 33, 3, 4)):
            torch.testing.assert_close(traced(x), plain(x))


@pytest.mark.parametrize(
    ("options", "served"),
    [({"padding": 1, "dilation": 6}, (11, 12)), ({"padding": 20, "dilation": 3}, (3, 3)),
     ({"kernel": 2, "padding": 5, "dilation": 9}, (3, 3)), ({"padding": 0}, None)],
)  # fmt: skip
def test_unusual_padding(options: dict[str, int], served: tuple[int, int] | None) -> None:
    plain = nn.ModuleList([conv_of(**options)]).eval()
    model = copy.deepcopy(plain)
    report = otk.accelerate_heads(model)
    assert not report.left and (type(model[0]) is TrimmedConv) == (served is not None)
    with torch.no_grad():
        for size in {served or (20, 20), (30, 31)}:
            x = torch.randn(2, 33, *size)
            torch.testing.assert_close(model[0](x), plain[0](x))
        with pytest.raises(RuntimeError, match="to have 33 channels"):
            model[0](torch.randn(2, 7, *(served or (20, 20))))
    if served:
        assert model[0].opentrans_copied.weight is not None


def test_layers_without_numbers_are_passed_over() -> None:
    layers = [
        nn.Conv2d(32, 32, 3, groups=32, device="meta"), nn.LazyConv2d(32, 3, groups=4),
        nn.LazyConv2d(32, 3, padding=2, dilation=2), nn.LazyLinear(32),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2, device="meta"), conv_of().half(),
    ]  # fmt: skip
    model = nn.ModuleList(layers).eval()
    assert not otk.accelerate_heads(model).parts
    assert list(model) == layers


def test_a_weight_that_is_written_to_is_used(caplog: pytest.LogCaptureFixture) -> None:
    model, plain = Pyramid(), Pyramid()
    otk.accelerate_heads(model)
    x = torch.randn(1, 33, 16, 16)
    with torch.no_grad():
        model(x)
        for one in (model, plain):
            one.far.weight.mul_(2)
            one.near.bias.add_(1)
        with caplog.at_level(logging.WARNING):
            torch.testing.assert_close(model(x), plain(x))
            model(x)
    assert caplog.text.count("far.weight was written to") == 1


def test_what_it_is_not_for() -> None:
    assert trimmed("conv", conv_of()) is not None
    odd = conv_of()
    odd.weight[0, 0, 0, 0] = float("inf")
    for conv in (
        conv_of(dilation=1, padding=1), conv_of(stride=2), conv_of(padding_mode="reflect"),
        conv_of().double(), nn.Conv2d(31, 40, 3, padding=6, dilation=6), odd,
        conv_of(padding=0), conv_of(padding="same"), conv_of(padding=(6, 4)),
        conv_of().to("meta"), nn.LazyConv2d(40, 3, padding=6, dilation=6),
    ):  # fmt: skip
        assert trimmed("conv", conv) is None, conv
    sparse = Pyramid()
    for conv in (sparse.far, sparse.near):
        conv.weight.mul_(torch.rand_like(conv.weight) < 0.1)
    otk.accelerate_heads(sparse)
    assert type(sparse.far) is PackedConv, "zeros gain more"
