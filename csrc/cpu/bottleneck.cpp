// A residual bottleneck over bands of rows: the intermediates of a band stay in scratch small
// enough for L2, and only the block's output goes to memory.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "isa.h"
#include "run.h"
#include "scratch.h"

namespace otk {
namespace {

// Scratch that a band's intermediates should stay under.
constexpr int64_t kBandFloats = 448 * 1024;

struct Plan {
  const Bottleneck& block;
  const Planes &x, &out;
  const Isa& isa;

  int conv_rows(int out_rows) const { return out_rows * block.pool; }
  // conv1's planes have a row above and below the band, and start at a whole cache line of x.
  int64_t c1_channel(int out_rows) const {
    return plane_stride(15 + int64_t{conv_rows(out_rows) + 2} * x.w);
  }
  int64_t mid_channel(int out_rows) const {
    return plane_stride(int64_t{conv_rows(out_rows)} * x.w);
  }
  int64_t pooled_channel(int out_rows) const { return plane_stride(int64_t{out_rows} * out.w); }
  int64_t floats(int out_rows) const {
    int64_t total = Arena::rounded(c1_channel(out_rows) * block.c1.cout) +
                    Arena::rounded(mid_channel(out_rows) * block.c2.cout);
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
  const int64_t c1_channel = plan.c1_channel(o1 - o0);
  const int64_t mid_channel = plan.mid_channel(o1 - o0);
  float* c1_out = arena.take(c1_channel * block.c1.cout);
  float* mid = arena.take(mid_channel * block.c2.cout);
  const float* image = x.data + n * x.batch_stride;

  // conv1 on the band and one row above and below, those inside the image.
  const int first = std::max(0, r0 - 1), last = std::min(x.h, r1 + 1);
  const int64_t begin = int64_t{first} * width / 16 * 16;  // whole vectors from an aligned start
  const int64_t skip = int64_t{first} * width - begin;
  Run run{};
  run.w = &block.c1;
  run.x = image + begin;
  run.x_channel = x.plane_stride;
  run.positions = skip + int64_t{last - first} * width;
  run.out = c1_out;
  run.out_channel = c1_channel;
  run.relu = true;
  execute(run);

  Window window(block.c2, x.h, width, r0, r1, isa);
  window.y0 = first;
  window.y1 = last;
  window.readable = c1_out;
  window.readable_end = c1_out + c1_channel * block.c1.cout;
  run = {};
  run.w = &block.c2;
  run.x = c1_out + skip;
  run.x_channel = c1_channel;
  run.window = &window;
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
  const Plan plan{block, x, out, isa};
  // A band starts on a whole vector of every plane it stores to, and holds whole tiles of conv2.
  const int align = 16 / std::gcd(16, out.w);
  const int step = std::lcm(align, std::max(1, isa.max_vectors / block.pool));
  int rows = align;
  while (rows < out.h && plan.floats(std::min(rows + align, out.h)) <= kBandFloats) rows += align;
  if (rows > step) rows -= rows % step;
  if (par.threads > 1) {
    const int64_t want = (int64_t{4} * par.threads + x.n - 1) / x.n;
    const int64_t fine = std::max<int64_t>(out.h / want, 4);
    rows = std::min<int>(rows, static_cast<int>((fine + align - 1) / align * align));
  }
  rows = std::min(rows, out.h);
  const int64_t bands = (out.h + rows - 1) / rows;

  if (par.threads <= 1 || x.n * bands >= 2 * par.threads) {
    parallel_for(par, x.n * bands, [&](int64_t begin, int64_t end) {
      ThreadScratch& scratch = thread_scratch();
      for (int64_t u = begin; u < end; ++u) {
        const int o0 = static_cast<int>(u % bands) * rows, o1 = std::min(o0 + rows, out.h);
        scratch.shared.reset(plan.floats(o1 - o0));
        band(
            plan, static_cast<int>(u / bands), o0, o1, scratch.shared,
            [&](const Run& run) {
              scratch.local.reset(run_scratch(run, isa));
              run_range(run, 0, units_of(run, isa), 0, run.w->n_row_blocks, isa, scratch.local);
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
