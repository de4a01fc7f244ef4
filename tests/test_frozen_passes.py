"""The single passes of gradient skipping, the routines it chooses, and both ways into the op."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from test_isa import child
from torch.utils.flop_counter import FlopCounterMode

from opentrans_kernels import dispatch
from opentrans_kernels.ops import folded_conv2d as module
from opentrans_kernels.ops.avg_pool2d import avg_pool2d_backward
from opentrans_kernels.ops.folded_conv2d import folded_conv2d
from opentrans_kernels.ops.folded_conv2d.convolution import convolve, input_gradient
from opentrans_kernels.ops.folded_conv2d.fold import Norm
from opentrans_kernels.ops.library import plane_padded
from opentrans_kernels.ops.relu_bits import relu_bits_, relu_bits_backward

LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}
# Channels that are a multiple of a vector and others, planes with and without a rest.
SHAPES = ((2, 8, 5, 7), (2, 5, 3, 3), (1, 16, 4, 4), (1, 1, 1, 1), (1, 8, 200, 190), (0, 3, 2, 2))


def rand(shape: tuple[int, ...], channels_last: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    found = torch.randn(shape, generator=generator)
    return found.contiguous(memory_format=LAYOUTS[channels_last])


def test_avg_pool2d_backward_has_both_rows() -> None:
    rows = {row.backend for row in dispatch.TABLE if row.op == "avg_pool2d_backward"}
    assert rows == {"cpu", "reference"}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("channels_last", "bits"), list(product((False, True), (False, True))))
def test_the_forward_pass_with_scale_and_shift(backend, channels_last, bits, set_env) -> None:
    set_env(OPENTRANS_BACKEND=backend)
    for shape in SHAPES:
        z, residual = rand(shape, channels_last), rand(shape, channels_last) + 0.1
        scale, shift = rand((shape[1],)), rand((shape[1],)) * 2
        for extra, factor, summand in product((None, residual), (None, scale), (None, shift)):
            want = z.double()
            want = want if factor is None else want * factor.double().view(1, -1, 1, 1)
            want = want if summand is None else want + summand.double().view(1, -1, 1, 1)
            want = (want if extra is None else want + extra.double()).relu()
            y = z.clone(memory_format=torch.preserve_format)
            found = relu_bits_(y, extra, channels_last, scale=factor, shift=summand, bits=bits)
            assert torch.allclose(y.double(), want, rtol=1e-6, atol=1e-6)
            if bits and y.numel():
                back, _ = relu_bits_backward(torch.ones_like(y), found, channels_last)
                assert torch.equal(back != 0, y > 0)
            elif y.numel():
                assert found.numel() == 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_backward_pass_selects_and_scales(backend, channels_last, set_env, poison) -> None:
    set_env(OPENTRANS_BACKEND=backend)
    for shape in SHAPES:
        y, grad = rand(shape, channels_last), rand(shape, channels_last) + 0.3
        scale = rand((shape[1],)) + 2
        bits = relu_bits_(y, None, channels_last)
        if y.numel() > 8:
            grad[y == 0] = float("inf")  # selected, not multiplied: nothing of it may come through
        want = torch.where(y <= 0, 0.0, grad)
        for kept in ({"bits": bits}, {"bits": None, "y": y}):
            plain, scaled = relu_bits_backward(grad, kept["bits"], channels_last,
                                               y=kept.get("y"), scale=scale)  # fmt: skip
            assert torch.equal(plain, want)
            assert torch.allclose(scaled, want * scale.view(1, -1, 1, 1))
            only, none = relu_bits_backward(grad, kept["bits"], channels_last, y=kept.get("y"))
            assert torch.equal(only, want) and none is None
            none, only = relu_bits_backward(grad, kept["bits"], channels_last, y=kept.get("y"),
                                            scale=scale, plain=False)  # fmt: skip
            assert none is None and torch.equal(only, scaled)


def test_wrong_arguments_of_the_compiled_passes_are_refused(extension) -> None:
    z, channels = rand((1, 3, 4, 4)), rand((3,))
    forward, backward = (
        torch.ops.opentrans_kernels.relu_bits,
        torch.ops.opentrans_kernels.relu_bits_backward,
    )
    with pytest.raises(RuntimeError, match="float32 CPU tensor of 3 elements"):
        forward(z, channels[:2], None, None, True, False)
    with pytest.raises(RuntimeError, match="residual must have the shape"):
        forward(z, None, None, rand((1, 2, 4, 4)), True, False)
    bits, out = torch.zeros(3, 2, dtype=torch.uint8), torch.empty_like(z)
    with pytest.raises(RuntimeError, match="either bits or y"):
        backward(z, bits, z, None, out, None, False)
    with pytest.raises(RuntimeError, match="belong together"):
        backward(z, bits, None, channels, out, None, False)
    with pytest.raises(RuntimeError, match="do not belong to this activation"):
        backward(z, bits[:2], None, None, out, None, False)
    with pytest.raises(RuntimeError, match="not the gradient of a 2x2 pooling"):
        torch.ops.opentrans_kernels.avg_pool2d_backward(z, out, 2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_avg_pool2d_backward(backend, k, set_env, poison) -> None:
    set_env(OPENTRANS_BACKEND=backend)
    for size in ((2, 3, 6, 6), (1, 2, 7, 5), (2, 1, 3, 44), (0, 2, 4, 4)):
        x = rand(size).requires_grad_()
        y = F.avg_pool2d(x, k)
        g = rand(tuple(y.shape))
        want = torch.autograd.grad(y, x, g)[0]
        assert torch.allclose(avg_pool2d_backward(g, size, k), want, rtol=1e-6, atol=0)
        padded = plane_padded(g, *g.shape).copy_(g)
        assert torch.allclose(avg_pool2d_backward(padded, size, k), want, rtol=1e-6, atol=0)


def every_pass() -> list[torch.Tensor]:
    """Results of the compiled passes on every shape, in an order of its own."""
    found: list[torch.Tensor | None] = []
    for shape, channels_last in product(SHAPES, (False, True)):
        residual, grad = rand(shape, channels_last) + 0.1, rand(shape, channels_last) - 0.2
        scale, shift = rand((shape[1],)), rand((shape[1],)) * 2
        for factor in (None, scale):
            y = rand(shape, channels_last)
            bits = relu_bits_(y, residual, channels_last, scale=factor, shift=shift)
            found += [y, bits]
            for kept, output in ((bits, None), (None, y)):
                found += relu_bits_backward(grad, kept, channels_last, y=output, scale=factor)
    for k in (2, 3):
        found.append(avg_pool2d_backward(rand((2, 3, 20, 45 // k)), (2, 3, 20 * k + 1, 45), k))
    return [t for t in found if t is not None]


def test_the_loops_without_vectors_agree_to_the_bit(extension, tmp_path) -> None:
    target = tmp_path / "generic.pt"
    done = child(
        f"""
        import torch
        from opentrans_kernels import native
        from test_frozen_passes import every_pass
        torch.save(every_pass(), {str(target)!r})
        print(native.cpu_capability())
        """,
        "generic",
    )
    assert done.stdout.strip() == "generic", done.stderr[-2000:]
    other, ours = torch.load(target, weights_only=True), every_pass()
    assert len(other) == len(ours) == 122
    for plain, vector in zip(other, ours, strict=True):
        assert torch.equal(plain, vector)


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_routine_computes_the_same_convolution(channels_last) -> None:
    # Sides on both sides of each limit of the choice, batches of one and more.
    for n, side in product((1, 3), (1, 7, 14, 29)):
        x, weight = rand((n, 6, side, side), channels_last), rand((9, 6, 1, 1))
        bias, g = rand((9,)), rand((n, 9, side, side), channels_last)
        geometry = ((1, 1), (0, 0), (1, 1), 1, channels_last)
        y = convolve(x, weight, bias, *geometry)
        want = F.conv2d(x.double(), weight.double(), bias.double())
        assert torch.allclose(y.double(), want, rtol=1e-5, atol=1e-5)
        dx = input_gradient(g, weight, list(x.shape), *geometry)
        want = F.conv_transpose2d(g.double(), weight.double())
        assert torch.allclose(dx.double(), want, rtol=1e-5, atol=1e-5)


def arguments(trains: bool, affine: bool) -> tuple[torch.Tensor, torch.Tensor, Norm, torch.Tensor]:
    x, weight = rand((2, 3, 6, 5)).requires_grad_(), rand((8, 3, 3, 3)).requires_grad_(trains)
    gamma, beta = (rand((8,)).add(1).requires_grad_(affine) for _ in range(2))
    norm = Norm(None, gamma, beta, rand((8,)), rand((8,)).abs() + 0.5, 1e-5)
    return x, weight, norm, rand((2, 8, 6, 5)).requires_grad_()


@pytest.mark.parametrize(("trains", "affine"), [(False, False), (True, False), (True, True)])
def test_without_a_watcher_the_dispatcher_is_left_out(trains, affine, monkeypatch) -> None:
    x, weight, norm, residual = arguments(trains, affine)
    inputs = [t for t in (x, weight, norm.gamma, norm.beta, residual) if t.requires_grad]
    results = []
    for watched in (False, True):
        monkeypatch.setattr(module, "_somebody_watches", lambda x, watched=watched: watched)
        y = folded_conv2d(x, weight, norm, residual, relu=True, padding=(1, 1))
        assert ("_Eager" in type(y.grad_fn).__name__) is not watched
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_counters_and_compilers_see_the_op() -> None:
    x, weight, norm, residual = arguments(True, False)
    with FlopCounterMode(display=False) as counter:
        y = folded_conv2d(x, weight, norm, residual, relu=True, padding=(1, 1))
    assert "_Eager" not in type(y.grad_fn).__name__ and counter.get_total_flops() > 0
    assert not module._somebody_watches(x)


def test_scales_written_without_a_version_counter_are_seen() -> None:
    x, weight, norm, _ = arguments(True, True)
    first = folded_conv2d(x, weight, norm, padding=(1, 1))
    norm.gamma.data.mul_(2)  # as older optimizers write
    norm.beta.data.mul_(2)
    mean = norm.mean.clone()
    norm.mean.zero_()
    second = folded_conv2d(x, weight, norm, padding=(1, 1))
    z = F.conv2d(x, weight, None, 1, 1)
    want = F.batch_norm(z, norm.mean, norm.var, norm.gamma, norm.beta, False, 0.0, 1e-5)
    assert torch.allclose(second, want, atol=1e-5) and not torch.allclose(first, second)
    norm.mean.copy_(mean)


@pytest.mark.parametrize("smallest", [0.0, 1e-14, 1e-3])
def test_gamma_near_zero_keeps_its_gradient(smallest) -> None:
    x, weight, norm, _ = arguments(True, True)
    with torch.no_grad():
        norm.gamma[2] = smallest
    y = folded_conv2d(x, weight, norm, padding=(1, 1))
    g = rand(tuple(y.shape))
    found = torch.autograd.grad(y, (weight, norm.gamma), g)
    exact = [t.detach().double() for t in (x, weight, norm.gamma, norm.beta)]
    for t in exact[1:3]:
        t.requires_grad_()
    z = F.conv2d(exact[0], exact[1], None, 1, 1)
    want = F.batch_norm(
        z, norm.mean.double(), norm.var.double(), exact[2], exact[3], False, 0.0, 1e-5
    )
    for ours, true in zip(found, torch.autograd.grad(want, exact[1:3], g.double()), strict=True):
        assert torch.allclose(ours.double(), true, rtol=1e-4, atol=1e-4)
