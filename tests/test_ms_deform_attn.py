"""Deformable attention: the reference against ``grid_sample``, the kernels against both."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from deform_cases import (
    LEVELS,
    as_double,
    boxes_and_offsets,
    make,
    sampled,
    sweep,
)
from torch.utils.flop_counter import FlopCounterMode

import opentrans_kernels as otk
from opentrans_kernels import ops
from opentrans_kernels.errors import KernelUnavailable, UnsupportedModelError
from opentrans_kernels.ops.ms_deform_attn import reference as plain
from opentrans_kernels.ops.ms_deform_attn.points import attention_of, locations_of

NATIVE = torch.ops.opentrans_kernels
OP = NATIVE.ms_deform_attn.default
BACKWARD = NATIVE.ms_deform_attn_backward.default


def away_from_knots(locations: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
    """Locations moved to where the cell between the pixels is the same after rounding."""
    size = shapes.flip(1).clamp(min=1)[:, None].to(locations)
    at = locations * size - 0.5
    fraction = (at - at.floor()).clamp(0.05, 0.95)
    return (at.floor() + fraction + 0.5) / size


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_the_reference_is_what_grid_sample_computes(levels) -> None:
    arguments = make(levels, dtype=torch.float64)
    torch.testing.assert_close(
        plain.ms_deform_attn(*arguments), sampled(*arguments), rtol=1e-12, atol=1e-12
    )


def test_the_reference_passes_gradcheck() -> None:
    value, shapes, locations, weights = make(n=1, m=2, d=3, q=3, p=2, dtype=torch.float64)
    locations = away_from_knots(locations, shapes)
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    torch.autograd.gradcheck(lambda v, at, w: plain.ms_deform_attn(v, shapes, at, w), leaves)
    torch.autograd.gradcheck(lambda v, at, w: ops.ms_deform_attn(v, shapes, at, w), leaves)


@pytest.mark.parametrize("size", (2, 4))
def test_offsets_and_logits_pass_gradcheck(size: int) -> None:
    value, shapes, locations, logits = make(n=1, m=2, d=2, q=2, p=2, dtype=torch.float64)
    reference, offsets = boxes_and_offsets(locations, shapes, size)
    leaves = [t.requires_grad_() for t in (value, offsets, logits, reference)]

    def run(v, o, w, r):
        return ops.ms_deform_attn(v, shapes, o, w, reference=r)

    torch.autograd.gradcheck(run, leaves, eps=1e-7)


def test_every_form_against_the_oracle(extension: None, poison: None) -> None:
    assert sweep() >= 60


def test_results_do_not_depend_on_threads_or_batch(extension: None) -> None:
    arguments = make([(9, 8), (4, 5)], n=3, m=3, d=32, q=600)
    value, shapes, locations, weights = arguments
    grad = torch.randn(3, 600, 96)
    once = ops.ms_deform_attn(*arguments)
    back = BACKWARD(grad, *arguments)
    for threads in (1, 2, 3, 5, 16):
        torch.set_num_threads(threads)
        assert torch.equal(ops.ms_deform_attn(*arguments), once), threads
        found = BACKWARD(grad, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, back, strict=True)), threads
        alone = [
            ops.ms_deform_attn(value[i : i + 1], shapes, locations[i : i + 1], weights[i : i + 1])
            for i in range(3)
        ]
        assert torch.equal(torch.cat(alone), once)


@pytest.mark.parametrize("d", (1, 7, 32, 72))
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_gradients_are_those_of_the_reference(extension: None, poison: None, levels, d) -> None:
    value, shapes, locations, weights = make(levels, d=d, q=11)
    locations = away_from_knots(locations, shapes)
    arguments = (value, shapes, locations, weights)
    grad = torch.randn(2, 11, 3 * d)
    exact = plain.ms_deform_attn_backward(*as_double(grad, *arguments))
    dense = plain.ms_deform_attn_backward(grad, *arguments)
    for found, rough, right in zip(BACKWARD(grad, *arguments), dense, exact, strict=True):
        assert found.shape == right.shape
        top = right.abs().max() if right.numel() else 0.0
        bound = 2 * (rough - right).abs().max() + 1e-6 * top if right.numel() else 0.0
        assert right.numel() == 0 or (found - right).abs().max() <= bound


@pytest.mark.parametrize("size", (2, 4))
def test_gradients_through_offsets(extension: None, size: int) -> None:
    value, shapes, locations, logits = make(q=9, d=32)
    reference, offsets = boxes_and_offsets(locations, shapes, size)
    leaves = (value, offsets, logits, reference)

    def gradients(dtype):
        own = [t.to(dtype).requires_grad_() for t in leaves]
        v, o, w, r = own
        where = locations_of(o, r, shapes)
        out = (
            ops.ms_deform_attn(v, shapes, o, w, reference=r)
            if dtype == torch.float32
            else plain.ms_deform_attn(v, shapes, where, attention_of(w))
        )
        return torch.autograd.grad(out.cos().sum(), own)

    for found, right in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert (found - right).abs().max() <= 2e-4 * right.abs().max()


def test_a_point_that_is_no_number_or_far_away_adds_nothing(extension: None) -> None:
    value, shapes, locations, weights = make([(6, 5), (5, 6)], q=5, d=32)
    value[:, 0] = float("inf")  # the corner that a clamped index would reach
    value[:, -1] = float("nan")
    locations = locations.clamp(0.3, 0.7)
    odd = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0]
    for number in odd:
        there = locations.clone()
        there[:, :, :, :, 1, 0] = number
        # Even with a weight that is no number.
        given = weights.clone()
        given[:, :, :, :, 1] = float("nan")
        left_out = weights.clone()
        left_out[:, :, :, :, 1] = 0
        for run in (ops.ms_deform_attn, plain.ms_deform_attn):
            without = run(value, shapes, locations, left_out)
            found = run(value, shapes, there, given)
            assert found.isfinite().all()
            torch.testing.assert_close(found, without, rtol=1e-5, atol=1e-6, equal_nan=True)
        finite = value.nan_to_num(0, 0, 0)
        grads = BACKWARD(torch.ones(2, 5, 96), finite, shapes, there, given)
        assert all(g.isfinite().all() for g in grads)
        assert not grads[1][:, :, :, :, 1].any() and not grads[2][:, :, :, :, 1].any()


@pytest.mark.parametrize("logit", (float("nan"), float("inf"), -float("inf")))
def test_odd_logits_give_what_softmax_gives(extension: None, logit: float) -> None:
    value, shapes, locations, logits = make(q=4, d=8)
    reference, offsets = boxes_and_offsets(locations, shapes, 2)
    logits[0, 1, 2, 0, 1] = logit
    logits[1, 0, 0] = -float("inf")
    logits[1, 1, 1] = 300 * torch.arange(-6.0, 6).view(3, 4)
    out = ops.ms_deform_attn(value, shapes, offsets, logits, reference=reference)
    where = locations_of(offsets, reference, shapes)
    weights = attention_of(logits)
    right = plain.ms_deform_attn(value, shapes, where, weights)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_inputs_of_any_strides(extension: None) -> None:
    value, shapes, locations, weights = make(d=32)
    once = ops.ms_deform_attn(value, shapes, locations, weights)
    head_first = value.transpose(1, 2).contiguous().transpose(1, 2)
    channels_first = value.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    wide = torch.cat((locations.flatten(3), weights.flatten(3)), -1)
    views = (
        (head_first, locations, weights),
        (channels_first, locations, weights),
        (
            value,
            wide[..., :24].unflatten(-1, (3, 4, 2)),
            wide[..., 24:].unflatten(-1, (3, 4)),
        ),
        (value, locations.flip(-1).flip(-1), weights.transpose(3, 4).contiguous().transpose(3, 4)),
    )
    for v, at, w in views:
        assert torch.equal(ops.ms_deform_attn(v, shapes, at, w), once)
    before = [t.clone() for t in (value, locations, weights)]
    ops.ms_deform_attn(value, shapes, locations, weights)
    assert all(torch.equal(a, b) for a, b in zip(before, (value, locations, weights), strict=True))
    one = locations[:1, :, :1]
    spread = (value[:1].expand(2, -1, -1, -1), one.expand(2, -1, 3, -1, -1, -1))
    same = ops.ms_deform_attn(spread[0], shapes, spread[1], weights)
    assert torch.equal(
        same, ops.ms_deform_attn(spread[0].clone(), shapes, spread[1].clone(), weights)
    )


def test_half_precision_is_computed_in_float32(extension: None) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        value, shapes, locations, weights = make(d=32)
        half = [t.to(dtype) for t in (value, locations, weights)]
        out = ops.ms_deform_attn(half[0], shapes, half[1], half[2])
        exact = ops.ms_deform_attn(half[0].float(), shapes, half[1].float(), half[2].float())
        assert out.dtype == dtype and torch.equal(out, exact.to(dtype))
        leaf = half[0].clone().requires_grad_()
        ops.ms_deform_attn(leaf, shapes, half[1], half[2]).float().sum().backward()
        assert leaf.grad is not None and leaf.grad.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        found = OP(half[0], shapes, half[1], half[2])
    assert found.dtype == torch.float32 and torch.equal(found, exact)
    with torch.autocast("cpu", torch.bfloat16):  # projections in half, points in float32
        mixed = ops.ms_deform_attn(half[0], shapes, half[1].float(), half[2])
    assert mixed.dtype == torch.float32 and torch.equal(mixed, exact)


@pytest.mark.parametrize("with_reference", (False, True))
def test_opcheck(extension: None, with_reference: bool) -> None:
    value, shapes, locations, weights = make(q=3, d=4)
    reference = None
    if with_reference:
        reference, locations = boxes_and_offsets(locations, shapes, 2)
    for grad in (False, True):
        arguments = [value, shapes, locations, weights, reference]
        if grad:
            arguments = [
                t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
                for t in arguments
            ]
        torch.library.opcheck(OP, tuple(arguments))
    grad = torch.randn(2, 3, 12)
    torch.library.opcheck(BACKWARD, (grad, value, shapes, locations, weights))


def test_compiles_into_one_graph(extension: None) -> None:
    value, shapes, locations, weights = make(q=6, d=8)
    value.requires_grad_()
    run = torch.compile(
        lambda v, at, w: otk.ms_deform_attn(v.relu(), shapes, at, w).cos(), fullgraph=True
    )
    out = run(value, locations, weights)
    eager = otk.ms_deform_attn(value.relu(), shapes, locations, weights).cos()
    torch.testing.assert_close(out, eager)
    (found,) = torch.autograd.grad(out.sum(), value)
    (right,) = torch.autograd.grad(eager.sum(), value)
    torch.testing.assert_close(found, right)


def test_flops_are_counted() -> None:
    arguments = make(n=2, m=3, d=5, q=7, p=4)
    with FlopCounterMode(display=False) as counter:
        OP(*arguments)
    assert counter.get_total_flops() == 2 * 4 * 2 * 7 * 3 * 3 * 4 * 5


def test_memory_outside_the_tensors_is_not_touched(extension: None) -> None:
    """Every input ends where a page begins that may not be read."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)

    def guarded(t: torch.Tensor) -> torch.Tensor:
        size = -(-t.numel() * t.element_size() // page) * page
        area = mmap.mmap(-1, size + page)
        at = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert libc.mprotect(ctypes.c_void_p(at + size), page, 0) == 0
        flat = torch.frombuffer(
            area, dtype=t.dtype, count=t.numel(), offset=size - t.numel() * t.element_size()
        )
        keep.append(area)
        return flat.view(t.shape).copy_(t)

    for d in (1, 5, 32, 33):
        keep: list = []
        arguments = make(d=d, q=5, m=2)
        inputs = [guarded(t) for t in arguments]
        assert torch.equal(ops.ms_deform_attn(*inputs), ops.ms_deform_attn(*arguments))
        grad = torch.randn(2, 5, 2 * d)
        found, right = BACKWARD(guarded(grad), *inputs), BACKWARD(grad, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def bad_calls() -> dict[str, tuple]:
    value, shapes, locations, weights = make()
    reference, offsets = boxes_and_offsets(locations, shapes, 2)
    good = (value, shapes, locations, weights, None)

    def changed(place: int, new) -> tuple:
        return (*good[:place], new, *good[place + 1 :])

    return {
        "pixels": changed(1, torch.tensor([(6, 5), (3, 4), (1, 3)])),
        "have": changed(1, torch.tensor([(6, 5), (3, 4), (-1, -2)])),
        "spatial_shapes": changed(1, torch.tensor([6, 5])),
        r"\[L, 2\]": changed(1, torch.tensor([(6.0, 5), (3, 4), (1, 2)])),
        r"locations must be": changed(2, locations[:, :, :2]),
        "2 levels": changed(1, shapes[:2]),
        "weights must be": changed(3, weights[..., :3]),
        "locations is torch.float64": changed(2, locations.double()),
        "weights is torch.bfloat16": changed(3, weights.bfloat16()),
        "value must be": changed(0, value.flatten(2)),
        "reference must be": (value, shapes, offsets, weights, reference[..., :1]),
        "reference is": (value, shapes, offsets, weights, reference.double()),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_arguments_are_named(message: str) -> None:
    *arguments, reference = bad_calls()[message]
    with pytest.raises(RuntimeError, match=message):
        ops.ms_deform_attn(*arguments, reference=reference)


def test_the_operator_itself_refuses_them_too(extension: None) -> None:
    for message, arguments in bad_calls().items():
        with pytest.raises(RuntimeError):
            print(message, OP(*arguments).shape)
    value, _, locations, weights = make()
    huge = torch.tensor([(2**40, 2**40), (3, 4), (1, 2)])
    with pytest.raises(RuntimeError, match="level 0"):
        OP(value, huge, locations, weights)
    with pytest.raises(RuntimeError, match="grad"):
        BACKWARD(torch.randn(2, 7, 14), *make())


def test_what_has_no_kernel_or_derivative_is_refused() -> None:
    value, shapes, locations, weights = make()
    with pytest.raises(KernelUnavailable, match="int32"):
        ops.ms_deform_attn(value.int(), shapes, locations.int(), weights.int())
    with pytest.raises(UnsupportedModelError, match="backward"):
        torch.func.grad(lambda v: ops.ms_deform_attn(v, shapes, locations, weights).sum())(value)
    value.requires_grad_()
    out = ops.ms_deform_attn(value, shapes, locations, weights)
    with pytest.raises(UnsupportedModelError, match="gradient of the gradient"):
        torch.autograd.grad(out.sum(), value, create_graph=True)


def test_shapes_may_be_a_list_of_pairs(extension: None) -> None:
    value, shapes, locations, weights = make()
    once = otk.ms_deform_attn(value, shapes, locations, weights)
    pairs = [tuple(pair) for pair in shapes.tolist()]
    assert torch.equal(otk.ms_deform_attn(value, pairs, locations, weights), once)
    assert torch.equal(otk.ms_deform_attn(value, shapes.int(), locations, weights), once)
