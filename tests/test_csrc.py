"""csrc/cpu with a C++ compiler alone: no torch on the include path, numpy as the oracle.

``make sanitize`` runs it on a library built with sanitizers, named by ``OTK_TEST_LIBRARY``.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from native_build import ROOT, compile_all, compiler, kernel_sources

from opentrans_kernels.ops.library import plane_stride
from opentrans_kernels.pack import SparseWeight

Float = np.ctypeslib.ndpointer(np.float32, flags="C")
Sizes = ctypes.c_int


class Pack(ctypes.Structure):
    """``Pack`` of csrc_shim.cpp."""

    _fields_ = [
        ("structure", ctypes.c_void_p), ("words", ctypes.c_int64),
        ("values", ctypes.c_void_p), ("bias", ctypes.c_void_p),
    ]  # fmt: skip


def pack(structure: np.ndarray, values: np.ndarray, bias: np.ndarray) -> Pack:
    """Pointers into the three arrays, which must outlive it."""
    return Pack(structure.ctypes.data, len(structure), values.ctypes.data, bias.ctypes.data)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    shared = Path(os.environ.get("OTK_TEST_LIBRARY", "")).resolve()
    if not shared.is_file():
        shared = build(tmp_path_factory.mktemp("csrc"))
    loaded = ctypes.CDLL(str(shared))
    loaded.isa.restype = ctypes.c_char_p
    loaded.plane.restype = loaded.memory.restype = ctypes.c_int64
    loaded.plane.argtypes = loaded.pool_round_trip.argtypes = (ctypes.c_int64,)
    packs = ctypes.POINTER(Pack)
    loaded.conv.argtypes = (packs, Float, ctypes.c_void_p, Float, *[Sizes] * 7)
    loaded.wgrad.argtypes = (packs, Float, Float, Float, *[Sizes] * 6)
    loaded.bottleneck.argtypes = (packs, Float, Float, *[Sizes] * 6)
    return loaded


def build(folder: Path) -> Path:
    command = compiler()
    if command is None:
        pytest.skip("no C++ compiler (g++) was found; on Debian: apt install g++")
    flags = [*command, "-std=c++20", "-O1", "-fPIC", "-Wall", f"-I{ROOT / 'csrc'}"]
    objects, said = compile_all(flags, kernel_sources(), folder)
    assert "warning" not in said, said[-3000:]
    shared = folder / "libotk.so"
    subprocess.run(
        [*command, "-shared", *objects, "-o", shared, "-Wl,-z,defs", "-pthread"], check=True
    )
    return shared


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


CANARY = np.float32(-12345.0)


class Output:
    """Padded planes between canaries; NaN where nothing was written yet."""

    def __init__(self, library: ctypes.CDLL, n: int, c: int, h: int, w: int) -> None:
        self.shape, self.plane = (n, c, h, w), library.plane(h * w)
        self.store = np.full(n * c * self.plane + 16 + 2 * 64, CANARY, np.float32)
        self.data = self.store[64:-64]
        self.data[:] = np.nan

    def pixels(self) -> np.ndarray:
        n, c, h, w = self.shape
        planes = self.data[: n * c * self.plane].reshape(n, c, self.plane)
        assert (self.store[:64] == CANARY).all() and (self.store[-64:] == CANARY).all()
        return planes[:, :, : h * w].reshape(self.shape)


def close(found: np.ndarray, exact: np.ndarray) -> bool:
    return bool(np.abs(found - exact).max() <= 2e-6 * np.abs(exact).max())


@pytest.mark.parametrize("geometry", [(1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 2, 0)], ids=str)
def test_a_convolution_matches_numpy(library: ctypes.CDLL, geometry) -> None:
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
                address = None if extra is None else extra.ctypes.data
                assert not library.conv(
                    pack(structure, values, bias), x, address, out.data,
                    n, h, w, *exact.shape[2:], relu, threads,
                )  # fmt: skip
                expected = exact if extra is None else np.maximum(exact + residual, 0)
                assert close(out.pixels(), expected), (n, h, w, threads, relu)
                results.append(out.pixels())
        assert np.array_equal(results[0], results[2]) and np.array_equal(results[1], results[3])


@pytest.mark.parametrize(("pool", "down"), [(1, False), (1, True), (2, True)])
def test_a_bottleneck_matches_numpy(library: ctypes.CDLL, pool: int, down: bool) -> None:
    generator = np.random.default_rng(1)
    shapes = [(6, 10, 1, 1, 0), (6, 6, 3, 1, 1), (10, 6, 1, 1, 0), (10, 10, 1, 1, 0)]
    convs = [random_conv(generator, *shape) for shape in (shapes if down else shapes[:3])]

    packs = (Pack * 4)(*(pack(structure, values, bias) for _, bias, structure, values in convs))
    for n, h, w in ((1, 3, 3), (2, 8, 6), (2, 17, 13)):
        source = Output(library, n, 10, h, w)
        source.data[:] = 0
        source.pixels()[:] = x = generator.standard_normal((n, 10, h, w)).astype(np.float32)
        y = np.maximum(numpy_conv(x, *convs[0][:2], 1, 0), 0)
        y = numpy_pool(np.maximum(numpy_conv(y, *convs[1][:2], 1, 1), 0), pool)
        shortcut = numpy_conv(numpy_pool(x, pool), *convs[3][:2], 1, 0) if down else x
        exact = np.maximum(numpy_conv(y, *convs[2][:2], 1, 0) + shortcut, 0)
        results = []
        for threads, stage in ((1, 0), (3, 0), (1, 1)):
            out = Output(library, *exact.shape)
            assert not library.bottleneck(
                packs, source.data, out.data, n, h, w, pool, threads, stage
            )
            assert close(out.pixels(), exact), (n, h, w, threads, stage)
            results.append(out.pixels())
        assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("geometry", [(1, 1, 0), (3, 1, 1), (3, 2, 1), (5, 3, 0)], ids=str)
def test_a_weight_gradient_matches_numpy(library: ctypes.CDLL, geometry) -> None:
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
                pack(structure, values, bias), x, grad, found, n, h, w, *grad.shape[2:], threads
            )
            assert close(found[order], exact.flat[flat]), (n, h, w, threads)


def test_damaged_structures_are_refused_or_read_within_bounds(library: ctypes.CDLL) -> None:
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
                made = pack(words, values, bias)
                for threads in (1, 3):
                    code = library.conv(made, x, None, out.data, 1, 5, 6, 5, 6, 1, threads)
                out.pixels()
                found = np.zeros(len(values), np.float32)
                library.wgrad(made, x, grad, found, 1, 5, 6, 5, 6, 1)
                refused, ran = refused + code, ran + (not code)
    assert refused > 500 and ran > 100, "codes that stay inside are another weight, not damage"


def test_the_capability_and_the_plane_rule(library: ctypes.CDLL) -> None:
    why = ctypes.c_char_p()
    name = library.isa(ctypes.byref(why))
    assert name in (b"avx512", b"avx2", b"neon", b"generic")
    for pixels in range(400):
        found = library.plane(pixels)
        assert found == plane_stride(pixels)
        assert found >= pixels and found % 32 == 16, "an odd number of 64-byte lines"


def test_pool_memory_is_aligned_counted_and_returned(library: ctypes.CDLL) -> None:
    for megabytes in (1, 3, 2):
        assert library.pool_round_trip(megabytes << 20) == 0


def test_the_kernels_include_nothing_from_torch() -> None:
    unwanted = re.compile(r"#\s*include.*(torch|ATen|c10|Python)")
    for path in [ROOT / "csrc" / "otk.h", *(ROOT / "csrc" / "cpu").rglob("*.*")]:
        assert not unwanted.search(path.read_text(encoding="utf-8")), path.name
