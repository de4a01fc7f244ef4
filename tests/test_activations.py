"""What the kernels apply behind their sums, and the depthwise convolution, in every row."""

from __future__ import annotations

import copy
import io
import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import assert_within, layouts, masked_weight
from test_ops import _forced, rows  # noqa: F401  (a fixture: the row's backend is in force)
from torch import nn

from opentrans_kernels import dispatch, ops
from opentrans_kernels.activations import NONE, RELU, Activation, Kind, activation_of
from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.nn import AcceleratedConv2d, FoldedActivation, SparseConv2d
from opentrans_kernels.ops.library import plane_stride
from opentrans_kernels.pack import SparseWeight

NATIVE = torch.ops.opentrans_kernels
KINDS = [Activation(kind, 0.125 if kind == Kind.LEAKY_RELU else 0.0) for kind in Kind]
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
kinds = pytest.mark.parametrize("act", KINDS, ids=str)


def torch_own(act: Activation, y: torch.Tensor) -> torch.Tensor:
    functions = (
        lambda t: t, F.relu, F.relu6, lambda t: F.leaky_relu(t, act.slope), F.silu, F.hardswish,
        F.gelu, lambda t: F.gelu(t, approximate="tanh"), lambda t: t * torch.sigmoid(1.702 * t),
    )  # fmt: skip
    return functions[act.kind](y)


def test_the_numbers_are_those_of_the_kernels() -> None:
    header = (Path(__file__).parents[1] / "csrc" / "otk.h").read_text(encoding="utf-8")
    names = re.search(r"enum ActivationKind : int32_t \{([^}]*)\}", header)
    assert names is not None
    found = [name.lower() for name in re.findall(r"\bk(\w+),", names[1])]
    assert found == [kind.name.replace("_", "").lower() for kind in sorted(Kind)]


@rows("sparse_conv2d")
@kinds
def test_behind_a_sparse_convolution(row: dispatch.Row, act: Activation) -> None:
    for kernel, stride, padding in ((1, 1, 0), (3, 1, 1), (3, 2, 1), (5, 1, 0)):
        weight, bias = masked_weight(9, 70, kernel, 0.3), torch.randn(9)
        packed = SparseWeight.from_dense(weight, bias, stride, padding, row_block=5)
        for n, h, w in ((2, 5, 5), (1, 7, 7), (1, 16, 16), (2, 13, 29)):
            x = torch.randn(n, 70, h, w)
            exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
            plain = F.conv2d(x, weight, bias, stride, padding)
            out = ops.sparse_conv2d(x, packed, activation=act)
            assert_within(out, torch_own(act, exact), torch_own(act, plain), (kernel, h, w))
            assert out.stride(1) == plane_stride(exact.shape[2] * exact.shape[3])
            for name, residual in layouts(torch.randn(plain.shape)):
                added = ops.sparse_conv2d(x, packed, residual, activation=act)
                both = (torch_own(act, y + residual) for y in (exact, plain))
                assert_within(added, *both, (kernel, h, w, name))


@rows("depthwise_conv2d")
@pytest.mark.parametrize("kernel", (1, 2, 3, 5, 7, 9))
def test_depthwise(row: dispatch.Row, kernel: int) -> None:
    sizes = ((1, 1), (5, 9), (7, 7), (14, 14), (16, 16), (33, 17), (9, 65), (40, 8))
    for index, (stride, padding, (h, w)) in enumerate(
        product((1, 2, 3), {0, 1, kernel // 2, kernel + 2}, sizes)
    ):
        if min(h, w) + 2 * padding < kernel:
            continue
        act = KINDS[index % len(KINDS)]
        x, weight = torch.randn(2, 3, h, w), torch.randn(3, 1, kernel, kernel)
        bias = torch.randn(3) if index % 3 else None
        given = (stride, padding, 1, 3)
        exact = F.conv2d(
            x.double(), weight.double(), None if bias is None else bias.double(), *given
        )
        plain = F.conv2d(x, weight, bias, *given)
        out = ops.depthwise_conv2d(x, weight, bias, stride, padding, act)
        assert_within(out, torch_own(act, exact), torch_own(act, plain), (stride, padding, h, w))
        plane = plane_stride(exact.shape[2] * exact.shape[3])
        assert out.stride() == (3 * plane, plane, exact.shape[3], 1)


@rows("depthwise_conv2d")
def test_depthwise_layouts_threads_and_purity(row: dispatch.Row) -> None:
    weight, bias = torch.randn(6, 1, 3, 3), torch.randn(6)
    for stride, (h, w) in product((1, 2), ((7, 9), (16, 16), (30, 31))):
        x = torch.randn(3, 6, h, w)
        plain = ops.depthwise_conv2d(x, weight, bias, stride, 1, RELU)
        compiled = row.backend != "reference"
        for name, other in layouts(x):
            before = other.clone()
            found = ops.depthwise_conv2d(other, weight, bias, stride, 1, RELU)
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
            assert torch.equal(other, before) and (not compiled or torch.equal(found, plain)), name
        try:
            torch.set_num_threads(3)
            found = ops.depthwise_conv2d(x, weight, bias, stride, 1, RELU)
        finally:
            torch.set_num_threads(1)
        assert not compiled or torch.equal(found, plain)
    assert ops.depthwise_conv2d(torch.zeros(0, 6, 5, 5), weight).shape == (0, 6, 3, 3)


SPECIAL = torch.tensor([math.nan, math.inf, -math.inf, -1e30, 1e30, -100.0, -88.0, -3.0, 3.0, 0.0])


@rows("sparse_conv2d")
@kinds
def test_numbers_that_are_none_stay_so(row: dispatch.Row, act: Activation) -> None:
    packed = SparseWeight.from_dense(torch.ones(1, 1, 1, 1))
    for width in (10, 3, 37):
        x = SPECIAL.repeat(8)[: 2 * width].view(1, 1, 2, width)
        exact = row.backend != "reference"  # which is as exact as torch is
        expected = torch_own(act, x.double()).float() if exact else torch_own(act, x)
        found = ops.sparse_conv2d(x, packed, activation=act)
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-30)
        found = ops.depthwise_conv2d(x, torch.ones(1, 1, 1, 1), activation=act)
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-30)


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, act):
        ctx.act = act
        ctx.save_for_backward(z)
        return act.apply_(z.clone())

    @staticmethod
    def backward(ctx, grad):
        return ctx.act.gradient(grad, *ctx.saved_tensors), None


@kinds
def test_gradcheck(act: Activation) -> None:
    z = (4 * torch.randn(60, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(_Applied.apply, (z, act))
    assert torch.equal(_Applied.apply(z, act), torch_own(act, z))


@kinds
def test_gradients_of_the_compiled_kernels(extension: None, act: Activation) -> None:
    for kernel, stride in ((1, 1), (3, 1), (3, 2)):
        weight = masked_weight(9, 7, kernel, 0.4)
        packed = SparseWeight.from_dense(weight, torch.randn(9), stride, kernel // 2)
        leaves = [torch.randn(2, 7, 6, 5), packed.values, packed.bias]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        given = (9, kernel, stride, kernel // 2, False, act.kind, act.slope)
        x, values, bias = leaves
        whole = weight.clone().requires_grad_()
        plain = F.conv2d(x, whole, bias, stride, kernel // 2)
        residual = torch.randn(plain.shape, requires_grad=True)
        out = NATIVE.sparse_conv2d(x, packed.structure, values, bias, residual, *given)
        grad = torch.randn(out.shape)
        found = torch.autograd.grad(out, (x, bias, residual, values), grad)
        dense = (x, bias, residual, whole)
        expected = list(torch.autograd.grad(torch_own(act, plain + residual), dense, grad))
        expected[3] = expected[3].flatten()[packed.indices()]
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for stride in (1, 2):
        leaves = [torch.randn(s, requires_grad=True) for s in ((2, 5, 7, 6), (5, 1, 3, 3), (5,))]
        out = ops.depthwise_conv2d(*leaves, stride, 1, act)
        grad = torch.randn(out.shape)
        dense = torch_own(act, F.conv2d(*leaves, stride, 1, 1, 5))
        for got, want in zip(
            torch.autograd.grad(out, leaves, grad), torch.autograd.grad(dense, leaves, grad),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", [RELU, KINDS[Kind.LEAKY_RELU], KINDS[Kind.SILU]], ids=str)
def test_opcheck(extension: None, act: Activation) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 2, 1)
    x = torch.randn(2, 7, 6, 5, requires_grad=True)
    given = (x, packed.structure, packed.values, packed.bias, None, 9, 3, 2, 1, False)
    rest = (act.kind, act.slope)
    torch.library.opcheck(NATIVE.sparse_conv2d.default, (*given, *rest), test_utils=QUICK)
    window, bias = torch.randn(7, 1, 3, 3, requires_grad=True), torch.randn(7)
    for more in ((x, window, bias, 2, 1, *rest), (x, window, None, 1, 0)):
        torch.library.opcheck(NATIVE.depthwise_conv2d.default, more, test_utils=QUICK)


class Layers(nn.Module):
    def __init__(self, act: Activation) -> None:
        super().__init__()
        self.act = act
        self.packed = SparseWeight.from_dense(masked_weight(6, 3, 3, 0.5), torch.randn(6), 2, 1)
        self.window = nn.Buffer(torch.randn(6, 1, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = ops.sparse_conv2d(x, self.packed, activation=self.act)
        return ops.depthwise_conv2d(y, self.window, None, 1, 1, self.act)


@pytest.mark.parametrize("act", [RELU, KINDS[Kind.SILU]], ids=str)
def test_captured_and_exported(extension: None, act: Activation) -> None:
    layers, x = Layers(act).eval(), torch.randn(2, 3, 9, 8)
    expected = layers(x)
    captured = torch.compile(layers, backend="aot_eager", fullgraph=True)
    assert torch.equal(captured(x), expected)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layers, (x,), strict=False), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), expected)


def test_graphs_saved_before_there_were_others_keep_running(extension: None) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 1, 1)
    x = torch.randn(2, 7, 6, 5)
    given = (x, packed.structure, packed.values, packed.bias, None, 9, 3, 1, 1)
    for relu in (True, False):
        assert torch.equal(
            NATIVE.sparse_conv2d(*given, relu), ops.sparse_conv2d(x, packed, relu=relu)
        )
    conv = SparseConv2d.from_conv(nn.Conv2d(3, 4, 3), relu=True)
    state = conv.__getstate__()
    assert state.pop("opentrans_activation") == RELU
    older = AcceleratedConv2d.__new__(AcceleratedConv2d)
    older.__setstate__({**state, "opentrans_relu": True})
    folded = FoldedActivation(nn.ReLU())
    state = folded.__getstate__()
    del state["opentrans_activation"]
    again = FoldedActivation.__new__(FoldedActivation)
    again.__setstate__(state)
    assert older.opentrans_activation == again.opentrans_activation == RELU
    assert copy.deepcopy(conv).opentrans_activation == RELU


@rows("depthwise_conv2d")
def test_what_is_refused(row: dispatch.Row) -> None:
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    packed = SparseWeight.from_dense(masked_weight(4, 4, 1, 0.5))
    for call, words in (
        (lambda: ops.depthwise_conv2d(x[0], weight), "four dim|N, C, H, W"),
        (lambda: ops.depthwise_conv2d(x, weight[:3]), "one window per channel"),
        (lambda: ops.depthwise_conv2d(x, weight.expand(4, 2, 3, 3)), "one window per channel"),
        (lambda: ops.depthwise_conv2d(x, weight[..., :2]), "one window per channel"),
        (lambda: ops.depthwise_conv2d(x, weight, torch.randn(3)), "4 elements"),
        (lambda: ops.depthwise_conv2d(x, weight, None, 0), "stride"),
        (lambda: ops.depthwise_conv2d(x, weight, None, 1, -1), "padding"),
        (lambda: ops.depthwise_conv2d(x, weight, None, 1 << 20), "stride"),
        (lambda: ops.depthwise_conv2d(x[..., :2], weight), "smaller"),
        (lambda: NATIVE.depthwise_conv2d(x, weight, None, 1, 0, len(Kind)), "is no activation"),
        (lambda: ops.sparse_conv2d(x, packed, relu=True, activation=KINDS[2]), "exclude"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


def test_other_derivatives_are_refused() -> None:
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    with pytest.raises(UnsupportedModelError, match="ordinary backward only"):
        torch.func.grad(lambda t: ops.depthwise_conv2d(t, weight).sum())(x)


def test_modules_are_told_by_their_exact_class() -> None:
    class Own(nn.ReLU):
        pass

    assert activation_of(Own()) == activation_of(None) == NONE
    assert activation_of(nn.ReLU6()) == activation_of(nn.Hardtanh(0.0, 6.0)) == KINDS[2]
    assert str(activation_of(nn.LeakyReLU(0.25))) == "leaky ReLU(0.25)" and not NONE and RELU
