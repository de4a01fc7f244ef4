"""Where the kernels read and write, how results depend on threads and batch, and what they keep."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import fresh_process
import pytest
import torch
from kernel_cases import bottleneck_parts, layouts, masked_weight, padded_planes

from opentrans_kernels import ops
from opentrans_kernels.pack import SparseWeight

pytestmark = pytest.mark.usefixtures("extension")
GEOMETRIES = ((1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (1, 2, 0), (7, 2, 3))
BLOCKS = ((1, False), (1, True), (2, True), (3, True))


def results(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every op makes of ``x`` ``[N, 6, H, W]``, gradients included."""
    native = torch.ops.opentrans_kernels
    found = {}
    for kernel, stride, padding in GEOMETRIES:
        if min(x.shape[2:]) + 2 * padding < kernel:
            continue
        packed = SparseWeight.from_dense(
            masked_weight(17, 6, kernel, 0.4), torch.arange(17.0), stride, padding
        )
        name = f"{kernel}x{kernel} stride {stride} padding {padding}"
        found[name] = ops.sparse_conv2d(x, packed)
        grad = found[name].contiguous().cos()
        added = ops.sparse_conv2d(x, packed, grad, True)
        found[f"{name} with residual"] = added
        size = (*x.shape[1:], stride, padding)
        found[f"dgrad {name}"] = native.sparse_conv2d_dgrad(
            grad, packed.structure, packed.values, *size
        )
    for pool, down in BLOCKS:
        if min(x.shape[2:]) < pool:
            continue
        _, packs = bottleneck_parts(6, 5, 6, 0.5, down)
        found[f"block {pool} {down}"] = ops.sparse_bottleneck(x, *packs, pool, pool)
        found[f"pool {pool}"] = ops.avg_pool2d(x, pool)
    return found


def value_gradients(x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for kernel, stride, padding in GEOMETRIES:
        if min(x.shape[2:]) + 2 * padding < kernel:
            continue
        packed = SparseWeight.from_dense(
            masked_weight(17, 6, kernel, 0.4), None, stride, padding, chunk=2, row_block=4
        )
        grad = ops.sparse_conv2d(x, packed).cos()
        native = torch.ops.opentrans_kernels
        found.append(native.sparse_conv2d_wgrad(x, grad, packed.structure, packed.values))
    return found


SHAPES = ((1, 7, 7), (1, 31, 29), (3, 17, 5), (2, 64, 48))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_do_not_change_a_bit(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape[0], 6, *shape[1:])
    once, gradients = results(x), value_gradients(x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for name, out in results(x).items():
            assert torch.equal(out, once[name]), (name, threads)
        for first, second in zip(gradients, value_gradients(x), strict=True):
            assert torch.equal(first, second), threads


@pytest.mark.parametrize("kernel", (1, 3))
def test_threads_do_not_change_a_bit_of_wide_layers(kernel: int) -> None:
    weight = masked_weight(300, 200, kernel, 0.1)
    for row_block, size in ((None, 14), (32, 7), (1000, 40)):
        packed = SparseWeight.from_dense(weight, None, 1, kernel // 2, row_block=row_block)
        x = torch.randn(2, 200, size, size)
        once = ops.sparse_conv2d(x, packed)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.sparse_conv2d(x, packed), once)


@pytest.mark.parametrize("threads", (1, 3))
def test_an_image_alone_and_in_a_batch_give_the_same_bits(threads: int) -> None:
    torch.set_num_threads(threads)
    for h, w in ((7, 7), (33, 20), (16, 16)):
        x = torch.randn(4, 6, h, w)
        together = results(x)
        for n in range(4):
            for name, alone in results(x[n : n + 1].clone()).items():
                assert torch.equal(alone[0], together[name][n]), (name, n, h, w)


def test_every_pixel_is_written(poison: None) -> None:
    for h, w in ((1, 1), (3, 5), (7, 7), (16, 16), (17, 4)):
        for name, out in results(torch.randn(2, 6, h, w)).items():
            assert not out.isnan().any(), (name, h, w)
        assert not any(g.isnan().any() for g in value_gradients(torch.randn(2, 6, h, w)))


@pytest.mark.parametrize("kernel", (1, 3))
@pytest.mark.parametrize("density", (0.0, 0.02, 0.5))
def test_every_pixel_of_reused_memory_is_written(kernel: int, density: float) -> None:
    """Large outputs are taken from a pool, so the block of a freed NaN result comes back."""
    weight, bias = masked_weight(65, 7, kernel, density), torch.randn(65)
    packed = SparseWeight.from_dense(weight, bias, 1, kernel // 2)
    shortcut, block = bottleneck_parts(7, 5, 65, density, True)
    x = torch.randn(1, 7, 57, 55)
    first = ops.sparse_conv2d(x, packed)
    first_block = ops.sparse_bottleneck(x, *block)
    assert first.untyped_storage().nbytes() >= 256 * 1024

    def dirty() -> None:
        nan = SparseWeight.from_dense(weight, torch.full((65,), float("nan")), 1, kernel // 2)
        bad = [ops.sparse_conv2d(x, nan) for _ in range(4)]
        assert all(out.isnan().all() for out in bad)

    dirty()
    assert torch.equal(ops.sparse_conv2d(x, packed), first)
    dirty()
    assert torch.equal(ops.sparse_bottleneck(x, *block), first_block)


@pytest.mark.parametrize("filler", (float("nan"), float("inf"), 1e-41), ids=str)
def test_what_lies_behind_the_planes_does_not_matter(filler: float) -> None:
    for h, w in ((1, 1), (3, 3), (7, 7), (5, 9), (13, 17), (1, 33), (33, 1)):
        x = torch.randn(2, 6, h, w)
        clean = results(padded_planes(x, 0.0))
        for name, out in results(padded_planes(x, filler)).items():
            assert torch.equal(out, clean[name]), (name, h, w)
        packed = SparseWeight.from_dense(masked_weight(17, 6, 1, 0.4))
        residual = torch.randn(2, 17, h, w)
        padded = ops.sparse_conv2d(x, packed, padded_planes(residual, filler))
        assert torch.equal(padded, ops.sparse_conv2d(x, packed, residual)), (h, w)


def test_denormal_activations_keep_their_value() -> None:
    x = torch.full((1, 6, 5, 5), 3e-39)
    weight = torch.eye(6).view(6, 6, 1, 1) * 0.5
    out = ops.sparse_conv2d(x, SparseWeight.from_dense(weight))
    assert torch.equal(out, x * 0.5) and out.max() > 0


def test_results_do_not_share_memory_with_inputs_or_each_other() -> None:
    for _, x in layouts(torch.randn(2, 6, 7, 7)):
        before = x.clone()
        first, second = results(x), results(x)
        for name, out in first.items():
            kept = second[name].clone()
            out.fill_(float("nan"))
            assert torch.equal(second[name], kept), name
        assert torch.equal(x, before)


def child(code: str) -> str:
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = fresh_process.run(code, environment=environ)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout.strip()


def test_nothing_is_read_beyond_the_storage() -> None:
    runs = child(
        """
        import torch
        from kernel_cases import guarded_inputs
        torch.set_num_threads(1)
        runs = guarded_inputs()
        torch.set_num_threads(3)
        print(runs + guarded_inputs())
        """
    )
    assert int(runs) >= 80


def test_the_guard_page_kills_who_reads_it() -> None:
    """Otherwise the test above could not fail."""
    code = """
        import ctypes, torch
        from kernel_cases import at_end_of_page
        x = at_end_of_page(torch.zeros(5))
        ctypes.c_float.from_address(x.data_ptr() + 16)
        ctypes.c_float.from_address(x.data_ptr() + 20).value
        """
    with pytest.raises(AssertionError, match="exit -11"):
        child(code)


def test_memory_does_not_grow_over_a_thousand_forwards() -> None:
    held = torch.ops.opentrans_kernels.scratch_bytes
    large = SparseWeight.from_dense(masked_weight(65, 7, 1, 0.1))
    small = SparseWeight.from_dense(masked_weight(5, 7, 3, 0.1), None, 1, 1)
    inputs = [torch.randn(1, 7, size, size) for size in (34, 41, 48)]

    def round_() -> None:
        for x in inputs:
            kept = [ops.sparse_conv2d(x, large), ops.sparse_conv2d(x, small)]
            kept.append(ops.sparse_conv2d(x, large))

    for _ in range(3):
        round_()
    before = held()
    assert before > 0
    for _ in range(112):  # 9 forwards each
        round_()
    assert held() == before


def test_idle_memory_is_released_on_request() -> None:
    native = torch.ops.opentrans_kernels
    packed = SparseWeight.from_dense(masked_weight(65, 7, 1, 0.1))
    gc.collect()
    native.release_memory()
    empty = native.scratch_bytes()
    kept = ops.sparse_conv2d(torch.randn(1, 7, 64, 64), packed)
    used = native.scratch_bytes()
    assert used >= empty + kept.untyped_storage().nbytes()
    before = kept.clone()
    native.release_memory()
    assert torch.equal(kept, before) and native.scratch_bytes() == used, "memory in use stays"
    del kept
    native.release_memory()
    assert native.scratch_bytes() < used
