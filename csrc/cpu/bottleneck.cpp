// A residual bottleneck over bands of rows: the intermediates of a band stay in scratch small
// enough for L2, conv1 writes straight into the zero-padded grid that the 3x3 reads, and only the
// block's output goes to memory.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "grid.h"
#include "isa.h"
#include "run.h"
#include "scratch.h"

namespace otk {
namespace {

// Scratch that a band's intermediates should stay under.
constexpr int64_t kBandFloats = 96 * 1024;

struct Plan {
  const Bottleneck& block;
  const Planes &x, &out;
  const Isa& isa;
  Grid grid;

  int conv_rows(int out_rows) const { return out_rows * block.pool; }
  int64_t grid_channel(int out_rows) const {
    return grid.channel_floats(conv_rows(out_rows), isa.lanes);
  }
  int64_t mid_channel(int out_rows) const {
    return plane_stride(int64_t{conv_rows(out_rows)} * x.w);
  }
  int64_t pooled_channel(int out_rows) const { return plane_stride(int64_t{out_rows} * out.w); }
  int64_t floats(int out_rows) const {
    int64_t total = Arena::rounded(grid_channel(out_rows) * block.c1.cout) +
                    Arena::rounded(mid_channel(out_rows) * block.c2.cout) +
                    Arena::rounded(int64_t{block.c2.chunk} * 9);
    if (block.pool > 1) total += Arena::rounded(pooled_channel(out_rows) * block.c2.cout);
    if (block.down_pool > 1) total += Arena::rounded(pooled_channel(out_rows) * x.c);
    return total;
  }
};

void pool_plane(const float* src, int64_t src_row, float* dst, int rows, int cols, int k,
                const Isa& isa) {
  if (k == 2) {
    for (int r = 0; r < rows; ++r)
      isa.pool2(src + 2 * r * src_row, src + (2 * r + 1) * src_row, dst + int64_t{r} * cols, cols);
    return;
  }
  const float scale = 1.f / static_cast<float>(k * k);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) {
      float sum = 0.f;
      for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j) sum += src[(int64_t{r} * k + i) * src_row + c * k + j];
      dst[int64_t{r} * cols + c] = sum * scale;
    }
}

// Zeroes the lanes behind the pixels of a scratch plane: conv3 reads them with the last vector, and
// left-over bits that happen to be denormal would slow it down.
void clear_tail(float* plane, int64_t pixels) {
  std::memset(plane + pixels, 0, sizeof(float) * ((pixels + 15) / 16 * 16 - pixels));
}

// Output rows [o0, o1) of image n. `execute(run)` runs a convolution, `each(n, body)` a loop.
template <class Execute, class Each>
void band(const Plan& plan, int n, int o0, int o1, Arena& arena, Execute&& execute, Each&& each) {
  const Bottleneck& block = plan.block;
  const Planes &x = plan.x, &out = plan.out;
  const Isa& isa = plan.isa;
  const int width = x.w, rows = plan.conv_rows(o1 - o0), r0 = o0 * block.pool, r1 = r0 + rows;
  const int64_t grid_channel = plan.grid_channel(o1 - o0);
  const int64_t mid_channel = plan.mid_channel(o1 - o0);
  float* grid = arena.take(grid_channel * block.c1.cout);
  float* mid = arena.take(mid_channel * block.c2.cout);
  auto* taps = reinterpret_cast<uint32_t*>(arena.take(int64_t{block.c2.chunk} * 9));
  plan.grid.tap_bytes(block.c2.chunk, rows, isa.lanes, taps);
  const float* image = x.data + n * x.batch_stride;
  const int grid_row = plan.grid.row;  // width + 1; column 0 is the zero between two rows

  // conv1 on the band and one row above and below, those inside the image.
  const int first = std::max(0, r0 - 1), last = std::min(x.h, r1 + 1);
  const int64_t begin = int64_t{first} * width / 16 * 16;  // whole vectors from an aligned start
  each(block.c1.cout, [&](int64_t c) {
    float* g = grid + c * grid_channel;
    for (int r = 0; r < rows + 2; ++r) {
      const int y = r0 - 1 + r;
      if (y < 0 || y >= x.h)
        std::memset(g + int64_t{r} * grid_row, 0, sizeof(float) * grid_row);
      else
        g[int64_t{r} * grid_row] = 0.f;
    }
    float* tail = g + int64_t{rows + 2} * grid_row;
    std::memset(tail, 0, sizeof(float) * (grid_channel - (tail - g)));
  });
  Run run{};
  run.w = &block.c1;
  run.x = image + begin;
  run.x_channel = x.plane_stride;
  run.skip = static_cast<int>(int64_t{first} * width - begin);
  run.positions = run.skip + int64_t{last - first} * width;
  run.src_row = run.valid = width;
  run.out = grid + int64_t{first - (r0 - 1)} * grid_row + 1;
  run.out_channel = grid_channel;
  run.dst_row = grid_row;
  run.relu = true;
  execute(run);

  run = {};
  run.w = &block.c2;
  run.x = grid;
  run.x_channel = grid_channel;
  run.tap_bytes = taps;
  run.positions = plan.grid.positions(rows);
  run.src_row = grid_row;
  run.valid = run.dst_row = width;
  run.out = mid;
  run.out_channel = mid_channel;
  run.relu = true;
  execute(run);

  const int64_t mid_pixels = int64_t{rows} * width;
  if (mid_pixels % 16)
    each(block.c2.cout, [&](int64_t c) { clear_tail(mid + c * mid_channel, mid_pixels); });

  const int64_t pooled_channel = plan.pooled_channel(o1 - o0);
  const float* c3_in = mid;
  int64_t c3_channel = mid_channel;
  if (block.pool > 1) {
    float* pooled = arena.take(pooled_channel * block.c2.cout);
    each(block.c2.cout, [&](int64_t c) {
      pool_plane(mid + c * mid_channel, width, pooled + c * pooled_channel, o1 - o0, out.w,
                 block.pool, isa);
      clear_tail(pooled + c * pooled_channel, int64_t{o1 - o0} * out.w);
    });
    c3_in = pooled;
    c3_channel = pooled_channel;
  }

  const int64_t offset = int64_t{o0} * out.w, pixels = int64_t{o1 - o0} * out.w;
  float* result = out.data + n * out.batch_stride + offset;
  if (block.has_down) {
    run = {};
    run.w = &block.down;
    run.x = image + offset;
    run.x_channel = x.plane_stride;
    if (block.down_pool > 1) {
      float* pooled = arena.take(pooled_channel * x.c);
      each(x.c, [&](int64_t c) {
        pool_plane(image + c * x.plane_stride + int64_t{o0} * block.down_pool * width, width,
                   pooled + c * pooled_channel, o1 - o0, out.w, block.down_pool, isa);
        clear_tail(pooled + c * pooled_channel, int64_t{o1 - o0} * out.w);
      });
      run.x = pooled;
      run.x_channel = pooled_channel;
    }
    run.positions = pixels;
    run.out = result;
    run.out_channel = out.plane_stride;
    execute(run);
  }

  run = {};
  run.w = &block.c3;
  run.x = c3_in;
  run.x_channel = c3_channel;
  run.positions = pixels;
  run.out = result;
  run.out_channel = out.plane_stride;
  run.residual = block.has_down ? result : image + offset;
  run.residual_channel = block.has_down ? out.plane_stride : x.plane_stride;
  run.relu = true;
  execute(run);
}

}  // namespace

void sparse_bottleneck(const Bottleneck& block, const Planes& x, const Planes& out,
                       const Parallel& par) {
  const Isa& isa = *active_isa();
  if (x.n == 0 || out.h <= 0 || out.w <= 0) return;
  const Plan plan{block, x, out, isa, Grid(block.c2, x.h, x.w)};
  // A band starts on a whole vector of every plane it stores to.
  const int step = 16 / std::gcd(16, out.w);
  int rows = step;
  while (rows < out.h && plan.floats(std::min(rows + step, out.h)) <= kBandFloats) rows += step;
  if (par.threads > 1) {
    const int64_t want = (int64_t{4} * par.threads + x.n - 1) / x.n;
    const int64_t fine = std::max<int64_t>(out.h / want, 4);
    rows = std::min<int>(rows, static_cast<int>((fine + step - 1) / step * step));
  }
  rows = std::min(rows, out.h);
  const int64_t bands = (out.h + rows - 1) / rows;
  const int64_t local_floats =
      std::max({run_scratch(block.c1, isa), run_scratch(block.c2, isa), run_scratch(block.c3, isa),
                block.has_down ? run_scratch(block.down, isa) : 0});

  if (par.threads <= 1 || x.n * bands >= 2 * par.threads) {
    parallel_for(par, x.n * bands, [&](int64_t begin, int64_t end) {
      ThreadScratch& scratch = thread_scratch();
      for (int64_t u = begin; u < end; ++u) {
        const int o0 = static_cast<int>(u % bands) * rows, o1 = std::min(o0 + rows, out.h);
        scratch.shared.reset(plan.floats(o1 - o0));
        band(
            plan, static_cast<int>(u / bands), o0, o1, scratch.shared,
            [&](const Run& run) {
              scratch.local.reset(local_floats);
              run_range(run, 0, vectors_of(run, isa), 0, run.w->n_row_blocks, isa, scratch.local);
            },
            [](int64_t count, auto&& body) {
              for (int64_t i = 0; i < count; ++i) body(i);
            });
      }
    });
    return;
  }
  // Too few bands: one image at a time, each convolution split over output rows and sub-tiles.
  for (int n = 0; n < x.n; ++n) {
    Arena& shared = thread_scratch().shared;
    shared.reset(plan.floats(out.h));
    band(
        plan, n, 0, out.h, shared, [&](const Run& run) { run_parallel(run, isa, par); },
        [&](int64_t count, auto&& body) {
          parallel_for(par, count, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) body(i);
          });
        });
  }
}

void avg_pool2d(const Planes& x, const Planes& out, int k, const Parallel& par) {
  const Isa& isa = *active_isa();
  parallel_for(par, int64_t{x.n} * x.c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pool_plane(x.data + i / x.c * x.batch_stride + i % x.c * x.plane_stride, x.row_stride,
                 out.data + i / x.c * out.batch_stride + i % x.c * out.plane_stride, out.h, out.w,
                 k, isa);
  });
}

}  // namespace otk
