// The kernels behind C functions, for tests without torch. 0: done; 1: the pack is damaged.
#include "otk.h"
using namespace otk;

namespace {
// Ranges one by one, last first: an order that no result may depend on.
void backwards(int64_t n, void* ctx, RangeBody body) {
  for (int64_t i = n; i-- > 0;) body(ctx, i, i + 1);
}
void once(int64_t n, void* ctx, RangeBody body) { body(ctx, 0, n); }
Parallel parallel(int threads) { return {threads > 1 ? backwards : once, threads}; }

// The parts of a pack as Python passes them.
struct Pack {
  const int32_t* structure;
  int64_t words;
  const float *values, *bias;
};

SparseWeight weight(const Pack& pack) {
  SparseWeight w{};
  if (read_pack(pack.structure, pack.words, &w)) throw PackError{};
  w.values = pack.values, w.bias = pack.bias;
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

template <class Body>
int guarded(Body&& body) {
  try {
    body();
  } catch (const PackError&) {
    return 1;
  }
  return 0;
}
}  // namespace

extern "C" {
const char* isa(const char** why) { return cpu_capability(why); }
int64_t plane(int64_t pixels) { return plane_stride(pixels); }
int64_t memory() { return scratch_bytes() + pool_bytes(); }

int conv(const Pack* pack, float* x, float* residual, float* out, int n, int h, int w, int oh,
         int ow, int relu, int threads) {
  return guarded([&] {
    const SparseWeight sw = weight(*pack);
    const Planes extra = dense(residual, n, sw.cout, oh, ow);
    sparse_conv2d(sw, dense(x, n, sw.cin, h, w), padded(out, n, sw.cout, oh, ow),
                  residual ? &extra : nullptr, relu, parallel(threads));
  });
}

int wgrad(const Pack* pack, float* x, float* grad, float* out, int n, int h, int w, int oh, int ow,
          int threads) {
  return guarded([&] {
    const SparseWeight sw = weight(*pack);
    sparse_conv2d_wgrad(sw, dense(x, n, sw.cin, h, w), dense(grad, n, sw.cout, oh, ow), out,
                        parallel(threads));
  });
}

// packs: conv1, conv2, conv3 and, unless its structure is null, the downsample.
int bottleneck(const Pack* packs, float* x, float* out, int n, int h, int w, int pool, int threads,
               int as_stage) {
  return guarded([&] {
    Bottleneck b{};
    b.c1 = weight(packs[0]), b.c2 = weight(packs[1]), b.c3 = weight(packs[2]);
    b.has_down = packs[3].structure != nullptr;
    if (b.has_down) b.down = weight(packs[3]);
    b.pool = pool, b.down_pool = b.has_down ? pool : 1;
    const Planes in = padded(x, n, b.c1.cin, h, w);
    const Planes to = padded(out, n, b.c3.cout, h / pool, w / pool);
    if (as_stage)
      sparse_stage(&b, 1, in, to, parallel(threads));
    else
      sparse_bottleneck(b, in, to, parallel(threads));
  });
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
