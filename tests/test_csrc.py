"""csrc/cpu with a C++ compiler alone: no torch on the include path, numpy as the oracle.

``make sanitize`` runs it on a program built with sanitizers, named by ``OTK_TEST_PROGRAM``.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from csrc_process import NO_PACK, Kernels, Pack
from native_build import ROOT

from opentrans_kernels.ops.library import plane_stride
from opentrans_kernels.pack import SparseWeight


def numpy_conv(x, weight, bias, stride: int, padding: int) -> np.ndarray:
    """Direct convolution in float64, tap by tap."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (padding,) * 2, (padding,) * 2])
    k = weight.shape[2]
    height, width = ((size - k) // stride + 1 for size in x.shape[2:])
    out = np.tile(bias.astype(np.float64).reshape(1, -1, 1, 1), (x.shape[0], 1, height, width))
    for ky in range(k):
        for kx in range(k):
            seen = x[:, :, ky : ky + stride * height : stride, kx : kx + stride * width : stride]
            seen = seen[:, :, :height, :width]
            out += np.einsum("oc,nchw->nohw", weight[:, :, ky, kx].astype(np.float64), seen)
    return out


def numpy_pool(x: np.ndarray, k: int) -> np.ndarray:
    n, c, h, w = x.shape
    x = x[:, :, : h // k * k, : w // k * k]
    return x.reshape(n, c, h // k, k, w // k, k).mean((3, 5))


def random_conv(generator, cout: int, cin: int, k: int, stride: int, padding: int):
    dense = generator.standard_normal((cout, cin, k, k)).astype(np.float32)
    dense[generator.random(dense.shape) > 0.3] = 0
    bias = generator.standard_normal(cout).astype(np.float32)
    packed = SparseWeight.from_dense(
        torch.from_numpy(dense), torch.from_numpy(bias), stride, padding, chunk=4, row_block=5
    )
    return dense, bias, packed.structure.numpy(), packed.values.numpy()


class Output:
    """Padded planes; NaN where nothing was written yet."""

    def __init__(self, library: Kernels, n: int, c: int, h: int, w: int) -> None:
        self.shape, self.plane = (n, c, h, w), library.plane(h * w)
        self.data = np.full(n * c * self.plane + 16, np.nan, np.float32)

    def pixels(self) -> np.ndarray:
        n, c, h, w = self.shape
        planes = self.data[: n * c * self.plane].reshape(n, c, self.plane)
        return planes[:, :, : h * w].reshape(self.shape)


def close(found: np.ndarray, exact: np.ndarray) -> bool:
    return bool(np.abs(found - exact).max() <= 2e-6 * np.abs(exact).max())


@pytest.mark.parametrize("geometry", [(1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 2, 0)], ids=str)
def test_a_convolution_matches_numpy(library: Kernels, geometry) -> None:
    kernel, stride, padding = geometry
    generator = np.random.default_rng(0)
    dense, bias, structure, values = random_conv(generator, 17, 11, kernel, stride, padding)
    for n, h, w in ((1, 3, 3), (2, 7, 9), (3, 16, 5)):
        x = generator.standard_normal((n, 11, h, w)).astype(np.float32)
        exact = numpy_conv(x, dense, bias, stride, padding)
        residual = generator.standard_normal(exact.shape).astype(np.float32)
        results = []
        for threads in (1, 3):
            for extra, relu in ((None, 0), (residual, 1)):
                out = Output(library, *exact.shape)
                assert not library.conv(
                    Pack(structure, values, bias), x, extra, out.data,
                    n, h, w, *exact.shape[2:], relu, 0.0, threads,
                )  # fmt: skip
                expected = exact if extra is None else np.maximum(exact + residual, 0)
                assert close(out.pixels(), expected), (n, h, w, threads, relu)
                results.append(out.pixels())
        assert np.array_equal(results[0], results[2]) and np.array_equal(results[1], results[3])


@pytest.mark.parametrize(("pool", "down"), [(1, False), (1, True), (2, True)])
def test_a_bottleneck_matches_numpy(library: Kernels, pool: int, down: bool) -> None:
    generator = np.random.default_rng(1)
    shapes = [(6, 10, 1, 1, 0), (6, 6, 3, 1, 1), (10, 6, 1, 1, 0), (10, 10, 1, 1, 0)]
    convs = [random_conv(generator, *shape) for shape in (shapes if down else shapes[:3])]

    packs = [Pack(structure, values, bias) for _, bias, structure, values in convs]
    packs += [NO_PACK] * (4 - len(packs))
    for n, h, w in ((1, 3, 3), (2, 8, 6), (2, 17, 13)):
        source = Output(library, n, 10, h, w)
        source.data[:] = 0
        source.pixels()[:] = x = generator.standard_normal((n, 10, h, w)).astype(np.float32)
        y = np.maximum(numpy_conv(x, *convs[0][:2], 1, 0), 0)
        y = numpy_pool(np.maximum(numpy_conv(y, *convs[1][:2], 1, 1), 0), pool)
        shortcut = numpy_conv(numpy_pool(x, pool), *convs[3][:2], 1, 0) if down else x
        exact = np.maximum(numpy_conv(y, *convs[2][:2], 1, 0) + shortcut, 0)
        results = []
        for threads in (1, 3):
            out = Output(library, *exact.shape)
            assert not library.bottleneck(packs, source.data, out.data, n, h, w, pool, threads)
            assert close(out.pixels(), exact), (n, h, w, threads)
            results.append(out.pixels())
            out = Output(library, *exact.shape)
            pools = np.array([pool], np.int64)
            assert not library.stage(packs, pools, 1, source.data, out.data, n, h, w, threads)
            results.append(out.pixels())
        assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("geometry", [(1, 1, 0), (3, 1, 1), (3, 2, 1), (5, 3, 0)], ids=str)
def test_a_weight_gradient_matches_numpy(library: Kernels, geometry) -> None:
    kernel, stride, padding = geometry
    generator = np.random.default_rng(2)
    dense, bias, structure, values = random_conv(generator, 9, 7, kernel, stride, padding)
    flat = np.flatnonzero(dense)
    order = np.argsort(SparseWeight.from_dense(torch.from_numpy(dense), chunk=4, row_block=5)
                       .indices().numpy())  # fmt: skip
    for n, h, w in ((1, 5, 5), (2, 7, 9), (3, 16, 5)):
        x = generator.standard_normal((n, 7, h, w)).astype(np.float32)
        grad = generator.standard_normal(numpy_conv(x, dense, bias, stride, padding).shape)
        grad = grad.astype(np.float32)
        exact = np.zeros(dense.shape)
        wide = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (padding,) * 2, (padding,) * 2])
        for ky, kx in np.ndindex(kernel, kernel):
            seen = wide[:, :, ky::stride, kx::stride][:, :, : grad.shape[2], : grad.shape[3]]
            exact[:, :, ky, kx] = np.einsum("nohw,nchw->oc", grad.astype(np.float64), seen)
        for threads in (1, 3):
            found = np.full(len(values), np.nan, np.float32)
            assert not library.wgrad(
                Pack(structure, values, bias), x, grad, found, n, h, w, *grad.shape[2:], threads
            )
            assert close(found[order], exact.flat[flat]), (n, h, w, threads)


def test_damaged_structures_are_refused_or_read_within_bounds(library: Kernels) -> None:
    """Every word of a pack, changed; all buffers end where the sizes say."""
    generator = np.random.default_rng(3)
    refused = ran = 0
    for kernel in (1, 3):
        dense, bias, structure, values = random_conv(generator, 9, 7, kernel, 1, kernel // 2)
        x = generator.standard_normal((1, 7, 5, 6)).astype(np.float32)
        grad = generator.standard_normal((1, 9, 5, 6)).astype(np.float32)
        for position in range(len(structure)):
            for change in (1, -1, 1 << 14, 1 << 16, -(1 << 31), 7 << 29):
                words = structure.copy()
                words.view(np.uint32)[position : position + 1] += np.uint32(change % 2**32)
                # What a caller checks itself: the sizes of the tensors against the header.
                if any(words[i] != structure[i] for i in (2, 3, 4, 5, 6, 11)):
                    continue
                out = Output(library, 1, 9, 5, 6)
                made = Pack(words, values, bias)
                for threads in (1, 3):
                    code = library.conv(made, x, None, out.data, 1, 5, 6, 5, 6, 1, 0.0, threads)
                out.pixels()
                found = np.zeros(len(values), np.float32)
                library.wgrad(made, x, grad, found, 1, 5, 6, 5, 6, 1)
                refused, ran = refused + code, ran + (not code)
    assert refused > 500 and ran > 100, "codes that stay inside are another weight, not damage"


def test_the_capability_and_the_plane_rule(library: Kernels) -> None:
    name = np.zeros(16, np.uint8)
    assert library.isa(name) == 0
    assert name.tobytes().rstrip(b"\0") in (b"avx512", b"avx2", b"neon", b"generic")
    for pixels in range(400):
        found = library.plane(pixels)
        assert found == plane_stride(pixels)
        assert found >= pixels and found % 32 == 16, "an odd number of 64-byte lines"


def test_pool_memory_is_aligned_counted_and_returned(library: Kernels) -> None:
    for megabytes in (1, 3, 2):
        assert library.pool_round_trip(megabytes << 20) == 0


def test_a_process_that_leaves_its_arrays_or_is_misunderstood_ends(library: Kernels) -> None:
    """What every other test relies on: such a call raises, and the next one is served."""
    data, sums = np.zeros(64, np.uint8), np.zeros(1, np.int64)
    for size in (64 + 1, 512):
        with pytest.raises(AssertionError, match="sums ended its process"):
            library.sums(data, size, sums, 1)
    for arguments in ((1.0,), (), (1, 2), (None,)):
        with pytest.raises(AssertionError, match="plane ended its process with 3"):
            library.plane(*arguments)
    with pytest.raises(AssertionError, match="no_such_function ended its process with 3"):
        library.no_such_function()
    assert library.plane(16) == 16


def test_the_kernels_include_nothing_from_torch() -> None:
    unwanted = re.compile(r"#\s*include.*(torch|ATen|c10|Python)")
    for path in [ROOT / "csrc" / "otk.h", *(ROOT / "csrc" / "cpu").rglob("*.*")]:
        assert not unwanted.search(path.read_text(encoding="utf-8")), path.name
