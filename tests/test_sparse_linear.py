"""``sparse_linear`` and ``sparse_mlp``: values, layouts, gradients, and as torch sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import assert_within, masked_weight
from linear_cases import (
    ACTIVATIONS,
    GELU,
    assert_linear,
    assert_mlp,
    dense_linear,
    guarded_inputs,
    layer,
    sweep,
)
from test_isa import ALL, child, supported
from torch.utils.flop_counter import FlopCounterMode

from opentrans_kernels import dispatch, native, ops
from opentrans_kernels.activations import NONE
from opentrans_kernels.errors import KernelUnavailable, OpenTransError, UnsupportedModelError
from opentrans_kernels.pack import SparseWeight

NATIVE = torch.ops.opentrans_kernels
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
OPS = ("sparse_linear", "sparse_mlp")
ROWS = [row.backend for row in dispatch.TABLE if row.op == "sparse_linear"]


@pytest.fixture(params=ROWS)
def backend(request: pytest.FixtureRequest, set_env: Callable) -> str:
    if request.param == "cpu" and not native.load():
        pytest.skip(str(native.reason()))
    set_env(OPENTRANS_BACKEND=request.param)
    assert all(dispatch.resolve(op).row.backend == request.param for op in OPS)
    return request.param


def token_layouts(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The same ``[batch, tokens, channels]`` through other strides; NaN wherever nothing is."""
    n, t, c = x.shape
    yield "contiguous", x.clone()
    yield "tokens first", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "channels first", x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((n, t, c + 3), float("nan"))
    wide[..., 1 : c + 1] = x
    yield "sliced channels", wide[..., 1 : c + 1]
    more = torch.full((n, t + 2, c), float("nan"))
    more[:, 1 : t + 1] = x
    yield "sliced tokens", more[:, 1 : t + 1]
    steps = torch.full((n, t, 2 * c), float("nan"))
    steps[..., ::2] = x
    yield "every other channel", steps[..., ::2]


def test_every_width_and_number_of_tokens(backend: str) -> None:
    assert sweep() >= 300


def test_tokens_and_residuals_end_at_a_page(extension: None) -> None:
    assert guarded_inputs() >= 15


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_every_activation_also_far_from_zero(backend: str, act) -> None:
    weight, bias, packed = layer(7, 9, 0.6)
    second = layer(9, 5, 0.6, 1)
    for scale in (0.01, 1.0, 30.0):
        x, residual = scale * torch.randn(3, 11, 7), scale * torch.randn(3, 11, 9)
        out = ops.sparse_linear(x, packed, residual, act)
        assert_linear(out, x, weight, bias, residual, act, (str(act), scale))
        extra = torch.randn(3, 11, 5)
        out = ops.sparse_mlp(x, packed, second[2], act, extra)
        assert_mlp(out, x, (weight, bias), second[:2], extra, act, (str(act), scale))


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_activations_keep_nan(backend: str, act) -> None:
    packed = SparseWeight.from_dense(torch.ones(1, 1, 1, 1))
    x = torch.tensor([[float("nan")], [1.0], [-1.0]])
    found = ops.sparse_linear(x, packed, None, act)
    assert found.isnan().flatten().tolist() == [True, False, False]


def test_layouts_batches_and_residuals(backend: str) -> None:
    weight, bias, packed = layer(19, 23, 0.4)
    square, square_bias, same = layer(19, 19, 0.4, 3)
    x, residual = torch.randn(3, 5, 19), torch.randn(3, 5, 23)
    second = layer(23, 19, 0.4)[2]
    alone = ops.sparse_linear(x, packed, residual, GELU)
    assert_linear(alone, x, weight, bias, residual, GELU)
    same_bits = torch.equal if backend == "cpu" else torch.allclose  # a BLAS sums in its own order
    for (what, given), (_, extra) in zip(token_layouts(x), token_layouts(residual), strict=True):
        before = given.clone()
        for one, other in ((given, residual), (x, extra), (given, extra)):
            assert same_bits(ops.sparse_linear(one, packed, other, GELU), alone), what
        fused = ops.sparse_mlp(given, packed, second, GELU)
        assert same_bits(fused, ops.sparse_mlp(x, packed, second, GELU)), what
        assert torch.equal(given, before), what  # no NaN beside it either
    out = ops.sparse_linear(x, same, x)  # the residual may be the input
    assert_linear(out, x, square, square_bias, x)
    for shape in ((19,), (1, 19), (2, 1, 3, 19)):
        x = torch.randn(shape)
        assert_linear(ops.sparse_linear(x, packed), x, weight, bias, what=shape)
    row = torch.randn(1, 1, 19)
    for shape in ((4, 6, 19), (1, 6, 19)):  # one token, read again and again
        out = ops.sparse_linear(row.expand(shape), packed)
        assert same_bits(out, ops.sparse_linear(row, packed).expand(*shape[:-1], 23))


def test_without_weights_tokens_or_bias(backend: str) -> None:
    empty = SparseWeight.from_dense(torch.zeros(5, 4, 1, 1), torch.arange(5.0))
    # What nothing reads changes nothing; a product with zero would.
    x = torch.full((3, 4), float("nan") if backend == "cpu" else 1.0)
    assert torch.equal(ops.sparse_linear(x, empty), torch.arange(5.0).expand(3, 5))
    _, _, packed = layer(5, 6, 0.5)
    found = ops.sparse_mlp(x, empty, packed, GELU)
    expected = ops.sparse_linear(GELU.apply_(torch.arange(5.0)), packed)
    torch.testing.assert_close(found, expected.expand(3, 6))
    for shape in ((0, 5), (2, 0, 5), (0, 3, 5)):
        x = torch.empty(shape)
        assert ops.sparse_linear(x, packed).shape == (*shape[:-1], 6)
        assert ops.sparse_mlp(x, packed, layer(6, 3, 0.5)[2], GELU).shape == (*shape[:-1], 3)
    bare = SparseWeight.from_dense(masked_weight(6, 5, 1, 0.5))
    x = torch.randn(4, 5)
    assert_linear(ops.sparse_linear(x, bare), x, bare.to_dense()[:, :, 0, 0], None)


def test_threads_and_other_tokens_change_no_bit(extension: None) -> None:
    _, _, packed = layer(96, 200, 0.3)
    _, _, second = layer(200, 96, 0.3)
    x, residual = torch.randn(2, 203, 96), torch.randn(2, 203, 200)
    before = torch.get_num_threads()

    def results(rows: slice) -> list[torch.Tensor]:
        one = ops.sparse_linear(x[:, rows], packed, residual[:, rows], GELU)
        return [one, ops.sparse_mlp(x[:, rows], packed, second, GELU, x[:, rows])]

    try:
        torch.set_num_threads(1)
        once = results(slice(None))
        two = ops.sparse_linear(ops.sparse_linear(x, packed, None, GELU), second, x)
        assert torch.equal(once[1], two), "one op is two"
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, results(slice(None)), once)), threads
            for size in (1, 9, 64):
                found = results(slice(0, size))
                assert all(map(torch.equal, found, [t[:, :size] for t in once])), (threads, size)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("capability", ALL)
def test_a_forced_instruction_set_keeps_the_contract(extension: None, capability: str) -> None:
    if not supported()[capability]:
        pytest.skip(f"this CPU has no {capability}")
    done = child(
        """
        import torch
        from linear_cases import guarded_inputs, sweep
        from opentrans_kernels import native
        for threads in (1, 3):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            print(native.cpu_capability(), sweep(), guarded_inputs())
        """,
        capability,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    first, second = done.stdout.splitlines()
    assert first == second and first.startswith(f"{capability} "), done.stdout


def gradients(x, values, bias, residual, run) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, values, bias, residual)]
    y = run(*leaves)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_the_compiled_backward_against_dense(extension: None, act) -> None:
    weight, bias, packed = layer(13, 17, 0.4)
    x, residual = torch.randn(2, 9, 13), torch.randn(2, 9, 17)

    def sparse(x, values, bias, residual):
        trained = dataclasses.replace(packed, values=values, bias=bias)
        return ops.sparse_linear(x, trained, residual, act)

    results = []
    for dtype in (torch.float64, torch.float32):
        given = (t.to(dtype) for t in (x, weight, bias, residual))
        y, grad_x, grad_weight, *rest = gradients(
            *given, lambda x, w, b, r: act.apply_(F.linear(x, w, b) + r)
        )
        results.append([y, grad_x, grad_weight.flatten()[packed.indices()], *rest])
    found = gradients(x, packed.values, bias, residual, sparse)
    for got, exact, dense in zip(found, *results, strict=True):
        assert_within(got.detach(), exact.detach(), dense.detach(), str(act), ulp=16)


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_gradcheck_of_the_reference(set_env: Callable, act) -> None:
    set_env(OPENTRANS_BACKEND="reference")
    packed = SparseWeight.from_dense(masked_weight(3, 4, 1, 0.6))
    double = {"dtype": torch.float64, "requires_grad": True}
    given = (torch.randn(2, 5, 4, **double), torch.randn(packed.nnz, **double))
    given += (torch.randn(3, **double), torch.randn(2, 5, 3, **double))

    def run(x, values, bias, residual):
        trained = dataclasses.replace(packed, values=values, bias=bias)
        return ops.sparse_linear(x, trained, residual, act)

    assert torch.autograd.gradcheck(run, given)


def test_the_fused_op_refuses_gradients_with_the_fix(backend: str) -> None:
    _, _, one = layer(4, 5, 0.5)
    _, _, two = layer(5, 4, 0.5)
    x = torch.randn(3, 4, requires_grad=True)
    if backend == "cpu":
        with pytest.raises(UnsupportedModelError, match="chain sparse_linear calls"):
            ops.sparse_mlp(x, one, two, GELU).sum().backward()
    with torch.no_grad():
        assert not ops.sparse_mlp(x, one, two, GELU).requires_grad


def arguments(op: str, grad: bool = False) -> tuple:
    _, bias, one = layer(7, 9, 0.4)
    _, second_bias, two = layer(9, 6, 0.4)
    leaves = [torch.randn(2, 5, 7), one.values.clone(), bias.clone()]
    for leaf in leaves if grad else ():
        leaf.requires_grad_()
    x, values, bias = leaves
    if op == "sparse_linear":
        residual = torch.randn(2, 5, 9)
        return x, one.structure, values, bias, residual, 9, GELU.kind, 0.0
    second = (two.structure, two.values, second_bias, torch.randn(2, 5, 6), 6, GELU.kind, 0.0)
    return x, one.structure, values, bias, *second


@pytest.mark.parametrize("op", OPS)
def test_opcheck(extension: None, op: str) -> None:
    found = getattr(NATIVE, op).default
    for grad in (False, True) if op == "sparse_linear" else (False,):
        torch.library.opcheck(found, arguments(op, grad), test_utils=QUICK)
    if op == "sparse_linear":
        torch.library.opcheck(found, arguments(op, True))


class Net(torch.nn.Module):
    """One layer and one MLP, as a program that is traced holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.packs = [layer(12, 12, 0.4)[2], layer(12, 20, 0.4)[2], layer(20, 12, 0.4)[2]]
        for i, pack in enumerate(self.packs):
            for name in ("structure", "values", "bias"):
                self.register_buffer(f"{name}{i}", getattr(pack, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, up, down = (
            dataclasses.replace(
                pack, structure=getattr(self, f"structure{i}"), values=getattr(self, f"values{i}"),
                bias=getattr(self, f"bias{i}"),
            )
            for i, pack in enumerate(self.packs)
        )  # fmt: skip
        x = ops.sparse_linear(x, one, x, GELU)
        return ops.sparse_mlp(x, up, down, GELU, x)


def test_compiled_without_graph_breaks(extension: None) -> None:
    module = Net().eval()
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in ((2, 5, 12), (1, 9, 12), (3, 4, 12)):
            x = torch.randn(shape)
            assert torch.equal(run(x), module(x))


def test_an_exported_program_holds_the_ops(extension: None) -> None:
    module, x = Net().eval(), torch.randn(2, 7, 12)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=({1: tokens},))
        found = {str(node.target) for node in program.graph.nodes}
        assert {f"opentrans_kernels.{op}.default" for op in OPS} <= found
        more = torch.randn(2, 11, 12)
        assert torch.equal(program.module()(more), module(more))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_computes_in_float32(backend: str, dtype: torch.dtype) -> None:
    _, _, one = layer(7, 9, 0.4)
    _, _, two = layer(9, 7, 0.4)
    x = torch.randn(2, 5, 7).to(dtype)
    calls: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        lambda x: ops.sparse_linear(x, one, None, GELU),
        lambda x: ops.sparse_mlp(x, one, two, GELU, x),
    )
    for call in calls:
        expected = call(x.float())
        with torch.autocast("cpu", dtype):
            for found in (call(x), call(x.float())):
                assert found.dtype == torch.float32 and torch.equal(found, expected)
        with torch.autocast("cpu", dtype), pytest.raises(KernelUnavailable):
            call(x.to("meta"))


def test_float64_runs_on_the_reference(backend: str) -> None:
    weight, bias, packed = layer(7, 9, 0.4)
    x = torch.randn(3, 7, dtype=torch.float64)
    if backend == "cpu":
        with pytest.raises(KernelUnavailable):
            ops.sparse_linear(x, packed)
        return
    exact = dense_linear(x, weight, bias, None, GELU)
    torch.testing.assert_close(ops.sparse_linear(x, packed, None, GELU), exact)


def test_torch_counts_the_flops_of_the_nonzeros(extension: None) -> None:
    _, _, one = layer(7, 9, 0.4)
    _, _, two = layer(9, 7, 0.4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ops.sparse_linear(torch.randn(2, 5, 7), one)
    assert counter.get_total_flops() == 2 * 10 * one.nnz
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ops.sparse_mlp(torch.randn(2, 5, 7), one, two, GELU)
    assert counter.get_total_flops() == 2 * 10 * (one.nnz + two.nnz)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises((OpenTransError, RuntimeError)) as caught:
        call()
    return str(caught.value)


def test_packed_windows_are_refused(backend: str) -> None:
    x = torch.randn(2, 5)
    _, _, right = layer(5, 5, 0.5)
    for packed in (
        SparseWeight.from_dense(masked_weight(5, 5, 3, 0.5), None, 1, 1),
        SparseWeight.from_dense(masked_weight(5, 5, 1, 0.5), None, 2, 0),
        SparseWeight.from_dense(masked_weight(5, 5, 1, 0.5), None, 1, 1),
    ):
        for call in (
            lambda p=packed: ops.sparse_linear(x, p),
            lambda p=packed: ops.sparse_mlp(x, p, right),
            lambda p=packed: ops.sparse_mlp(x, right, p),
        ):
            assert "window" in refused(call)


def test_what_does_not_fit_is_refused_with_its_sizes(backend: str) -> None:
    _, _, packed = layer(5, 6, 0.5)
    _, _, other = layer(7, 4, 0.5)
    x = torch.randn(3, 5)
    assert "4" in refused(lambda: ops.sparse_linear(torch.randn(3, 4), packed))
    assert "residual" in refused(lambda: ops.sparse_linear(x, packed, torch.randn(3, 5)))
    assert "residual" in refused(lambda: ops.sparse_linear(x, packed, torch.randn(1, 6)))
    assert "7" in refused(lambda: ops.sparse_mlp(x, packed, other))
    assert refused(lambda: ops.sparse_linear(torch.tensor(1.0), packed))
    wrong = (x, packed.structure, packed.values, packed.bias, None)
    op = dispatch.resolve("sparse_linear").function()
    assert "cout" in refused(lambda: op(*wrong, 7, NONE.kind, 0.0))
    assert "activation" in refused(lambda: op(*wrong, 6, 99, 0.0))
