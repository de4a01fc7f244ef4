// Convolutions and their blocks as functions that tests call: see csrc_call.h.
#include "csrc_call.h"
using namespace otk;
using calls::guarded;
using calls::Pack;
using calls::parallel;

namespace {

SparseWeight weight(const Pack& pack) {
  SparseWeight w{};
  if (read_pack(pack.structure, pack.words, &w)) throw PackError{};
  w.values = pack.values, w.bias = pack.bias;
  return w;
}

// The kernels write to outputs alone; an Array says so if not.
Planes planes(const float* data, int64_t plane, int64_t n, int64_t c, int64_t h, int64_t w,
              int64_t behind) {
  return {const_cast<float*>(data),
          c * plane,
          plane,
          w,
          1,
          static_cast<int>(n),
          static_cast<int>(c),
          static_cast<int>(h),
          static_cast<int>(w),
          n * c * plane + behind};
}
// Contiguous images of exactly n * c * h * w floats.
Planes dense(const float* data, int64_t n, int64_t c, int64_t h, int64_t w) {
  return planes(data, h * w, n, c, h, w, 0);
}
Planes padded(const float* data, int64_t n, int64_t c, int64_t h, int64_t w) {
  return planes(data, plane_stride(h * w), n, c, h, w, 16);
}

Bottleneck block(const Pack* packs, int64_t pool) {
  Bottleneck b{};
  b.c1 = weight(packs[0]), b.c2 = weight(packs[1]), b.c3 = weight(packs[2]);
  b.has_down = packs[3].structure != nullptr;
  if (b.has_down) b.down = weight(packs[3]);
  b.pool = static_cast<int>(pool), b.down_pool = b.has_down ? b.pool : 1;
  return b;
}

// Writes the instruction set in use to name [16]; 1: the one that was asked for is not to be had.
int64_t isa(char* name) {
  const char* why = nullptr;
  const char* found = cpu_capability(&why);
  std::strncpy(name, found ? found : why, 15);
  return found ? 0 : 1;
}

int64_t plane(int64_t pixels) { return plane_stride(pixels); }
int64_t memory() { return scratch_bytes() + pool_bytes(); }

int64_t conv(const Pack* pack, const float* x, const float* residual, float* out, int64_t n,
             int64_t h, int64_t w, int64_t oh, int64_t ow, int64_t act, double slope,
             int64_t threads) {
  return guarded([&] {
    const SparseWeight sw = weight(*pack);
    const Planes extra = dense(residual, n, sw.cout, oh, ow);
    sparse_conv2d(sw, dense(x, n, sw.cin, h, w), padded(out, n, sw.cout, oh, ow),
                  residual ? &extra : nullptr,
                  {static_cast<int32_t>(act), static_cast<float>(slope)}, parallel(threads));
  });
}

// Dense rows of `width` floats.
Tokens tokens(const float* data, int64_t count, int64_t width) {
  return {const_cast<float*>(data), count, width, width, 1};
}

int64_t linear(const Pack* pack, const float* x, const float* residual, float* out, int64_t count,
               int64_t act, double slope, int64_t threads) {
  return guarded([&] {
    const SparseWeight w = weight(*pack);
    const Tokens extra = tokens(residual, count, w.cout);
    sparse_linear(w, tokens(x, count, w.cin), tokens(out, count, w.cout),
                  residual ? &extra : nullptr,
                  {static_cast<int32_t>(act), static_cast<float>(slope)}, parallel(threads));
  });
}

int64_t mlp(const Pack* packs, const float* x, const float* residual, float* out, int64_t count,
            int64_t act, double slope, int64_t threads) {
  return guarded([&] {
    const SparseWeight w1 = weight(packs[0]), w2 = weight(packs[1]);
    const Tokens extra = tokens(residual, count, w2.cout);
    sparse_mlp(w1, w2, tokens(x, count, w1.cin), tokens(out, count, w2.cout),
               residual ? &extra : nullptr, {static_cast<int32_t>(act), static_cast<float>(slope)},
               parallel(threads));
  });
}

int64_t wgrad(const Pack* pack, const float* x, const float* grad, float* out, int64_t n, int64_t h,
              int64_t w, int64_t oh, int64_t ow, int64_t threads) {
  return guarded([&] {
    const SparseWeight sw = weight(*pack);
    sparse_conv2d_wgrad(sw, dense(x, n, sw.cin, h, w), dense(grad, n, sw.cout, oh, ow), out,
                        parallel(threads));
  });
}

// packs: conv1, conv2, conv3 and, unless its structure is null, the downsample.
int64_t bottleneck(const Pack* packs, const float* x, float* out, int64_t n, int64_t h, int64_t w,
                   int64_t pool, int64_t threads) {
  return guarded([&] {
    const Bottleneck b = block(packs, pool);
    sparse_bottleneck(b, padded(x, n, b.c1.cin, h, w),
                      padded(out, n, b.c3.cout, b.size(h), b.size(w)), parallel(threads));
  });
}

// Four packs and a pool per block.
int64_t stage(const Pack* packs, const int64_t* pools, int64_t count, const float* x, float* out,
              int64_t n, int64_t h, int64_t w, int64_t threads) {
  return guarded([&] {
    std::vector<Bottleneck> blocks;
    int64_t oh = h, ow = w;
    for (int64_t i = 0; i < count; ++i) {
      blocks.push_back(block(packs + 4 * i, pools[i]));
      oh = blocks.back().size(oh), ow = blocks.back().size(ow);
    }
    const Planes in = padded(x, n, blocks.front().c1.cin, h, w);
    const Planes to = padded(out, n, blocks.back().c3.cout, oh, ow);
    const int number = static_cast<int>(count);
    (void)stage_pays(blocks.data(), number, in, to, parallel(threads));
    sparse_stage(blocks.data(), number, in, to, parallel(threads));
  });
}

int64_t depthwise(const float* x, const float* weight, const float* bias, float* out, int64_t n,
                  int64_t c, int64_t h, int64_t w, int64_t oh, int64_t ow, int64_t kernel,
                  int64_t stride, int64_t padding, int64_t act, double slope, int64_t threads) {
  return guarded([&] {
    const Depthwise conv{weight,
                         bias,
                         static_cast<int>(kernel),
                         static_cast<int>(stride),
                         static_cast<int>(padding),
                         {static_cast<int32_t>(act), static_cast<float>(slope)}};
    depthwise_conv2d(conv, dense(x, n, c, h, w), padded(out, n, c, oh, ow), parallel(threads));
  });
}

// weight: transformed, of `cout` rows.
int64_t winograd(const float* x, const float* weight, const float* bias, const float* residual,
                 float* out, int64_t n, int64_t cin, int64_t cout, int64_t h, int64_t w,
                 int64_t padding, int64_t act, int64_t threads) {
  return guarded([&] {
    const Winograd conv{weight,
                        bias,
                        static_cast<int>(cin),
                        static_cast<int>(cout),
                        static_cast<int>(padding),
                        {static_cast<int32_t>(act), 0.f}};
    const int64_t oh = h + 2 * padding - 2, ow = w + 2 * padding - 2;
    const Planes extra = dense(residual, n, cout, oh, ow);
    winograd_conv2d(conv, dense(x, n, cin, h, w), padded(out, n, cout, oh, ow),
                    residual ? &extra : nullptr, parallel(threads));
  });
}

int64_t average(const float* x, float* out, int64_t n, int64_t c, int64_t h, int64_t w, int64_t k,
                int64_t threads) {
  return guarded([&] {
    avg_pool2d(dense(x, n, c, h, w), padded(out, n, c, h / k, w / k), static_cast<int>(k),
               parallel(threads));
  });
}

// geometry: window, stride and padding, each for rows and columns. divisor < 0: maxima, not means.
int64_t windows(const float* x, float* out, int64_t n, int64_t c, int64_t h, int64_t w, int64_t oh,
                int64_t ow, const int64_t* geometry, int64_t with_padding, int64_t divisor,
                int64_t threads) {
  return guarded([&] {
    PoolWindow window{};
    for (int d = 0; d < 2; ++d) {
      window.kernel[d] = static_cast<int>(geometry[d]);
      window.stride[d] = static_cast<int>(geometry[2 + d]);
      window.padding[d] = static_cast<int>(geometry[4 + d]);
    }
    const Planes in = dense(x, n, c, h, w), to = padded(out, n, c, oh, ow);
    if (divisor < 0)
      max_pool2d(in, to, window, parallel(threads));
    else
      window_avg_pool2d(in, to, window, with_padding != 0, divisor, parallel(threads));
  });
}

int64_t pool_round_trip(int64_t bytes) {
  void* first = pool_take(bytes);
  if (reinterpret_cast<uintptr_t>(first) % 64) return 1;
  for (int64_t i = 0; i < bytes; ++i) static_cast<char*>(first)[i] = 1;
  const int64_t used = pool_bytes();
  if (used < bytes) return 2;
  pool_give(first);
  pool_trim();
  return pool_bytes() > used - bytes ? 3 : 0;
}

OTK_CALLABLE(isa);
OTK_CALLABLE(plane);
OTK_CALLABLE(memory);
OTK_CALLABLE(conv);
OTK_CALLABLE(linear);
OTK_CALLABLE(mlp);
OTK_CALLABLE(wgrad);
OTK_CALLABLE(bottleneck);
OTK_CALLABLE(stage);
OTK_CALLABLE(depthwise);
OTK_CALLABLE(winograd);
OTK_CALLABLE(average);
OTK_CALLABLE(windows);
OTK_CALLABLE(pool_round_trip);

}  // namespace
