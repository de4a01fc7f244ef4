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

import opentrans_kernels as otk
from opentrans_kernels.heads.taps import Taps, outlying
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
    assert outlying(conv_of())
    assert not outlying(conv_of(dilation=1, padding=1)) and not outlying(conv_of(stride=2))
    assert not outlying(conv_of(padding_mode="reflect")) and not outlying(conv_of().double())
    narrow = nn.Conv2d(31, 40, 3, padding=6, dilation=6)
    assert not outlying(narrow)
    odd = conv_of()
    odd.weight[0, 0, 0, 0] = float("inf")
    assert not outlying(odd)
    sparse = Pyramid()
    for conv in (sparse.far, sparse.near):
        conv.weight.mul_(torch.rand_like(conv.weight) < 0.1)
    otk.accelerate_heads(sparse)
    assert type(sparse.far) is PackedConv, "zeros gain more"
