// A convolution on its own: 1x1 with stride 1 reads the planes where they are, everything else goes
// through zero-padded grids, one band of rows at a time.
#include <algorithm>

#include "grid.h"
#include "isa.h"
#include "run.h"
#include "scratch.h"

namespace otk {
namespace {

// Scratch a band's grid should stay under, so that it is read from L2.
constexpr int64_t kBandFloats = 96 * 1024;

// May whole vectors be read from the planes of image n?
bool readable_in_place(const Planes& x, int n, const Isa& isa) {
  if (x.col_stride != 1 || (x.row_stride != x.w && x.h > 1)) return false;
  const int64_t pixels = int64_t{x.h} * x.w;
  const int64_t end = n * x.batch_stride + (x.c - 1) * x.plane_stride +
                      (pixels + isa.lanes - 1) / isa.lanes * isa.lanes;
  return end <= x.readable;
}

void pointwise(const SparseWeight& w, const Planes& x, const Planes& out, const Planes* residual,
               bool relu, const Parallel& par, const Isa& isa) {
  for (int n = 0; n < x.n; ++n) {
    const float* planes = x.data + n * x.batch_stride;
    int64_t channel = x.plane_stride;
    if (!readable_in_place(x, n, isa)) {
      Arena& shared = thread_scratch().shared;
      channel = plane_stride(int64_t{x.h} * x.w);
      shared.reset(channel * x.c);
      float* copy = shared.take(channel * x.c);
      parallel_for(par, x.c, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          float* plane = copy + c * channel;
          for (int h = 0; h < x.h; ++h)
            for (int i = 0; i < x.w; ++i)
              *plane++ = planes[c * x.plane_stride + h * x.row_stride + i * x.col_stride];
          // Left-over bits behind the pixels could be denormal, which is slow.
          std::fill(plane, copy + (c + 1) * channel, 0.f);
        }
      });
      planes = copy;
    }
    Run run{};
    run.w = &w;
    run.x = planes;
    run.x_channel = channel;
    run.positions = int64_t{out.h} * out.w;
    run.out = out.data + n * out.batch_stride;
    run.out_channel = out.plane_stride;
    run.residual = residual ? residual->data + n * residual->batch_stride : nullptr;
    run.residual_channel = residual ? residual->plane_stride : 0;
    run.relu = relu;
    if (residual && !readable_in_place(*residual, n, isa)) {
      // Residual planes without room for whole vectors: exact row segments instead.
      run.src_row = run.valid = run.dst_row = static_cast<int>(run.positions);
    }
    run_parallel(run, isa, par);
  }
}

}  // namespace

void sparse_conv2d(const SparseWeight& w, const Planes& x, const Planes& out,
                   const Planes* residual, bool relu, const Parallel& par) {
  const Isa& isa = *active_isa();
  if (x.n == 0 || out.h <= 0 || out.w <= 0 || w.cout == 0) return;
  if (w.kernel == 1 && w.stride == 1 && w.padding == 0) {
    pointwise(w, x, out, residual, relu, par, isa);
    return;
  }
  const Grid grid(w, x.h, x.w);
  const int64_t per_row = int64_t{x.c} * grid.phases * grid.phases * grid.row;
  int band = static_cast<int>(std::clamp<int64_t>(kBandFloats / per_row - grid.reach, 1, out.h));
  if (par.threads > 1) {
    const int64_t want = (int64_t{4} * par.threads + x.n - 1) / x.n;
    band = static_cast<int>(std::clamp<int64_t>(band, 1, std::max<int64_t>(4, out.h / want)));
  }
  band = std::min(band, out.h);
  const int64_t bands = (out.h + band - 1) / band;
  const int kk = w.kernel * w.kernel;

  auto make_run = [&](const float* packed, const uint32_t* taps, int n, int r0, int r1) {
    Run run{};
    run.w = &w;
    run.x = packed;
    run.x_channel = grid.channel_floats(r1 - r0, isa.lanes);
    run.tap_bytes = taps;
    run.positions = grid.positions(r1 - r0);
    run.src_row = grid.row;
    run.valid = out.w;
    run.dst_row = out.w;
    const int64_t offset = int64_t{r0} * out.w;
    run.out = out.data + n * out.batch_stride + offset;
    run.out_channel = out.plane_stride;
    run.residual = residual ? residual->data + n * residual->batch_stride + offset : nullptr;
    run.residual_channel = residual ? residual->plane_stride : 0;
    run.relu = relu;
    return run;
  };

  if (par.threads <= 1 || x.n * bands >= 2 * par.threads) {
    parallel_for(par, x.n * bands, [&](int64_t begin, int64_t end) {
      Arena& local = thread_scratch().local;
      for (int64_t u = begin; u < end; ++u) {
        const int n = static_cast<int>(u / bands);
        const int r0 = static_cast<int>(u % bands) * band, r1 = std::min(r0 + band, out.h);
        const int64_t channel = grid.channel_floats(r1 - r0, isa.lanes);
        local.reset(Arena::rounded(channel * x.c) + Arena::rounded(w.chunk * kk) +
                    run_scratch(w, isa));
        float* packed = local.take(channel * x.c);
        auto* taps = reinterpret_cast<uint32_t*>(local.take(w.chunk * kk));
        grid.tap_bytes(w.chunk, r1 - r0, isa.lanes, taps);
        for (int c = 0; c < x.c; ++c) grid.pack(x, n, c, r0, r1, isa.lanes, packed + c * channel);
        const Run run = make_run(packed, taps, n, r0, r1);
        run_range(run, 0, vectors_of(run, isa), 0, w.n_row_blocks, isa, local);
      }
    });
    return;
  }
  // Too few bands to share out: whole images, channels of the copy and output rows in parallel.
  Arena& shared = thread_scratch().shared;
  const int64_t channel = grid.channel_floats(out.h, isa.lanes);
  shared.reset(Arena::rounded(channel * x.c) + Arena::rounded(w.chunk * kk));
  float* packed = shared.take(channel * x.c);
  auto* taps = reinterpret_cast<uint32_t*>(shared.take(w.chunk * kk));
  grid.tap_bytes(w.chunk, out.h, isa.lanes, taps);
  for (int n = 0; n < x.n; ++n) {
    parallel_for(par, x.c, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        grid.pack(x, n, static_cast<int>(c), 0, out.h, isa.lanes, packed + c * channel);
    });
    run_parallel(make_run(packed, taps, n, 0, out.h), isa, par);
  }
}

void sparse_conv2d_wgrad(const SparseWeight& w, const Planes& x, const Planes& grad_out,
                         float* grad_values, const Parallel& par) {
  const Isa& isa = *active_isa();
  std::fill(grad_values, grad_values + w.nnz, 0.f);
  if (x.n == 0 || grad_out.h <= 0 || grad_out.w <= 0) return;
  const Grid grid(w, x.h, x.w);
  const int rows = grad_out.h, kk = w.kernel * w.kernel;
  const int64_t channel = grid.channel_floats(rows, isa.lanes);
  const int64_t positions = grid.positions(rows);
  const int64_t vectors = (positions + isa.lanes - 1) / isa.lanes;
  const int64_t grad_channel = plane_stride(vectors * isa.lanes);
  Arena& shared = thread_scratch().shared;
  shared.reset(Arena::rounded(channel * x.c) + Arena::rounded(grad_channel * w.cout) +
               Arena::rounded(w.chunk * kk));
  float* packed = shared.take(channel * x.c);
  float* grad = shared.take(grad_channel * w.cout);
  auto* taps = reinterpret_cast<uint32_t*>(shared.take(w.chunk * kk));
  grid.tap_bytes(w.chunk, rows, isa.lanes, taps);
  const int64_t n_sub = (vectors + isa.max_vectors - 1) / isa.max_vectors;
  for (int n = 0; n < x.n; ++n) {
    parallel_for(par, x.c, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        grid.pack(x, n, static_cast<int>(c), 0, rows, isa.lanes, packed + c * channel);
    });
    // The gradient on the same positions, zero wherever a position is not a pixel.
    parallel_for(par, w.cout, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        float* plane = grad + o * grad_channel;
        std::fill(plane, plane + grad_channel, 0.f);
        const float* src = grad_out.data + n * grad_out.batch_stride + o * grad_out.plane_stride;
        for (int h = 0; h < rows; ++h)
          for (int i = 0; i < grad_out.w; ++i)
            plane[int64_t{h} * grid.row + i] =
                src[h * grad_out.row_stride + i * grad_out.col_stride];
      }
    });
    // Blocks own disjoint nonzeros.
    parallel_for(par, int64_t{w.n_row_blocks} * w.n_chunks, [&](int64_t begin, int64_t end) {
      Arena& local = thread_scratch().local;
      for (int64_t b = begin; b < end; ++b) {
        const int32_t* block = w.blocks + 2 * b;
        GradArgs a{};
        local.reset(block[3] - block[1]);
        auto* offsets = reinterpret_cast<uint32_t*>(local.take(block[3] - block[1]));
        isa.decode(w.codes + block[1], block[3] - block[1], taps, 0, offsets);
        a.offsets = offsets;
        a.entries = w.entries + block[0];
        a.n_entries = block[2] - block[0];
        a.grad_values = grad_values + block[1];
        a.grad_stride = grad_channel;
        const int64_t c = b % w.n_chunks, row0 = b / w.n_chunks * w.row_block;
        for (int64_t s = 0; s < n_sub; ++s) {
          const int64_t first = vectors * s / n_sub, last = vectors * (s + 1) / n_sub;
          a.vectors = static_cast<int32_t>(last - first);
          a.x = packed + c * w.chunk * channel + first * isa.lanes;
          a.grad_out = grad + row0 * grad_channel + first * isa.lanes;
          isa.grad(a);
        }
      }
    });
  }
}

}  // namespace otk
