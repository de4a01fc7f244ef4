"""The ops of gradient skipping: values, gradients, what they keep, contracts."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from gradskip_nets import saved_bytes
from torch import nn

from opentrans_kernels import dispatch
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.ops.folded_conv2d import folded_bytes, folded_conv2d
from opentrans_kernels.ops.folded_conv2d.average import mean_pool2d
from opentrans_kernels.ops.folded_conv2d.fold import Norm
from opentrans_kernels.ops.library import plane_padded
from opentrans_kernels.ops.relu_bits import bits_shape, relu_bits_, relu_bits_backward
from opentrans_kernels.ops.relu_bits.add_relu import add_relu

LAYOUTS = (torch.contiguous_format, torch.channels_last)
ROWS = ("frozen", "trains", "affine")  # of the table in docs/training.md


class Case:
    """One convolution with its norm, in the kernels' op and in plain PyTorch."""

    def __init__(self, row: str, kernel: int, residual: bool, layout, dtype, stride=1, size=(5, 6)):
        gen = torch.Generator().manual_seed(3)

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

        self.geometry = {"stride": (stride,) * 2, "padding": (kernel // 2,) * 2}
        self.weight = rand(4, 3, kernel, kernel)
        self.gamma, self.beta, self.mean = rand(4), rand(4), rand(4)
        self.gamma[1] = 0.0  # where a formula that divides by gamma breaks
        self.var = rand(4).abs() + 0.5
        self.weight.requires_grad_(row != "frozen")
        self.gamma.requires_grad_(row == "affine")
        self.beta.requires_grad_(row == "affine")
        self.x = rand(2, 3, *size).contiguous(memory_format=layout).requires_grad_()
        shape = F.conv2d(self.x, self.weight, None, **self.geometry).shape
        self.residual = None
        if residual:
            self.residual = rand(*shape).contiguous(memory_format=layout).requires_grad_()
        self.g = rand(*shape)

    def inputs(self) -> list[torch.Tensor]:
        every = (self.x, self.weight, self.gamma, self.beta, self.residual)
        return [t for t in every if t is not None and t.requires_grad]

    def ours(self, relu: bool = True, bits: bool = True) -> torch.Tensor:
        norm = Norm(None, self.gamma, self.beta, self.mean, self.var, 1e-3)
        return folded_conv2d(
            self.x, self.weight, norm, self.residual, relu=relu, bits=bits, **self.geometry
        )

    def plain(self, relu: bool = True, dtype: torch.dtype | None = None) -> torch.Tensor:
        z = F.conv2d(self.x, self.weight, None, **self.geometry)
        z = F.batch_norm(z, self.mean, self.var, self.gamma, self.beta, False, 0.0, 1e-3)
        z = z if self.residual is None else z + self.residual
        return z.relu() if relu else z

    def double(self) -> Case:
        twin = copy.copy(self)
        for key, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(twin, key, value.detach().double().requires_grad_(value.requires_grad))
        return twin


CASES = list(product(ROWS, (1, 3), (False, True), LAYOUTS))


@pytest.mark.parametrize(("row", "kernel", "residual", "layout"), CASES)
@pytest.mark.parametrize("bits", [True, False])
def test_gradcheck_of_every_row(row, kernel, residual, layout, bits) -> None:
    case = Case(row, kernel, residual, layout, torch.float64, size=(4, 3))
    inputs = case.inputs()

    def run(*_: torch.Tensor) -> torch.Tensor:
        return case.ours(bits=bits)

    assert torch.autograd.gradcheck(run, inputs, check_undefined_grad=False)


@pytest.mark.parametrize(("row", "kernel", "residual", "layout"), CASES)
def test_error_is_at_most_twice_pytorchs_own(row, kernel, residual, layout) -> None:
    case = Case(row, kernel, residual, layout, torch.float32, size=(13, 9))
    exact = case.double()
    results = []
    for subject, call in ((case, case.ours), (case, case.plain), (exact, exact.plain)):
        y = call()
        grads = torch.autograd.grad(y, subject.inputs(), subject.g)
        results.append([y.detach(), *grads])
    for found, own, want in zip(*results, strict=True):
        assert found.shape == want.shape and found.dtype == torch.float32
        scale = want.abs().max().clamp_min(1e-30)
        error, yardstick = ((t.double() - want).abs().max() / scale for t in (found, own))
        assert error <= max(2 * yardstick, 1e-6), f"{error:.1e} against {yardstick:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_strides_sizes_and_layout_of_the_input_gradient(kernel, stride, layout) -> None:
    for size in ((7, 11), (8, 6), (5, 5)):
        case = Case("frozen", kernel, False, layout, torch.float64, stride, size)
        found = torch.autograd.grad(case.ours(), case.x, case.g)[0]
        want = torch.autograd.grad(case.plain(), case.x, case.g)[0]
        assert torch.allclose(found, want, rtol=1e-12, atol=1e-12)
        assert found.stride() == case.x.stride(), "the gradient has the input's layout"


def test_groups_and_dilation() -> None:
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    geometry = {"padding": (2, 1), "dilation": (2, 1), "groups": 2, "stride": (2, 1)}
    none = Norm(torch.randn(6, dtype=torch.float64), None, None, None, None, 0.0)
    y = folded_conv2d(x, weight, none, **geometry)
    want = F.conv2d(x, weight, none.bias, **geometry)
    g = torch.randn_like(want)
    assert torch.allclose(y, want)
    assert torch.allclose(*(torch.autograd.grad(t, x, g)[0] for t in (y, want)))


@pytest.mark.parametrize("row", ROWS)
def test_batch_of_zero_images(row) -> None:
    case = Case(row, 3, True, torch.contiguous_format, torch.float32)
    x = torch.empty(0, 3, 5, 6, requires_grad=True)
    norm = Norm(None, case.gamma, case.beta, case.mean, case.var, 1e-3)
    y = folded_conv2d(x, case.weight, norm, torch.empty(0, 4, 5, 6), relu=True, padding=(1, 1))
    assert y.shape == (0, 4, 5, 6)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    if row != "frozen":
        assert not case.weight.grad.any()


def test_frozen_keeps_bits_only_and_a_trained_weight_its_input() -> None:
    for row, bits, whole in (("frozen", True, 0), ("frozen", False, 1), ("trains", True, 1)):
        case = Case(row, 3, False, torch.contiguous_format, torch.float32, size=(16, 8))
        holder = nn.Module()
        for key in ("weight", "gamma", "beta", "mean", "var"):
            holder.register_buffer(key, getattr(case, key))
        found = saved_bytes(holder, lambda case=case, bits=bits: case.ours(bits=bits))
        output, image = 2 * 4 * 16 * 8 * 4, 2 * 3 * 16 * 8 * 4
        expected = (output // 32 if bits else output) + (image if row == "trains" else 0)
        assert found == expected, (row, bits, whole)


def test_the_folded_copy_follows_the_weight() -> None:
    case = Case("frozen", 3, False, torch.contiguous_format, torch.float32)
    first = case.ours().detach()
    assert folded_bytes(case.weight) > 0
    copies = folded_bytes(case.weight)
    case.ours()
    assert folded_bytes(case.weight) == copies, "the same copy serves again"
    case.weight.mul_(2.0)
    assert torch.allclose(case.ours(), case.plain(), atol=1e-5)
    case.beta.add_(1.0)
    assert torch.allclose(case.ours(), case.plain(), atol=1e-5)
    assert not torch.allclose(case.ours(), first)
    y = case.ours()
    case.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused_with_the_fix() -> None:
    case = Case("frozen", 3, False, torch.contiguous_format, torch.float64)
    with pytest.raises(OpenTransError, match="create_graph=False"):
        torch.autograd.grad(case.ours().sum(), case.x, create_graph=True)
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    with pytest.raises(OpenTransError, match="create_graph=False"):
        torch.autograd.grad(add_relu(z).sum(), z, create_graph=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_relu_bits(backend, dtype, channels_last, set_env, poison) -> None:
    set_env(OPENTRANS_BACKEND=backend)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for shape in ((2, 3, 5, 7), (1, 1, 1, 1), (3, 8, 4, 4), (2, 5, 1, 9), (0, 2, 3, 3)):
        z = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        residual = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        if z.numel() > 8:
            z.view(-1) if z.is_contiguous() else None
            z[0, 0, 0, 0] = float("nan")
            z[-1, -1, -1, -1], residual[-1, -1, -1, -1] = 0.0, 0.0
        want = (z + residual).relu()
        y = z.clone(memory_format=torch.preserve_format)
        bits = relu_bits_(y, residual, channels_last)
        assert bits.shape == bits_shape(torch.Size(shape), channels_last)
        assert torch.equal(y.isnan(), want.isnan()) and torch.equal(
            y.nan_to_num(), want.nan_to_num()
        )
        grad = torch.full(shape, float("inf")).to(dtype).contiguous(memory_format=layout)
        found = relu_bits_backward(grad, bits, channels_last)[0]
        assert torch.equal(found, torch.where(want <= 0, 0.0, grad.double()).to(dtype))


def test_relu_bits_of_padded_planes(extension) -> None:
    like = torch.empty(0)
    for h, w in ((7, 7), (5, 3), (14, 14)):
        z = plane_padded(like, 2, 3, h, w).copy_(torch.randn(2, 3, h, w))
        plain = z.contiguous().clone()
        assert not z.is_contiguous()
        bits, same = relu_bits_(z, None, False), relu_bits_(plain, None, False)
        assert torch.equal(z, plain) and torch.equal(bits, same)
        grad = torch.randn(2, 3, h, w)
        padded = plane_padded(like, 2, 3, h, w).copy_(grad)
        found = relu_bits_backward(padded, bits, False)[0]
        assert torch.equal(found, relu_bits_backward(grad, bits, False)[0])
        behind = found.as_strided((2, 3, 1), (*found.stride()[:2], 1), h * w)
        assert not behind.any(), "lanes behind a plane are cleared"


def test_relu_bits_on_two_threads_agree(extension) -> None:
    z = torch.randn(2, 3, 301, 127)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = z.clone()
        results.append((relu_bits_(y, None, False), y))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_both_rows_of_the_table_exist() -> None:
    for op in ("relu_bits", "relu_bits_backward"):
        assert {row.backend for row in dispatch.TABLE if row.op == op} == {"cpu", "reference"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_mean_pool2d(k, layout) -> None:
    for size in ((6, 6), (7, 5), (3, 4)):
        x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout)
        x.requires_grad_()
        y, want = mean_pool2d(x, k), F.avg_pool2d(x, k)
        g = torch.randn_like(want)
        assert torch.equal(y, want) and y.stride() == want.stride()
        assert torch.equal(*(torch.autograd.grad(t, x, g)[0] for t in (y, want)))
        assert saved_bytes(nn.Module(), lambda x=x: mean_pool2d(x, k)) == 0


def test_add_relu() -> None:
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    for bits in (True, False):
        assert torch.autograd.gradcheck(lambda a, b, bits=bits: add_relu(a, b, bits), (z, residual))
        assert torch.equal(add_relu(z, residual, bits), (z + residual).relu())
    assert saved_bytes(nn.Module(), lambda: add_relu(z, residual)) == 2 * 3 * 3


@pytest.mark.parametrize("row", ROWS)
def test_opcheck(row) -> None:
    case = Case(row, 3, True, torch.contiguous_format, torch.float32)
    ops = torch.ops.opentrans_kernels
    norm = (None, case.gamma, case.beta, case.mean, case.var)
    geometry = (1e-3, [1, 1], [1, 1], [1, 1], 1)
    arguments = (case.x, case.weight, *norm, case.residual, *geometry, row == "frozen", True, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.folded_conv2d.default, arguments, test_utils=checks)
    z, bits = torch.randn(1, 3, 4, 4), torch.zeros(3, 2, dtype=torch.uint8)
    channels = torch.randn(3)
    torch.library.opcheck(
        ops.relu_bits.default, (z, channels, channels, None, True, False), test_utils=checks[::2]
    )
    torch.library.opcheck(
        ops.relu_bits_backward.default,
        (z, bits, None, channels, torch.empty_like(z), torch.empty_like(z), False),
        test_utils=checks[::2],
    )
    torch.library.opcheck(ops.mean_pool2d.default, (z.requires_grad_(), 2), test_utils=checks)
    torch.library.opcheck(ops.add_relu.default, (z, None, True), test_utils=checks)
