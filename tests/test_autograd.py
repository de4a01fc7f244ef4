"""Gradients: the reference by finite differences, the compiled kernels against float64 autograd."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import fresh_process
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import EPSILON, bottleneck_parts, layouts, masked_weight

from opentrans_kernels import ops
from opentrans_kernels.errors import PlanError, UnsupportedModelError
from opentrans_kernels.pack import SparseWeight

GEOMETRIES = [(k, s, p) for k in (1, 3) for s in (1, 2) for p in (0, 1)] + [(1, 1, 2), (3, 2, 3)]


def dense_gradients(packed, x, residual, relu, grad, dtype):
    """Autograd of the masked dense convolution; the weight's gradient at the nonzeros."""
    x = x.detach().to(dtype).requires_grad_()
    weight = packed.to_dense().detach().to(dtype).requires_grad_()
    bias = packed.bias.detach().to(dtype).requires_grad_()
    leaves = [x, weight, bias]
    y = F.conv2d(x, weight, bias, packed.stride, packed.padding)
    if residual is not None:
        leaves.append(residual.detach().to(dtype).requires_grad_())
        y = y + leaves[-1]
    y = y.relu() if relu else y
    found = list(torch.autograd.grad(y, leaves, grad.to(dtype)))
    found[1] = found[1].flatten()[packed.indices()]
    return found


def sparse_gradients(packed, x, residual, relu, grad):
    x = x.detach().requires_grad_()
    values = packed.values.detach().clone().requires_grad_()
    bias = packed.bias.detach().clone().requires_grad_()
    leaves = [x, values, bias]
    if residual is not None:
        leaves.append(residual.detach().requires_grad_())
    trained = dataclasses.replace(packed, values=values, bias=bias)
    y = ops.sparse_conv2d(x, trained, leaves[3] if residual is not None else None, relu)
    return list(torch.autograd.grad(y, leaves, grad))


def assert_gradients(packed, x, residual, relu, what) -> None:
    out = ops.sparse_conv2d(x, packed, residual, relu)
    grad = torch.randn(out.shape)
    found = sparse_gradients(packed, x, residual, relu, grad)
    exact = dense_gradients(packed, x, residual, relu, grad, torch.float64)
    dense = dense_gradients(packed, x, residual, relu, grad, torch.float32)
    for name, a, b, c in zip(
        ("x", "values", "bias", "residual"), found, exact, dense, strict=False
    ):
        assert a.shape == b.shape and a.dtype == torch.float32, (what, name)
        if not b.numel():
            continue
        error, own = (a - b).abs().max().item(), (c - b).abs().max().item()
        allowed = 2 * own + 8 * EPSILON * b.abs().max().item()
        assert error <= allowed, f"{what} {name}: error {error:.3g}, dense float32 {own:.3g}"


@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients_of_the_compiled_kernels(extension: None, geometry, relu: bool) -> None:
    kernel, stride, padding = geometry
    for index, (cin, cout, density) in enumerate(
        ((1, 1, 1.0), (3, 7, 0.5), (7, 65, 0.1), (65, 7, 0.1), (64, 64, 0.01), (7, 3, 0.0))
    ):
        weight = masked_weight(cout, cin, kernel, density, index)
        packed = SparseWeight.from_dense(weight, torch.randn(cout), stride, padding)
        for n, h, w in ((1, 3, 3), (2, 7, 6), (3, 4, 13)):
            x = torch.randn(n, cin, h, w)
            shape = F.conv2d(x, weight, None, stride, padding).shape
            residual = torch.randn(shape) if index % 2 else None
            assert_gradients(packed, x, residual, relu, (geometry, cin, cout, density, h, w))


def test_gradients_of_other_layouts_and_blockings(extension: None) -> None:
    for chunk, row_block in ((1, 1), (3, 4), (None, None)):
        packed = SparseWeight.from_dense(
            masked_weight(9, 7, 3, 0.4), torch.randn(9), 1, 1, chunk=chunk, row_block=row_block
        )
        for name, x in layouts(torch.randn(2, 7, 5, 6)):
            assert_gradients(packed, x, torch.randn(2, 9, 5, 6), True, (name, chunk))


def test_gradients_arrive_in_any_layout(extension: None) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), None, 2, 1)
    x = torch.randn(2, 7, 6, 7)
    grad = torch.randn(ops.sparse_conv2d(x, packed).shape)
    plain = sparse_gradients(packed, x, None, False, grad)
    expanded = torch.randn(()).expand(grad.shape)
    for name, other in layouts(grad):
        for a, b in zip(sparse_gradients(packed, x, None, False, other), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
    by_stride_zero = sparse_gradients(packed, x, None, False, expanded)
    by_copy = sparse_gradients(packed, x, None, False, expanded.contiguous())
    for a, b in zip(by_stride_zero, by_copy, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_input_as_residual_gets_both_gradients(extension: None) -> None:
    packed = SparseWeight.from_dense(masked_weight(7, 7, 3, 0.4), None, 1, 1)
    x = torch.randn(2, 7, 5, 6, requires_grad=True)
    ops.sparse_conv2d(x, packed, x, True).square().sum().backward()
    leaf = x.detach().double().requires_grad_()
    y = F.conv2d(leaf, packed.to_dense().double(), None, 1, 1) + leaf
    y.relu().square().sum().backward()
    torch.testing.assert_close(x.grad.double(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_relu_passes_nan_gradients_as_torch_does(extension: None) -> None:
    packed = SparseWeight.from_dense(torch.eye(3).view(3, 3, 1, 1))
    x = torch.tensor([-1.0, 0.0, 2.0, float("nan")]).repeat(3, 1).view(1, 3, 1, 4)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ops.sparse_conv2d(ours, packed, None, True).sum().backward()
    theirs.relu().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_only_what_is_asked_for_is_differentiated(extension: None) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 1, 1)
    x = torch.randn(2, 7, 5, 6)
    assert not ops.sparse_conv2d(x, packed).requires_grad
    for field in ("values", "bias"):
        leaf = getattr(packed, field).clone().requires_grad_()
        trained = dataclasses.replace(packed, **{field: leaf})
        with torch.no_grad():
            assert not ops.sparse_conv2d(x, trained).requires_grad
        ops.sparse_conv2d(x, trained).sum().backward()
        assert leaf.grad.shape == leaf.shape and leaf.grad.abs().sum() > 0


def test_batch_zero_has_zero_gradients(extension: None) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 1, 1)
    found = sparse_gradients(packed, torch.zeros(0, 7, 5, 5), None, True, torch.zeros(0, 9, 5, 5))
    assert found[0].shape == (0, 7, 5, 5)
    assert not found[1].any() and not found[2].any()


def test_training_the_values_lowers_the_loss_and_keeps_the_mask(extension: None) -> None:
    weight = masked_weight(9, 7, 3, 0.3)
    packed = SparseWeight.from_dense(weight, torch.zeros(9), 1, 1)
    values = packed.values.clone().requires_grad_()
    x, target = torch.randn(4, 7, 8, 8), torch.randn(4, 9, 8, 8)
    losses = []
    optimizer = torch.optim.SGD([values], lr=0.1)
    for _ in range(20):
        out = ops.sparse_conv2d(x, dataclasses.replace(packed, values=values))
        losses.append(F.mse_loss(out, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not packed.to_dense(values.detach())[weight == 0].any()


@pytest.mark.parametrize("k", (1, 2, 3))
def test_gradients_of_pooling(extension: None, k: int) -> None:
    for h, w in ((6, 6), (7, 5), (3, 8)):
        x = torch.randn(2, 3, h, w, requires_grad=True)
        grad = torch.randn(2, 3, h // k, w // k)
        (found,) = torch.autograd.grad(ops.avg_pool2d(x, k), x, grad)
        (exact,) = torch.autograd.grad(F.avg_pool2d(x, k), x, grad)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)


def test_the_fused_block_refuses_gradients_with_the_fix(extension: None) -> None:
    _, packs = bottleneck_parts(6, 5, 6, 0.5, True)
    x = torch.randn(1, 6, 8, 8, requires_grad=True)
    with torch.no_grad():
        assert not ops.sparse_bottleneck(x, *packs).requires_grad
    with pytest.raises(PlanError, match=r"no_grad\(\), or chain sparse_conv2d"):
        ops.sparse_bottleneck(x, *packs).sum().backward()


@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradcheck_of_the_reference(set_env, geometry, relu: bool) -> None:
    set_env(OPENTRANS_BACKEND="reference")
    kernel, stride, padding = geometry
    packed = SparseWeight.from_dense(masked_weight(3, 2, kernel, 0.6), None, stride, padding)
    double = {"dtype": torch.float64, "requires_grad": True}
    x = torch.randn(2, 2, 4, 5, **double)
    values, bias = torch.randn(packed.nnz, **double), torch.randn(3, **double)
    shape = F.conv2d(x, packed.to_dense().double(), None, stride, padding).shape
    residual = torch.randn(shape, **double)

    def run(x, values, bias, residual):
        trained = dataclasses.replace(packed, values=values, bias=bias)
        return ops.sparse_conv2d(x, trained, residual, relu)

    assert torch.autograd.gradcheck(run, (x, values, bias, residual))


WITHOUT = """
import dataclasses, torch
from opentrans_kernels import native
native.load = lambda: False
native.reason = lambda: "left out"
from kernel_cases import dense_conv, masked_weight
from opentrans_kernels import ops
from opentrans_kernels.pack import SparseWeight
assert ops.scratch_bytes() == 0 and ops.release_memory() is None
packed = SparseWeight.from_dense(masked_weight(4, 3, 3, 0.6), torch.randn(4), 2, 1)
x = torch.randn(2, 3, 7, 6, requires_grad=True)
weight = packed.to_dense().detach().requires_grad_()
y = dense_conv(x, weight, packed.bias, 2, 1, None, True, torch.float32)
exact = torch.autograd.grad(y.square().sum(), (x, weight))
values = packed.values.clone().requires_grad_()
registered = torch.ops.opentrans_kernels.sparse_conv2d.default
trained = dataclasses.replace(packed, values=values)
for y in (
    ops.sparse_conv2d(x, trained, None, True),
    registered(x, packed.structure, values, packed.bias, None, 4, 3, 2, 1, True),
):
    grad_x, grad_values = torch.autograd.grad(y.square().sum(), (x, values))
    torch.testing.assert_close(grad_x, exact[0])
    torch.testing.assert_close(grad_values, exact[1].flatten()[packed.indices()])
print("same")
"""


def test_gradients_without_the_extension() -> None:
    """Both the reference and the registered op, which then runs on the reference, train."""
    folder = Path(__file__).parent
    environ = os.environ | {"PYTHONPATH": str(folder)}
    done = fresh_process.run(WITHOUT, environment=environ)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_gradcheck_of_reference_pooling(set_env) -> None:
    set_env(OPENTRANS_BACKEND="reference")
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.avg_pool2d(x, 2), x)


def test_other_derivatives_are_refused_not_zero(extension: None) -> None:
    """torch gives an op without a formula for them a derivative of zero."""
    packed = SparseWeight.from_dense(masked_weight(7, 7, 3, 0.4), None, 1, 1)
    packs = bottleneck_parts(7, 5, 7, 0.5, False)[1]
    x = torch.randn(2, 7, 5, 6)
    calls = (
        lambda t: ops.sparse_conv2d(t, packed),
        lambda t: ops.avg_pool2d(t, 2),
        lambda t: ops.max_pool2d(t, 2),
        lambda t: ops.window_avg_pool2d(t, 2),
        lambda t: ops.sparse_bottleneck(t, *packs),
    )
    for call in calls:
        with pytest.raises(UnsupportedModelError, match="ordinary backward only"):
            torch.func.jvp(call, (x,), (x,))
        with pytest.raises(UnsupportedModelError, match="ordinary backward only"):
            torch.func.grad(lambda t, call=call: call(t).sum())(x)
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(UnsupportedModelError, match="forward-mode"),
        ):
            call(torch.autograd.forward_ad.make_dual(x, x))
        assert call(x).isfinite().all()


def test_an_activation_may_follow_in_place(extension: None) -> None:
    weight = torch.randn(6, 5, 3, 3) * (torch.rand(6, 5, 3, 3) < 0.4)
    packed = SparseWeight.from_dense(weight, None, 1, 1)
    x = torch.randn(1, 5, 9, 9, requires_grad=True)
    own = x.detach().clone().requires_grad_()
    F.relu(ops.sparse_conv2d(x, packed), inplace=True).sum().backward()
    F.conv2d(own, weight, None, 1, 1).relu().sum().backward()
    torch.testing.assert_close(x.grad, own.grad, rtol=1e-4, atol=1e-5)
    assert not ops.sparse_conv2d(x.detach(), packed)._is_view()
