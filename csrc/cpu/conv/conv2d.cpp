// A convolution on its own: 1x1 with stride 1 reads the planes where they are, with another stride
// a copy of the pixels it needs; everything else goes through windows.
#include <algorithm>

#include "../support/scratch.h"
#include "isa.h"
#include "run.h"
#include "subsample.h"

namespace otk {
namespace {

// The window of a whole image of `x`.
Window window_of(const SparseWeight& w, const Planes& x, const Planes& out, const Isa& isa) {
  Window window(w, x.h, x.w, 0, out.h, isa);
  window.row_stride = x.row_stride;
  window.col_stride = x.col_stride;
  window.readable = x.data;
  window.readable_end = x.data + x.readable;
  return window;
}

// May whole vectors be read from the planes of image n?
bool readable_in_place(const Planes& x, int n, const Isa& isa) {
  if (x.col_stride != 1 || (x.row_stride != x.w && x.h > 1)) return false;
  const int64_t pixels = int64_t{x.h} * x.w;
  const int64_t end = n * x.batch_stride + (x.c - 1) * x.plane_stride +
                      (pixels + isa.lanes - 1) / isa.lanes * isa.lanes;
  return end <= x.readable;
}

void pointwise(const SparseWeight& w, const Planes& x, const Planes& out, const Planes* residual,
               const Activation& act, const Parallel& par, const Isa& isa) {
  for (int n = 0; n < x.n; ++n) {
    const float* planes = x.data + n * x.batch_stride;
    int64_t channel = x.plane_stride;
    if (w.stride > 1 || !readable_in_place(x, n, isa)) {
      Arena& shared = thread_scratch().shared;
      channel = plane_stride(int64_t{out.h} * out.w);
      shared.reset(channel * x.c);
      float* copy = shared.take(channel * x.c);
      parallel_for(par, x.c, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          float* plane = copy + c * channel;
          subsample_plane(planes + c * x.plane_stride, x.w, x.row_stride, x.col_stride, plane,
                          out.h, out.w, w.stride, isa);
          // Left-over bits behind the pixels could be denormal, which is slow.
          std::fill(plane + int64_t{out.h} * out.w, plane + channel, 0.f);
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
    run.act = act;
    if (residual && !readable_in_place(*residual, n, isa)) {
      run.exact = true;
    }
    run_parallel(run, isa, par);
  }
}

}  // namespace

void sparse_conv2d(const SparseWeight& w, const Planes& x, const Planes& out,
                   const Planes* residual, const Activation& act, const Parallel& par) {
  const Isa& isa = active_isa();
  if (x.n == 0 || out.h <= 0 || out.w <= 0 || w.cout == 0) return;
  if (w.kernel == 1 && w.padding == 0) {
    pointwise(w, x, out, residual, act, par, isa);
    return;
  }
  const Window window = window_of(w, x, out, isa);
  for (int n = 0; n < x.n; ++n) {
    Run run{};
    run.w = &w;
    run.x = x.data + n * x.batch_stride;
    run.x_channel = x.plane_stride;
    run.window = &window;
    run.out = out.data + n * out.batch_stride;
    run.out_channel = out.plane_stride;
    run.residual = residual ? residual->data + n * residual->batch_stride : nullptr;
    run.residual_channel = residual ? residual->plane_stride : 0;
    run.act = act;
    run_parallel(run, isa, par);
  }
}

void sparse_conv2d_wgrad(const SparseWeight& w, const Planes& x, const Planes& grad_out,
                         float* grad_values, const Parallel& par) {
  const Isa& isa = active_isa();
  std::fill(grad_values, grad_values + w.nnz, 0.f);
  if (x.n == 0 || grad_out.h <= 0 || grad_out.w <= 0) return;
  const Window window = window_of(w, x, grad_out, isa);
  // The gradient's tiles are those of the outputs: a 1x1 window over grad_out, zero wherever a
  // vector holds no pixel.
  Window grad_window = window;
  grad_window.kernel = grad_window.stride = grad_window.phases = 1;
  grad_window.padding = grad_window.reach = 0;
  grad_window.w = grad_out.w;
  grad_window.y1 = grad_out.h;
  grad_window.row_stride = grad_out.row_stride;
  grad_window.col_stride = grad_out.col_stride;
  grad_window.readable = grad_out.data;
  grad_window.readable_end = grad_out.data + grad_out.readable;
  const int64_t stage_floats = w.chunk * window.channel_floats();
  const int64_t grad_floats = w.row_block * grad_window.channel_floats();
  // Blocks own disjoint nonzeros.
  parallel_for(par, int64_t{w.n_row_blocks} * w.n_chunks, [&](int64_t begin, int64_t end) {
    Arena& local = thread_scratch().local;
    for (int64_t i = begin; i < end; ++i) {
      const int b = static_cast<int>(i / w.n_chunks), chunk = static_cast<int>(i % w.n_chunks);
      const int32_t* block = block_of(w, b, chunk);
      const int64_t nnz = block[3] - block[1];
      check_entries(w, b, chunk, isa);
      if (nnz == 0) continue;
      local.reset(Arena::rounded(nnz) + Arena::rounded(int64_t{w.chunk} * w.kernel * w.kernel) +
                  Arena::rounded(stage_floats) + Arena::rounded(grad_floats));
      auto* offsets = reinterpret_cast<uint32_t*>(local.take(nnz));
      auto* table = reinterpret_cast<uint32_t*>(local.take(int64_t{w.chunk} * w.kernel * w.kernel));
      float* stage = local.take(stage_floats);
      float* grad = local.take(grad_floats);
      const CodeMap map = window.code_map(w.chunk, table);
      decode_block(w, b, chunk, isa, map, offsets);
      GradArgs a{};
      a.x = stage;
      a.offsets = offsets;
      a.entries = w.entries + block[0];
      a.n_entries = block[2] - block[0];
      a.grad_values = grad_values + block[1];
      a.grad_out = grad;
      a.grad_stride = grad_window.channel_floats();
      const int c = chunk * w.chunk, row0 = b * w.row_block;
      for (int n = 0; n < x.n; ++n)
        for (int64_t t = 0; t < window.tiles(); ++t) {
          const Window::Tile tile = window.tile(t);
          // Rows past the tile's belong to the next one.
          Window grad_tile = grad_window;
          grad_tile.y1 = tile.row + tile.rows;
          window.stage(isa, &tile, 1, x.data + n * x.batch_stride + c * x.plane_stride,
                       x.plane_stride, std::min(w.chunk, w.cin - c), &stage);
          grad_tile.stage(isa, &tile, 1,
                          grad_out.data + n * grad_out.batch_stride + row0 * grad_out.plane_stride,
                          grad_out.plane_stride, std::min(w.row_block, w.cout - row0), &grad);
          a.vectors = tile.vectors;
          isa.grad(a);
        }
    }
  });
}

}  // namespace otk
