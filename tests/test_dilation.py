"""Dilated convolutions in the planar engine: values, gradients, packs, folding and plans."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels.compact import fold_conv
from opentrans_kernels.engines import SparseEngine
from opentrans_kernels.errors import PlanError, UnsupportedModelError
from opentrans_kernels.gpu.network import describe_network
from opentrans_kernels.nn import AcceleratedConv2d, SparseConv2d
from opentrans_kernels.ops.sparse_bottleneck import fusible
from opentrans_kernels.ops.sparse_conv2d import reference
from opentrans_kernels.pack import SparseWeight, read_header
from opentrans_kernels.plan import prepare
from opentrans_kernels.topology import ConvNode

SIZES = ((1, 9, 9), (2, 13, 17), (1, 32, 5), (1, 40, 33))


def weight(cout: int, cin: int, kernel: int, density: float = 0.2) -> torch.Tensor:
    made = torch.Generator().manual_seed(kernel)
    dense = torch.randn(cout, cin, kernel, kernel, generator=made)
    return dense * (torch.rand(dense.shape, generator=made) < density)


@pytest.mark.parametrize(
    ("kernel", "dilation", "stride"), [(3, 2, 1), (3, 6, 1), (3, 12, 1), (3, 2, 2), (3, 3, 2),
                                       (5, 2, 1), (2, 3, 3), (9, 2, 1), (3, 4, 3)]
)  # fmt: skip
def test_values_err_no_more_than_dense(
    extension: None, kernel: int, dilation: int, stride: int
) -> None:
    dense, bias = weight(9, 35, kernel), torch.randn(9)
    span = (kernel - 1) * dilation + 1
    made = torch.Generator().manual_seed(0)
    for (n, h, w), padding in itertools.product(SIZES, (0, dilation, span)):
        if min(h, w) + 2 * padding < span:
            continue
        packed = SparseWeight.from_dense(dense, bias, stride, padding, dilation)
        x = torch.randn(n, 35, h, w, generator=made)
        exact = F.conv2d(x.double(), dense.double(), bias.double(), stride, padding, dilation)
        rough = F.conv2d(x, dense, bias, stride, padding, dilation)
        bound = 2 * (rough - exact).abs().max() + 2e-6 * exact.abs().max()
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.expand(n, -1, -1, -1)):
            found = otk.sparse_conv2d(given, packed)
            assert found.shape == exact.shape
            assert (found - exact).abs().max() <= bound
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(otk.sparse_conv2d(x, packed), found)
        finally:
            torch.set_num_threads(threads)


def test_gradients_are_those_of_the_dense_convolution(extension: None) -> None:
    for stride, padding, dilation in ((1, 2, 2), (2, 1, 3), (1, 9, 2), (3, 0, 2)):
        dense = weight(4, 6, 3, 0.4)
        packed = SparseWeight.from_dense(dense, torch.randn(4), stride, padding, dilation)
        x = torch.randn(2, 6, 14, 11, requires_grad=True)
        values = packed.values.clone().requires_grad_()
        out = torch.ops.opentrans_kernels.sparse_conv2d(
            x, packed.structure, values, packed.bias, None, 4, 3, stride, padding, True, 0, 0.0,
            dilation,
        )  # fmt: skip
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, (x, values), grad)
        own = x.detach().double().requires_grad_()
        live = packed.values.double().requires_grad_()
        right = F.conv2d(
            own, packed.to_dense(live), packed.bias.double(), stride, padding, dilation
        ).relu()
        for a, b in zip(found, torch.autograd.grad(right, (own, live), grad.double()), strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-4)


def test_gradcheck_of_the_reference() -> None:
    packed = SparseWeight.from_dense(weight(3, 4, 3, 0.5), None, 1, 2, 2)
    x = torch.randn(1, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    values = packed.values.double().requires_grad_()

    def run(x, values):
        return reference.sparse_conv2d(
            x, packed.structure, values, None, None, 3, 3, 1, 2, False, 0, 0.0, 2
        )

    assert torch.autograd.gradcheck(run, (x, values))


def test_the_pack_knows_its_dilation(extension: None) -> None:
    packed = SparseWeight.from_dense(weight(5, 7, 3), None, 2, 6, 6)
    header = read_header(packed.structure.numpy())
    assert (header.stride, header.padding, header.dilation, header.span) == (2, 6, 6, 13)
    assert torch.equal(packed.to_dense(), weight(5, 7, 3))
    loaded = pickle.loads(pickle.dumps(packed))
    assert loaded.dilation == 6 and loaded.validate() is loaded
    state = dict(vars(SparseWeight.from_dense(weight(5, 7, 3))))
    del state["dilation"]  # as pickled by versions that knew none
    old = SparseWeight.__new__(SparseWeight)
    old.__setstate__(state)
    assert old.dilation == 1
    assert SparseWeight.from_dense(weight(5, 7, 1), dilation=4).dilation == 1
    with pytest.raises(PlanError, match="dilation 0 >= 1"):
        SparseWeight.from_dense(weight(5, 7, 3), dilation=0)
    with pytest.raises(PlanError, match="at most"):
        SparseWeight.from_dense(weight(5, 7, 3), dilation=1 << 16)
    buffer = io.BytesIO()
    torch.save({"structure": packed.structure}, buffer)
    with pytest.raises(RuntimeError, match="do not match"):
        torch.ops.opentrans_kernels.sparse_conv2d(
            torch.randn(1, 7, 20, 20), packed.structure, packed.values, None, None, 5, 3, 2, 6,
            False,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="smaller than"):
        otk.sparse_conv2d(torch.randn(1, 7, 20, 20), SparseWeight.from_dense(
            weight(5, 7, 3), None, 1, 0, 12))  # fmt: skip


def test_a_dilated_convolution_is_not_taken_into_a_fused_block() -> None:
    one = SparseWeight.from_dense(weight(6, 6, 1))
    three = SparseWeight.from_dense(weight(6, 6, 3), None, 1, 1, 1)
    dilated = SparseWeight.from_dense(weight(6, 6, 3), None, 1, 2, 2)
    assert fusible(one, three, one, None) is None
    assert "dilation 2" in str(fusible(one, dilated, one, None))


def test_a_layer_and_its_folded_form(extension: None) -> None:
    conv = nn.Conv2d(8, 12, 3, padding=4, dilation=4)
    with torch.no_grad():
        conv.weight.copy_(weight(12, 8, 3))
    bn = nn.BatchNorm2d(12).eval()
    bn.running_mean.normal_()
    folded = fold_conv(ConvNode("c", conv, bn, "b", True))
    assert (folded.padding, folded.dilation) == (4, 4)
    layer = SparseConv2d.from_conv(conv, bn=bn, relu=True)
    x = torch.randn(2, 8, 11, 14)
    with torch.no_grad():
        want = bn.double()(conv.double()(x.double())).relu()
        assert (layer.float()(x) - want).abs().max() <= 1e-5 * want.abs().max()


class Pyramid(nn.Module):
    """DeepLab's: branches of the same map at several rates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(24, 16, 3, padding=rate, dilation=rate, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
            )
            for rate in (1, 2, 6, 12)
        )

    def forward(self, x):
        x = self.stem(x)
        return torch.cat([branch(x) for branch in self.branches], 1)


def test_plans_serve_them_like_any_other(extension: None) -> None:
    model = Pyramid().eval()
    dense = copy.deepcopy(model)
    report = otk.accelerate(model, "uniform:0.90", input_size=(64, 64), measure=False)
    kinds = {unit.name: unit.kind for unit in report.plan.units}
    assert all(kinds[f"branches.{i}.0"] == "sparse" for i in range(4))
    assert type(model.branches[2][0]) is SparseConv2d and isinstance(
        model.branches[3][0], AcceleratedConv2d
    )
    otk.synthetic.synthetic_masks(dense, "uniform:0.90").apply_(dense)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        right = dense.double()(x.double())
        assert (model(x) - right).abs().max() <= 1e-5 * right.abs().max()


def test_damaged_dilations_are_refused(extension: None) -> None:
    packed = SparseWeight.from_dense(weight(5, 7, 3), None, 1, 2, 2)
    for value in (-1 << 16 | 1, 0x7FFF0000 | 1):
        structure = packed.structure.clone()
        structure[5] = value
        with pytest.raises((PlanError, RuntimeError)):
            torch.ops.opentrans_kernels.sparse_conv2d(
                torch.randn(1, 7, 9, 9), structure, packed.values, None, None, 5, 3, 1, 2, False,
                0, 0.0, (value >> 16) + 1,
            )  # fmt: skip
    one = SparseWeight.from_dense(weight(5, 7, 1))
    structure = one.structure.clone()
    structure[5] = 3 << 16 | 1
    with pytest.raises(RuntimeError, match="header"):
        torch.ops.opentrans_kernels.sparse_conv2d(
            torch.randn(1, 7, 9, 9), structure, one.values, None, None, 5, 1, 1, 0, False, 0, 0.0, 4
        )


def test_a_gpu_plan_refuses_a_dilated_trunk() -> None:
    resnet = pytest.importorskip("torchvision.models.resnet")
    model = resnet.ResNet(
        resnet.Bottleneck, [1, 1, 1, 2], replace_stride_with_dilation=[False, False, True]
    ).eval()
    with pytest.raises(UnsupportedModelError, match="layer4.1.conv2 is dilated"):
        describe_network(prepare(model, "uniform:0.90", (64, 64)))


def test_an_engine_pickled_without_a_dilation_has_none(extension: None) -> None:
    engine = SparseEngine(SparseWeight.from_dense(weight(5, 7, 3), None, 1, 1))
    state = engine.__getstate__()
    del state["dilation"]
    old = SparseEngine.__new__(SparseEngine)
    old.__setstate__(state)
    x = torch.randn(1, 7, 9, 9)
    assert torch.equal(old(x), engine(x))
