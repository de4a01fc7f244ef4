"""Pools of any windows: bits of the maxima, errors of the means, layout, gradients, compilers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import assert_within, layouts

from opentrans_kernels import dispatch, native, ops
from opentrans_kernels.ops.library import plane_stride

NATIVE = torch.ops.opentrans_kernels
OPS = ("max_pool2d", "window_avg_pool2d")
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
#: Window, stride, padding.
STEM = (3, 2, 1)
GEOMETRIES = (
    STEM, (2, 2, 0), (3, 1, 1), (1, 1, 0), (2, 1, 1), (5, 3, 2), (3, 5, 0), (9, 2, 4), (4, 4, 1),
    ((3, 2), (2, 1), (1, 0)), ((1, 7), (4, 2), (0, 3)), ((6, 1), (1, 9), (3, 0)),
)  # fmt: skip
SIZES = tuple(product((1, 2, 5, 8, 17), (1, 3, 7, 16, 33)))


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, set_env: Callable) -> str:
    if request.param == "cpu" and not native.load():
        pytest.skip(str(native.reason()))
    set_env(OPENTRANS_BACKEND=request.param)
    return request.param


def numbers(*shape: int) -> torch.Tensor:
    """Numbers with many ties, zeros of both signs, infinities, and NaNs of different bits."""
    made = torch.Generator().manual_seed(shape[-1])
    x = torch.randint(-3, 3, shape, generator=made) / 4.0
    kind = torch.rand(shape, generator=made)
    x[kind < 0.1] = -0.0
    x[(kind > 0.8) & (kind < 0.85)] = float("-inf")
    x[(kind > 0.85) & (kind < 0.87)] = float("inf")
    bits = x.view(torch.int32)
    nan = torch.randint(0x7FC00000, 0x7FC00100, shape, generator=made, dtype=torch.int32)
    bits[kind > 0.95] = nan[kind > 0.95]
    return x


def same_bits(found: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(found.contiguous().view(torch.int32), want.contiguous().view(torch.int32))


def answers(call: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    try:
        return call()
    except RuntimeError:
        return None


def test_maxima_have_torchs_bits(backend: str) -> None:
    checked = 0
    for geometry, ceil, (h, w) in product(GEOMETRIES, (False, True), SIZES):
        x = numbers(2, 3, h, w)
        found = answers(lambda g=geometry, c=ceil, x=x: ops.max_pool2d(x, *g, c))
        want = answers(lambda g=geometry, c=ceil, x=x: F.max_pool2d(x, *g, 1, c))
        what = (geometry, ceil, h, w)
        assert (found is None) == (want is None), what
        if want is not None and found is not None:
            assert same_bits(found, want), what
            checked += 1
    assert checked > 400


def test_means_err_no_more_than_torchs(backend: str) -> None:
    rest = tuple(product((False, True), (False, True), (None, 3, -2)))
    checked = 0
    for index, (geometry, (h, w)) in enumerate(product(GEOMETRIES, SIZES)):
        for options in rest[index % 3 :: 3]:
            x = torch.randn(2, 3, h, w)
            found = answers(lambda: ops.window_avg_pool2d(x, *geometry, *options))  # noqa: B023
            dense = answers(lambda: F.avg_pool2d(x, *geometry, *options))  # noqa: B023
            what = (geometry, options, h, w)
            assert (found is None) == (dense is None), what
            if dense is not None and found is not None:
                exact = F.avg_pool2d(x.double(), *geometry, *options)
                assert_within(found, exact, dense, what)
                checked += 1
    assert checked > 800


def test_any_layout_and_an_empty_batch(backend: str) -> None:
    for h, w in ((9, 7), (16, 33), (1, 1)):
        x = numbers(2, 5, h, w)
        plain = ops.max_pool2d(x, *STEM)
        mean = ops.window_avg_pool2d(x.nan_to_num(0, 1, -1), *STEM)
        size = ((h - 1) // 2 + 1, (w - 1) // 2 + 1)
        assert plain.shape[2:] == size
        for name, other in layouts(x):
            before = other.clone()
            found = ops.max_pool2d(other, *STEM)
            assert same_bits(found, plain) and same_bits(other, before), name
            assert found.stride()[1:] == (plane_stride(size[0] * size[1]), size[1], 1), name
        for name, other in layouts(x.nan_to_num(0, 1, -1)):  # NaN behind the pixels of some
            assert torch.equal(ops.window_avg_pool2d(other, *STEM), mean), name
    for op in OPS:
        assert getattr(ops, op)(torch.zeros(0, 5, 9, 7), *STEM).shape == (0, 5, 5, 4)
        assert getattr(ops, op)(torch.zeros(2, 0, 9, 7), *STEM).shape == (2, 0, 5, 4)


@pytest.mark.parametrize("op", OPS)
def test_lanes_behind_the_planes_are_zero(extension: None, poison: None, op: str) -> None:
    out = getattr(ops, op)(torch.randn(2, 3, 9, 11), *STEM)
    plane = out.stride(1)
    behind = out.as_strided((2, 3, 32 - 30), (3 * plane, plane, 1), 30)
    assert not behind.any() and out.isfinite().all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((torch.zeros(1, 2, 3, 5), 4), "3x5 .*too small for a 4x4"),
        ((torch.zeros(1, 2, 0, 5), 2, 1, 1), "0x5 .*too small"),
        ((torch.zeros(1, 2, 3, 5), 3, 1, 2), "at most half the window.*padding 2"),
        ((torch.zeros(1, 2, 3, 5), 3, 0), "stride 0"),
        ((torch.zeros(1, 2, 3, 5), 0), "window 0"),
        ((torch.zeros(1, 2, 3, 5), 3, 2**15 + 1), "stride 32769"),
        ((torch.zeros(2, 3, 5), 2), "four dimensions|dim 3"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(backend: str, op: str, given, said) -> None:
    with pytest.raises(RuntimeError, match=said):
        getattr(ops, op)(*given)
    x, window, stride, padding = (*given, 1, 0)[:4]
    rest = (False,) if op == "max_pool2d" else (False, True, 0)
    with pytest.raises(RuntimeError, match=said):
        getattr(NATIVE, op)(x, [window] * 2, [stride] * 2, [padding] * 2, *rest)


@pytest.mark.parametrize("op", OPS)
def test_odd_arguments_are_refused(backend: str, op: str) -> None:
    x = torch.zeros(1, 2, 5, 5)
    for window in ((1, 2, 3), (2,), 2.5, "ab"):
        with pytest.raises(RuntimeError, match="window must be a whole number"):
            getattr(ops, op)(x, window)
    rest = (False,) if op == "max_pool2d" else (False, True, 0)
    with pytest.raises(RuntimeError, match="two numbers each"):
        getattr(NATIVE, op)(x, [2], [2, 2], [0, 0], *rest)
    if op == "window_avg_pool2d":
        with pytest.raises(RuntimeError, match="divisor_override is 0"):
            ops.window_avg_pool2d(x, 2, divisor_override=0)


def test_threads_do_not_change_a_bit(extension: None) -> None:
    x, before = torch.randn(2, 7, 37, 41), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append([getattr(ops, op)(x, *STEM) for op in OPS])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[0], strict=True))


def calls() -> Iterator[tuple[str, Callable, Callable]]:
    """Name, ours, torch's."""
    for geometry in (STEM, (3, 1, 1), ((2, 3), (1, 2), (0, 1))):
        for ceil in (False, True):
            yield (
                f"max {geometry} {ceil}",
                lambda x, g=geometry, c=ceil: ops.max_pool2d(x, *g, c),
                lambda x, g=geometry, c=ceil: F.max_pool2d(x, *g, 1, c),
            )
            for rest in ((True, None), (False, None), (True, 5)):
                yield (
                    f"mean {geometry} {ceil} {rest}",
                    lambda x, g=geometry, c=ceil, r=rest: ops.window_avg_pool2d(x, *g, c, *r),
                    lambda x, g=geometry, c=ceil, r=rest: F.avg_pool2d(x, *g, c, *r),
                )


def test_gradients_are_torchs(backend: str) -> None:
    tied = (torch.randint(-2, 3, (2, 3, 9, 8)) / 2).requires_grad_()
    for name, ours, theirs in calls():
        grad = torch.randn_like(theirs(tied))
        (found,) = torch.autograd.grad(ours(tied), tied, grad)
        (want,) = torch.autograd.grad(theirs(tied), tied, grad)
        assert torch.allclose(found, want, rtol=1e-6, atol=1e-6), name
    empty = torch.zeros(0, 3, 9, 8, requires_grad=True)
    for op in OPS:
        (found,) = torch.autograd.grad(getattr(ops, op)(empty, *STEM).sum(), empty)
        assert found.shape == empty.shape


def test_gradcheck_of_the_references(set_env: Callable) -> None:
    set_env(OPENTRANS_BACKEND="reference")
    # Numbers so far apart that no step of the check makes another one the largest.
    x = torch.randperm(80, dtype=torch.float64).view(2, 2, 5, 4).requires_grad_()
    for op in OPS:
        assert torch.autograd.gradcheck(lambda x, op=op: getattr(ops, op)(x, *STEM), x), op


@pytest.mark.parametrize("op", OPS)
def test_opcheck_and_fakes(extension: None, op: str) -> None:
    rest = (False,) if op == "max_pool2d" else (True, False, 0)
    for leaf in (torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8, requires_grad=True)):
        given = (leaf, [3, 2], [2, 1], [1, 0], *rest)
        torch.library.opcheck(getattr(NATIVE, op).default, given, test_utils=QUICK)


@pytest.mark.parametrize("op", OPS)
def test_compiled_without_graph_breaks_and_with_a_dynamic_batch(extension: None, op: str) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return getattr(ops, op)(x.sin(), 3, 2, 1, True).flatten(2) + 1

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for size in ((2, 3, 9, 8), (1, 3, 9, 8), (5, 3, 12, 7)):
            x = torch.randn(size)
            assert torch.equal(compiled(x), run(x))


@pytest.mark.parametrize("op", OPS)
def test_autocast_computes_in_float32(backend: str, op: str) -> None:
    x = torch.randn(2, 3, 7, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = getattr(ops, op)(x, *STEM)
    assert found.dtype == torch.float32 and torch.equal(found, getattr(ops, op)(x.float(), *STEM))


@pytest.mark.parametrize("op", OPS)
def test_both_rows_are_in_the_table(op: str) -> None:
    assert {row.backend for row in dispatch.TABLE if row.op == op} == {"cpu", "reference"}
