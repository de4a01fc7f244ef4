"""Deformable attention in Triton: interpreted against the oracle, and compiled ahead of time."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deform_cases import LEVELS, as_double, assert_as_exact, boxes_and_offsets, make
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_tools import CAPABILITIES, Compiled, Interpreter, compile_for, why_no_triton

from opentrans_kernels import dispatch, ops
from opentrans_kernels.errors import KernelUnavailable, PlanError
from opentrans_kernels.ops.ms_deform_attn import reference as plain
from opentrans_kernels.ops.ms_deform_attn.points import attention_of, locations_of

MODULE = "opentrans_kernels.ops.ms_deform_attn.triton"
FORWARD, BACKWARD = f"{MODULE}:ms_deform_attn", f"{MODULE}:ms_deform_attn_backward"

#: Of ``deform_cases.make``.
CASES: dict[str, dict[str, Any]] = {
    "three levels": dict(levels=LEVELS[0], n=2, m=3, d=5, q=2, p=2),
    "one level, a whole vector": dict(levels=LEVELS[1], n=1, m=1, d=32, q=5),
    "empty levels": dict(levels=LEVELS[2], n=1, m=2, d=16, q=3, p=2),
    "one pixel": dict(levels=LEVELS[3], n=1, m=2, d=64, q=2, p=1),
    "nine points, one channel": dict(levels=LEVELS[1], n=1, m=2, d=1, q=3, p=9),
    "batch 0": dict(n=0, d=32),
    "no queries": dict(q=0, d=32),
    "no points": dict(p=0, d=8),
}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def away_from_knots(locations: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
    """Locations moved to where the cell between the pixels is the same after rounding."""
    size = shapes.flip(1).clamp(min=1)[:, None].to(locations)
    at = locations * size - 0.5
    return (at.floor() + (at - at.floor()).clamp(0.05, 0.95) + 0.5) / size


def near(found: torch.Tensor, right: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert found.shape == right.shape
    if right.numel():
        error = (found.double() - right).abs().max()
        assert error <= tolerance * right.abs().max() + 1e-30, float(error)


@pytest.mark.parametrize("name", CASES)
def test_sampling_and_its_gradients(interpreter: Interpreter, name: str) -> None:
    value, shapes, locations, weights = make(**CASES[name])
    arguments = (value, shapes, away_from_knots(locations, shapes), weights)
    assert_as_exact(interpreter(FORWARD, *arguments), *arguments)
    n, q, m = weights.shape[:3]
    grad = torch.randn(n, q, m * value.shape[3])
    exact = plain.ms_deform_attn_backward(*as_double(grad, *arguments))
    for found, right in zip(interpreter(BACKWARD, grad, *arguments), exact, strict=True):
        near(found, right)


@pytest.mark.parametrize("size", (2, 4))
@pytest.mark.parametrize("p", (4, 9))
def test_offsets_and_logits(interpreter: Interpreter, size: int, p: int) -> None:
    value, shapes, locations, logits = make(LEVELS[3], q=2, m=2, d=8, n=1, p=p)
    reference, offsets = boxes_and_offsets(locations, shapes, size)
    out = interpreter(FORWARD, value, shapes, offsets, 5 * logits, reference)
    near(out, plain.ms_deform_attn(*as_double(value, shapes, offsets, 5 * logits, reference)), 2e-5)


@pytest.mark.parametrize("size", (2, 4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_gradients_through_offsets(interpreter: Interpreter, size: int, dtype: torch.dtype) -> None:
    """In half the locations are made of it in float32, as the forward does."""
    value, shapes, locations, logits = make([(40, 60), (3, 4)], q=2, m=2, d=8, n=1, p=2)
    reference, offsets = boxes_and_offsets(locations, shapes, size)
    leaves = [t.to(dtype) for t in (value, offsets, logits, reference)]
    exact = [t.double().requires_grad_() for t in leaves]
    v, o, w, r = exact
    out = plain.ms_deform_attn(v, shapes, locations_of(o, r, shapes), attention_of(w))
    grad = torch.randn(out.shape).to(dtype)
    right = torch.autograd.grad(out, exact, grad.double())
    v, o, w, r = leaves
    found = interpreter("triton_targets:deform_gradients", grad, v, shapes, o, w, r)
    assert found[1] is None
    for one, wanted in zip((found[0], *found[2:]), right, strict=True):
        assert one.dtype == dtype
        near(one, wanted, 2e-4 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_half_precision_is_read_directly_and_summed_in_float32(
    interpreter: Interpreter, dtype: torch.dtype
) -> None:
    value, shapes, locations, weights = make(LEVELS[3], q=3, m=2, d=32, p=2)
    arguments = [t.to(dtype) for t in (value, locations, weights)]
    arguments.insert(1, shapes)
    out = interpreter(FORWARD, *arguments)
    assert out.dtype == dtype
    near(out, plain.ms_deform_attn(*as_double(*arguments)), TOLERANCE[dtype])
    grad = torch.randn(out.shape).to(dtype)
    arguments[2] = away_from_knots(arguments[2].float(), shapes)  # each tensor its own dtype
    exact = plain.ms_deform_attn_backward(*as_double(grad, *arguments))
    for found, right in zip(interpreter(BACKWARD, grad, *arguments), exact, strict=True):
        near(found, right, TOLERANCE[dtype])


def test_a_point_that_is_no_number_or_far_away_adds_nothing(interpreter: Interpreter) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0])
    value, shapes, locations, weights = make([(6, 5), (5, 6)], q=len(odd), m=2, d=8, n=1, p=2)
    value[:, 0], value[:, -1] = float("inf"), float("nan")  # what a clamped index would reach
    locations = locations.clamp(0.3, 0.7)
    there, given, left_out = locations.clone(), weights.clone(), weights.clone()
    there[:, :, :, :, 1, 0] = odd.view(-1, 1, 1)
    given[:, :, :, :, 1] = float("nan")  # even with a weight that is no number
    left_out[:, :, :, :, 1] = 0
    found = interpreter(FORWARD, value, shapes, there, given)
    assert found.isfinite().all()
    near(found, plain.ms_deform_attn(*as_double(value, shapes, locations, left_out)))
    finite = value.nan_to_num(0, 0, 0)
    grads = interpreter(BACKWARD, torch.ones(found.shape), finite, shapes, there, given)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][:, :, :, :, 1].any() and not grads[2][:, :, :, :, 1].any()


def test_odd_logits_give_what_softmax_gives(interpreter: Interpreter) -> None:
    value, shapes, locations, logits = make(q=4, m=3, d=8, n=2)
    reference, offsets = boxes_and_offsets(locations, shapes, 2)
    for at, logit in enumerate((float("nan"), float("inf"), -float("inf"))):
        logits[0, 1, at, 0, 1] = logit
    logits[1, 0, 0] = -float("inf")
    logits[1, 1, 1] = 300 * torch.arange(-6.0, 6).view(3, 4)
    offsets[1, 0, 0] = 1e9  # no weight, and no point either: zero, not NaN
    out = interpreter(FORWARD, value, shapes, offsets, logits, reference)
    right = plain.ms_deform_attn(value, shapes, offsets, logits, reference)
    assert not right[1, 0, :8].any() and right.isnan().any()
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_inputs_of_any_strides(interpreter: Interpreter) -> None:
    value, shapes, locations, weights = make(LEVELS[3], q=2, m=2, d=8, n=1, p=2)
    grad = torch.ones(1, 2, 16)
    once = interpreter(FORWARD, value, shapes, locations, weights)
    grads = interpreter(BACKWARD, grad, value, shapes, locations, weights)
    wide = torch.cat((locations.flatten(3), weights.flatten(3)), -1)
    views = (
        (value.transpose(1, 2).contiguous().transpose(1, 2), locations, weights),
        (value.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), locations, weights),
        (value, wide[..., :8].unflatten(-1, (2, 2, 2)), wide[..., 8:].unflatten(-1, (2, 2))),
        (value, locations, weights.transpose(3, 4).contiguous().transpose(3, 4)),
    )
    for v, at, w in views:
        assert torch.equal(interpreter(FORWARD, v, shapes, at, w), once)
        again = interpreter(BACKWARD, grad, v, shapes, at, w)
        assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


def test_wrong_sizes_never_lead_outside_value(interpreter: Interpreter) -> None:
    """The host does not read them on a device; what lies around value here is NaN."""
    value, _, locations, weights = make([(6, 5), (3, 4)], q=4, m=2, d=4, n=2, p=2)
    for wrong in ([(60, 50), (3, 4)], [(-6, 5), (9, 9)], [(2**40, 1), (2**30 + 1, 2**30)]):
        shapes = torch.tensor(wrong)
        out, grad = interpreter("triton_targets:guarded_deform", value, shapes, locations, weights)
        assert out.isfinite().all() and grad.isfinite().all(), wrong


def test_more_than_the_kernel_takes_is_refused(interpreter: Interpreter) -> None:
    value, shapes, locations, weights = make(d=8)
    with pytest.raises(RuntimeError, match=f"{PlanError.__name__}: ms_deform_attn: .* channels"):
        interpreter(FORWARD, value[..., :1].expand(-1, -1, -1, 9000), shapes, locations, weights)


def test_deterministic_algorithms_refuse_the_atomics() -> None:
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    backward = importlib.import_module(MODULE).ms_deform_attn_backward
    arguments = make(q=0, d=4)  # nothing to launch
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(KernelUnavailable, match="OPENTRANS_BACKEND=reference"):
            backward(torch.ones(2, 0, 12), *arguments)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="atomics"):
            backward(torch.ones(2, 0, 12), *arguments)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reference", (False, True))
def test_the_operator_reaches_autograd_on_cuda(
    monkeypatch: pytest.MonkeyPatch, reference: bool
) -> None:
    """Shapes alone: what a tracer sees of CUDA tensors, where there is no device."""
    dispatch._resolve.cache_clear()
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    package = importlib.import_module("opentrans_kernels.ops.ms_deform_attn")
    parts = make(d=8)
    given = boxes_and_offsets(parts[2], parts[1], 4)[0] if reference else None
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            value, locations, weights = (
                torch.empty(t.shape, device="cuda", dtype=dtype, requires_grad=True)
                for t in (parts[0], parts[2], parts[3])
            )
            shapes = torch.empty(3, 2, device="cuda", dtype=torch.int64)
            if given is not None:
                given = torch.empty(given.shape, device="cuda", dtype=dtype, requires_grad=True)
            out = ops.ms_deform_attn(value, shapes, locations, weights, reference=given)
            assert out.shape == (2, 7, 24) and out.dtype == dtype and out.grad_fn is not None
            with torch.no_grad():  # torch's engine asks the device itself
                saved = SimpleNamespace(saved_tensors=(value, shapes, locations, weights, given))
                grads = package._backward(saved, torch.empty_like(out))
            for t, grad in zip((value, shapes, locations, weights, given), grads, strict=True):
                known = t is not None and t is not shapes
                assert (grad.shape, grad.dtype) == (t.shape, dtype) if known else grad is None
    key = torch._C._dispatch_has_kernel_for_dispatch_key
    assert key("opentrans_kernels::ms_deform_attn", "AutocastCUDA")
    dispatch._resolve.cache_clear()


def test_cuda_takes_the_triton_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, backend in ((True, "triton"), (False, "reference")):
        dispatch._resolve.cache_clear()
        monkeypatch.setattr(dispatch, "_has_triton", lambda there=there: there)
        for op in ("ms_deform_attn", "ms_deform_attn_backward"):
            assert dispatch._resolve(op, "cuda", "float32", "auto").row.backend == backend
            assert dispatch._resolve(op, "cuda", "float64", "auto").row.backend == "reference"
    dispatch._resolve.cache_clear()


COUNTS = ("rows", "queries", "heads", "pixels", "levels", "channels")
STRIDES = ("value_n", "value_s", "value_m", "locations_n", "locations_q", "locations_m",
           "weights_n", "weights_q", "weights_m")  # fmt: skip


def compiled(capability: int, dtype: str, d: int, reference: int | None) -> Compiled:
    """Compiled for a head of d channels and four points a level; None: the backward."""
    from opentrans_kernels.ops.ms_deform_attn import triton as kernels

    backward = reference is None
    tile, warps = kernels._BACKWARD if backward else kernels._FUSED if reference else kernels._PLAIN
    of_dtype = ["value", "locations", "weights"]
    of_dtype += ["grad", "grad_locations", "grad_weights"] if backward else ["reference", "out"]
    types = dict.fromkeys(of_dtype, f"*{dtype}") | {"shapes": "*i64"}
    types |= dict.fromkeys((*COUNTS, *STRIDES), "i32")
    constants = dict(value_d=1, POINTS=4, BQ=tile // d, BD=d)
    if backward:
        types |= {"grad_value": "*fp32", "pitch": "i32"}
    else:
        constants |= dict(REFERENCE=reference, WRITTEN_OUT=True)
    return compile_for(
        kernels.scatter_kernel if backward else kernels.sample_kernel, capability, types,
        constants, num_warps=warps,
        aligned=("channels", *STRIDES, *(("pitch",) if backward else ())),
    )  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_without_spills(capability: int) -> None:
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    for reference in (0, 2):
        one = compiled(capability, "fp32", 32, reference)
        assert one.stack == 0 and one.registers <= 128 and one.shared <= 4096
        assert one.count(r"ld\.global\S*\.v4") >= 16, "channels are not read 16 bytes at a time"
        assert one.count(r"bar\.sync") == 0 and one.atomics == 0
        assert one.count(r"fma\.rn\.f32") > 0
    back = compiled(capability, "fp32", 32, None)
    assert back.stack == 0 and back.registers <= 168
    # Four channels an instruction from Hopper on.
    assert back.count(r"\b(?:atom|red)\.\S*add\S*\.f32") == (4 if capability >= 90 else 16)
    assert back.atomics == (4 if capability >= 90 else 16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_device(name: str) -> None:
    value, shapes, locations, weights = make(**CASES[name])
    arguments = (value, shapes, away_from_knots(locations, shapes), weights)
    there = [t.cuda() for t in arguments]
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in there]
    out = ops.ms_deform_attn(*leaves)
    assert_as_exact(out.detach().cpu(), *arguments)
    grad = torch.randn(out.shape)
    found = torch.autograd.grad(
        out, [leaves[0], leaves[2], leaves[3]], grad.cuda(), allow_unused=True
    )
    exact = plain.ms_deform_attn_backward(*as_double(grad, *arguments))
    for one, right in zip(found, exact, strict=True):
        near(one.cpu(), right)
