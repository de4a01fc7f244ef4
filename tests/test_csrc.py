"""csrc/cpu with a C++ compiler alone: no torch on the include path, numpy as the oracle."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from opentrans_kernels.ops.library import plane_stride
from opentrans_kernels.pack import SparseWeight

ROOT = Path(__file__).resolve().parents[1]
Float = np.ctypeslib.ndpointer(np.float32, flags="C")
Int = np.ctypeslib.ndpointer(np.int32, flags="C")

SHIM = r"""
#include "otk.h"
using namespace otk;

namespace {
// Ranges one by one, last first: an order that no result may depend on.
void backwards(int64_t n, void* ctx, RangeBody body) {
  for (int64_t i = n; i-- > 0;) body(ctx, i, i + 1);
}
void once(int64_t n, void* ctx, RangeBody body) { body(ctx, 0, n); }
Parallel parallel(int threads) { return {threads > 1 ? backwards : once, threads}; }

SparseWeight weight(const int32_t* s, const float* values, const float* bias) {
  SparseWeight w{};
  w.cin = s[2], w.cout = s[3], w.kernel = s[4], w.stride = s[5], w.padding = s[6];
  w.chunk = s[7], w.row_block = s[8], w.n_chunks = s[9], w.n_row_blocks = s[10], w.nnz = s[11];
  w.blocks = s + 13;
  w.entries = reinterpret_cast<const uint32_t*>(w.blocks + 2 * (w.n_chunks * w.n_row_blocks + 1));
  w.codes = reinterpret_cast<const uint16_t*>(w.entries + s[12]);
  w.values = values, w.bias = bias;
  return w;
}
// Contiguous images of exactly n * c * h * w floats.
Planes dense(float* data, int n, int c, int h, int w) {
  const int64_t plane = int64_t{h} * w;
  return {data, c * plane, plane, w, 1, n, c, h, w, n * c * plane};
}
Planes padded(float* data, int n, int c, int h, int w) {
  const int64_t plane = plane_stride(int64_t{h} * w);
  return {data, c * plane, plane, w, 1, n, c, h, w, n * c * plane + 16};
}
}  // namespace

extern "C" {
const char* isa(const char** why) { return cpu_capability(why); }
int64_t plane(int64_t pixels) { return plane_stride(pixels); }
int64_t memory() { return scratch_bytes() + pool_bytes(); }

void conv(const int32_t* s, const float* values, const float* bias, float* x, float* residual,
          float* out, int n, int h, int w, int oh, int ow, int relu, int threads) {
  const SparseWeight sw = weight(s, values, bias);
  const Planes extra = dense(residual, n, sw.cout, oh, ow);
  sparse_conv2d(sw, dense(x, n, sw.cin, h, w), padded(out, n, sw.cout, oh, ow),
                residual ? &extra : nullptr, relu, parallel(threads));
}

void bottleneck(const int32_t** s, const float** values, const float** bias, float* x, float* out,
                int n, int h, int w, int pool, int threads) {
  Bottleneck b{};
  b.c1 = weight(s[0], values[0], bias[0]);
  b.c2 = weight(s[1], values[1], bias[1]);
  b.c3 = weight(s[2], values[2], bias[2]);
  b.has_down = s[3] != nullptr;
  if (b.has_down) b.down = weight(s[3], values[3], bias[3]);
  b.pool = b.down_pool = pool;
  sparse_bottleneck(b, padded(x, n, b.c1.cin, h, w),
                    padded(out, n, b.c3.cout, h / pool, w / pool), parallel(threads));
}

int pool_round_trip(int64_t bytes) {
  void* first = pool_take(bytes);
  if (reinterpret_cast<uintptr_t>(first) % 64) return 1;
  for (int64_t i = 0; i < bytes; ++i) static_cast<char*>(first)[i] = 1;
  const int64_t used = pool_bytes();
  if (used < bytes) return 2;
  pool_give(first);
  pool_trim();
  return pool_bytes() > used - bytes ? 3 : 0;
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "").strip() or shutil.which("g++") or shutil.which("c++")
    if not compiler or shutil.which(compiler.split()[0]) is None:
        pytest.skip("no C++ compiler (g++) was found; on Debian: apt install g++")
    folder = tmp_path_factory.mktemp("csrc")
    (folder / "shim.cpp").write_text(SHIM)
    objects = []
    flags = [*compiler.split(), "-std=c++20", "-O1", "-fPIC", "-Wall", f"-I{ROOT / 'csrc'}"]
    for source in [folder / "shim.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]:
        objects.append(folder / f"{source.stem}.o")
        done = subprocess.run(
            [*flags, "-c", source, "-o", objects[-1]], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "warning" not in done.stderr, done.stderr[-3000:]
    shared = folder / "libotk.so"
    subprocess.run(
        [*compiler.split(), "-shared", *objects, "-o", shared, "-Wl,-z,defs", "-pthread"],
        check=True,
    )
    loaded = ctypes.CDLL(str(shared))
    loaded.isa.restype = ctypes.c_char_p
    loaded.plane.restype = loaded.memory.restype = ctypes.c_int64
    loaded.plane.argtypes = loaded.pool_round_trip.argtypes = (ctypes.c_int64,)
    loaded.conv.argtypes = (Int, Float, Float, Float, ctypes.c_void_p, Float, *[ctypes.c_int] * 7)
    return loaded


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
                library.conv(
                    structure, values, bias, x, address, out.data,
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

    def pointers(index: int) -> ctypes.Array:
        found = [conv[index].ctypes.data for conv in convs] + [None] * (not down)
        return (ctypes.c_void_p * 4)(*found)

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
            library.bottleneck(
                pointers(2), pointers(3), pointers(1),
                ctypes.c_void_p(source.data.ctypes.data), ctypes.c_void_p(out.data.ctypes.data),
                n, h, w, pool, threads,
            )  # fmt: skip
            assert close(out.pixels(), exact), (n, h, w, threads)
            results.append(out.pixels())
        assert np.array_equal(*results)


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
    for path in [ROOT / "csrc" / "otk.h", *(ROOT / "csrc" / "cpu").iterdir()]:
        assert not unwanted.search(path.read_text(encoding="utf-8")), path.name
