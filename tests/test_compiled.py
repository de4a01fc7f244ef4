"""The ops as torch sees them: opcheck, torch.compile, torch.export, autocast."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import fresh_process
import pytest
import torch
from kernel_cases import bottleneck_parts, layouts, masked_weight
from torch.utils.flop_counter import FlopCounterMode

from opentrans_kernels import ops
from opentrans_kernels.errors import KernelUnavailable
from opentrans_kernels.ops.library import plane_padded
from opentrans_kernels.pack import SparseWeight

NATIVE = torch.ops.opentrans_kernels
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def conv_arguments(kernel, stride, padding, residual, relu, grad=False):
    packed = SparseWeight.from_dense(
        masked_weight(9, 7, kernel, 0.4), torch.randn(9), stride, padding
    )
    x = torch.randn(2, 7, 6, 5)
    extra = torch.randn(ops.sparse_conv2d(x, packed).shape) if residual else None
    values, bias = packed.values.clone(), packed.bias.clone()
    if grad:
        for leaf in (x, values, bias):
            leaf.requires_grad_()
    return x, packed.structure, values, bias, extra, 9, kernel, stride, padding, relu


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("geometry", [(1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 1, 2)], ids=str)
def test_opcheck_of_the_convolution(extension: None, geometry, residual: bool) -> None:
    for grad in (False, True):
        arguments = conv_arguments(*geometry, residual, residual, grad)
        torch.library.opcheck(NATIVE.sparse_conv2d.default, arguments, test_utils=QUICK)


def test_opcheck_through_aot_autograd(extension: None) -> None:
    arguments = conv_arguments(3, 1, 1, True, True, True)
    torch.library.opcheck(NATIVE.sparse_conv2d.default, arguments)


@pytest.mark.parametrize(
    "geometry", [(1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 1, 2), (3, 1, 3)], ids=str
)
def test_opcheck_of_the_gradients(extension: None, geometry) -> None:
    x, structure, values, *_ = conv_arguments(*geometry, False, False)
    kernel, stride, padding = geometry
    grad = torch.randn(
        2, 9, (6 + 2 * padding - kernel) // stride + 1, (5 + 2 * padding - kernel) // stride + 1
    )
    wgrad = (x, grad, structure, values)
    torch.library.opcheck(NATIVE.sparse_conv2d_wgrad.default, wgrad, test_utils=QUICK)
    dgrad = (grad, structure, values, 7, 6, 5, stride, padding)
    torch.library.opcheck(NATIVE.sparse_conv2d_dgrad.default, dgrad, test_utils=QUICK)


@pytest.mark.parametrize(("pool", "down"), [(1, False), (1, True), (2, True)])
def test_opcheck_of_block_and_pool(extension: None, pool: int, down: bool) -> None:
    _, packs = bottleneck_parts(6, 5, 6, 0.5, down)
    parts = [None if w is None else (w.structure, w.values, w.bias) for w in packs]
    flat = [t for part in parts for t in (part or (None,) * 3)]
    x = torch.randn(2, 6, 7, 8)
    block = (x, *flat, 6, pool, pool)
    torch.library.opcheck(NATIVE.sparse_bottleneck.default, block, test_utils=QUICK)
    for leaf in (x, x.clone().requires_grad_()):
        torch.library.opcheck(NATIVE.avg_pool2d.default, (leaf, pool + 1), test_utils=QUICK)


def test_fakes_state_the_layout_of_the_results(extension: None) -> None:
    fake = torch._subclasses.FakeTensorMode()
    for kernel, stride, padding in ((1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (7, 2, 3)):
        packed = SparseWeight.from_dense(masked_weight(9, 7, kernel, 0.4), None, stride, padding)
        for n, h, w in ((2, 7, 7), (1, 16, 16), (0, 9, 9), (3, 56, 55)):
            for _, x in layouts(torch.randn(n, 7, h, w)):
                real = ops.sparse_conv2d(x, packed)
                with fake:
                    parts = (fake.from_tensor(t) for t in (x, packed.structure, packed.values))
                    found = NATIVE.sparse_conv2d(
                        *parts, None, None, 9, kernel, stride, padding, False
                    )
                assert found.shape == real.shape and found.stride() == real.stride()
                assert found.dtype == real.dtype and found.device == real.device
    like = plane_padded(torch.empty(0), 2, 9, 7, 7)
    assert like.flatten(2).shape == (2, 9, 49)


class Block(torch.nn.Module):
    """Two packed convolutions, a pool and a fused block among ordinary operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SparseWeight.from_dense(masked_weight(6, 3, 3, 0.5), torch.randn(6), 2, 1)
        self.second = SparseWeight.from_dense(masked_weight(6, 6, 1, 0.5), torch.randn(6))
        self.block = bottleneck_parts(6, 5, 6, 0.5, True)[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = ops.sparse_conv2d(x.sin() * 2, self.first, relu=True)
        y = ops.sparse_conv2d(y, self.second, y)
        return ops.sparse_bottleneck(ops.avg_pool2d(y, 2), *self.block, 2, 2).flatten(2) + 1


def test_compiled_without_graph_breaks_and_with_a_dynamic_batch(extension: None) -> None:
    module = Block().eval()
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (2, 1, 3, 5):
            x = torch.randn(n, 3, 16, 17)
            torch.testing.assert_close(run(x), module(x))


FIRST = """
import torch
from torch._dynamo.utils import counters
import opentrans_kernels as otk
from kernel_cases import bottleneck_parts, masked_weight
from opentrans_kernels import ops, settings
from opentrans_kernels.pack import SparseWeight
conv = SparseWeight.from_dense(masked_weight(6, 6, 3, 0.4), torch.randn(6), 1, 1)
block = bottleneck_parts(6, 5, 6, 0.5, False)[1]
x = torch.randn(2, 6, 6, 8)
for call in (
    lambda x: otk.sparse_conv2d(x, conv, relu=True),
    lambda x: ops.sparse_conv2d(x, conv, x),
    lambda x: ops.avg_pool2d(x, 2),
    lambda x: ops.sparse_bottleneck(x, *block),
    lambda x: ops.sparse_stage(x, [tuple(block)] * 2, (1, 1)),
):
    torch._dynamo.reset()
    settings._current = None  # as in a process that has called no op
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert settings._current is not None
    torch.testing.assert_close(found, call(x))
assert not counters["graph_break"]
print("same")
"""


def test_a_compiled_call_is_the_first_call_of_its_process(extension: None) -> None:
    """Reading the environment cannot be traced, and nothing has read it yet."""
    here = Path(__file__).parent
    path = os.pathsep.join((str(here.parent), str(here)))
    done = fresh_process.run(FIRST, environment=os.environ | {"PYTHONPATH": path})
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_settings_read_again_reach_a_compiled_call(extension: None, set_env) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 1, 1)
    x = torch.randn(2, 7, 6, 5)
    expected = ops.sparse_conv2d(x, packed)
    torch._dynamo.reset()
    run = torch.compile(lambda x: ops.sparse_conv2d(x, packed), backend="aot_eager")
    torch.testing.assert_close(run(x), expected)
    set_env(OPENTRANS_BACKEND="triton")
    with pytest.raises(KernelUnavailable, match="OPENTRANS_BACKEND=triton"):
        run(x)
    set_env(OPENTRANS_BACKEND=None)
    torch.testing.assert_close(run(x), expected)


def test_reference_kernels_stay_out_of_the_graph(set_env) -> None:
    """They read where the nonzeros are, from numbers that no tracer has."""
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 1, 1)
    x = torch.randn(2, 7, 6, 5)
    set_env(OPENTRANS_BACKEND="reference")
    torch._dynamo.reset()

    def call(x: torch.Tensor) -> torch.Tensor:
        return ops.sparse_conv2d(x.sin(), packed).cos()

    for image in (x, x.double()):
        found = torch.compile(call, backend="aot_eager")(image)
        torch.testing.assert_close(found, call(image))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the reference kernels read|autocast"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(x)


def test_training_compiled_without_graph_breaks(extension: None) -> None:
    packed = SparseWeight.from_dense(masked_weight(7, 3, 3, 0.5), torch.randn(7), 1, 1)

    def loss(x, values, bias):
        trained = dataclasses.replace(packed, values=values, bias=bias)
        return ops.sparse_conv2d(x.sin(), trained, None, True).square().sum()

    torch._dynamo.reset()
    run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 5)
    leaves = [t.clone().requires_grad_() for t in (x, packed.values, packed.bias)]
    found = torch.autograd.grad(run(*leaves), leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiled_by_inductor(extension: None) -> None:
    module = Block().eval()
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(module, fullgraph=True, dynamic=True)
        for n in (2, 3):
            x = torch.randn(n, 3, 16, 17)
            torch.testing.assert_close(run(x), module(x))


class Packed(torch.nn.Module):
    """A convolution whose pack travels in buffers, as an exported program needs."""

    def __init__(self, packed: SparseWeight) -> None:
        super().__init__()
        self.packed = packed
        for name in ("structure", "values", "bias"):
            self.register_buffer(name, getattr(packed, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = {name: getattr(self, name) for name in ("structure", "values", "bias")}
        return ops.sparse_conv2d(x, dataclasses.replace(self.packed, **held), relu=True)


LOADED = """
import sys, torch
import opentrans_kernels.ops
from opentrans_kernels import settings
program = torch.export.load(sys.argv[1]).module()
x, y = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(program(x), y)
print("same")
"""


def test_an_exported_program_is_saved_and_runs_in_another_process(
    extension: None, tmp_path: Path
) -> None:
    module = Packed(SparseWeight.from_dense(masked_weight(7, 3, 3, 0.5), torch.randn(7), 1, 1))
    x = torch.randn(2, 3, 6, 5)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "opentrans_kernels.sparse_conv2d.default" in targets
    more = torch.randn(5, 3, 6, 5)
    torch.testing.assert_close(program.module()(more), module(more))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((more, module(more)), tmp_path / "pair.pt")
    done = fresh_process.run(LOADED, tmp_path / "program.pt2", tmp_path / "pair.pt")
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_autocast_computes_in_float32(
    extension: None, set_env, backend: str, dtype: torch.dtype
) -> None:
    set_env(OPENTRANS_BACKEND=backend)
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 1, 1)
    x = torch.randn(2, 7, 6, 6).to(dtype)
    _, block = bottleneck_parts(7, 5, 7, 0.5, False)
    calls = (
        lambda x: ops.sparse_conv2d(x, packed),
        lambda x: ops.sparse_conv2d(x, packed, torch.ones(2, 9, 6, 6).to(x.dtype), True),
        lambda x: ops.avg_pool2d(x, 2),
        lambda x: ops.sparse_bottleneck(x, *block),
    )
    for call in calls:
        expected = call(x.float())
        with torch.autocast("cpu", dtype):
            from_float, from_half = call(x.float()), call(x)
        for found in (from_float, from_half):
            assert found.dtype == torch.float32
            assert torch.equal(found, expected)
        with torch.autocast("cpu", dtype), pytest.raises(KernelUnavailable):
            call(x.to("meta"))  # autocast of another device is not autocast here


def test_autocast_leaves_float64_alone(extension: None) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 1, 1)
    x = torch.randn(2, 7, 6, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.sparse_conv2d(x, packed)
    assert found.dtype == torch.float64 and torch.equal(found, ops.sparse_conv2d(x, packed))


def test_torch_counts_the_flops_of_the_nonzeros(extension: None) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 2, 1)
    _, block = bottleneck_parts(6, 5, 6, 0.5, True)
    x, y = torch.randn(2, 7, 6, 5, requires_grad=True), torch.randn(2, 6, 8, 6)
    with FlopCounterMode(display=False) as counter:
        out = ops.sparse_conv2d(x, packed)
    forward = 2 * packed.nnz * 2 * 3 * 3
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == forward, "the input's gradient visits the same nonzeros"
    with FlopCounterMode(display=False) as counter:
        ops.sparse_bottleneck(y, *block, 2, 2)
    first, second, third, down = (w.nnz for w in block)
    assert counter.get_total_flops() == 2 * 2 * ((first + second) * 48 + (third + down) * 12)


COUNTED = """
import sys, torch
from opentrans_kernels import ops
from opentrans_kernels.pack import SparseWeight
packed = SparseWeight.from_dense(torch.ones(4, 3, 1, 1))
assert "triton" not in sys.modules and "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    ops.sparse_conv2d(torch.ones(1, 3, 5, 5), packed)
print(counter.get_total_flops(), sum(type(f).__name__ == "_AfterImport" for f in sys.meta_path))
"""


def test_a_counter_imported_later_counts_as_well(extension: None) -> None:
    """The ops do not import it themselves, because it imports triton."""
    done = fresh_process.run(COUNTED)
    assert done.stdout.split() == [str(2 * 12 * 25), "0"], done.stderr[-2000:]


def test_autocast_training_gradients_are_float32(extension: None) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 1, 1)
    values = packed.values.clone().requires_grad_()
    x = torch.randn(2, 7, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.sparse_conv2d(x, dataclasses.replace(packed, values=values), None, True)
    out.sum().backward()
    autocast = x.grad.clone(), values.grad.clone()
    x.grad = values.grad = None
    ops.sparse_conv2d(x, dataclasses.replace(packed, values=values), None, True).sum().backward()
    assert torch.equal(autocast[0], x.grad) and torch.equal(autocast[1], values.grad)
    assert values.grad.dtype == torch.float32


def test_deepcopy_pickle_and_inference_mode(extension: None, tmp_path: Path) -> None:
    packed = SparseWeight.from_dense(masked_weight(9, 7, 3, 0.4), torch.randn(9), 1, 1)
    x = torch.randn(2, 7, 6, 6)
    out = ops.sparse_conv2d(x, packed)
    with torch.inference_mode():
        assert torch.equal(ops.sparse_conv2d(x.clone(), packed), out)
    torch.save((packed.structure, packed.values), tmp_path / "pack.pt")
    structure, values = torch.load(tmp_path / "pack.pt", weights_only=True)
    again = dataclasses.replace(packed, structure=structure, values=values)
    assert torch.equal(ops.sparse_conv2d(x, again), out)
