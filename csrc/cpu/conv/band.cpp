#include "band.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "pool_plane.h"
#include "run.h"
#include "subsample.h"

namespace otk {
namespace {

// Scratch that a band's intermediates should stay under.
constexpr int64_t kBandFloats = 704 * 1024;

// Zeroes the lanes behind the pixels of a scratch plane: conv3 reads them with the last vector, and
// left-over bits that happen to be denormal would slow it down.
void clear_tail(float* plane, int64_t pixels) {
  std::memset(plane + pixels, 0, sizeof(float) * ((pixels + 15) / 16 * 16 - pixels));
}

void execute(const Run& run, const Isa& isa, const Parallel* par) {
  if (par) {
    run_parallel(run, isa, *par);
    return;
  }
  Arena& local = thread_scratch().local;
  local.reset(run_scratch(run, isa));
  run_range(run, 0, units_of(run, isa), 0, run.w->n_row_blocks, isa, local);
}

template <class Body>
void each(int64_t count, const Parallel* par, Body&& body) {
  const Parallel alone{nullptr, 1};
  parallel_for(par ? *par : alone, count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace

int Band::align() const { return 16 / std::gcd(16, out.w); }

int Band::rows() const {
  const int step = align();
  const int tile = std::lcm(step, std::max(1, isa.max_vectors / block.pool));
  int rows = step;
  while (rows < std::min(tile, out.h) && floats(std::min(rows + step, out.h)) <= kBandFloats)
    rows += step;
  return std::min(rows, out.h);
}

// conv1's planes have a row above and below the band, and start at a whole cache line of x.
int64_t Band::c1_channel(int out_rows) const {
  return plane_stride(15 + int64_t{c1_rows(out_rows)} * x.w);
}
int64_t Band::mid_channel(int out_rows) const {
  return plane_stride(int64_t{mid_rows(out_rows)} * mid_width());
}
int64_t Band::pooled_channel(int out_rows) const { return plane_stride(int64_t{out_rows} * out.w); }

int64_t Band::floats(int rows) const {
  int64_t total = Arena::rounded(c1_channel(rows) * block.c1.cout) +
                  Arena::rounded(mid_channel(rows) * block.c2.cout);
  if (block.pool > 1) total += Arena::rounded(pooled_channel(rows) * block.c2.cout);
  if (shrinks()) total += Arena::rounded(pooled_channel(rows) * x.c);
  return total;
}

int64_t Band::carry_floats() const { return Arena::rounded(int64_t{2} * x.w * block.c1.cout); }

void Band::run(int o0, int o1, Arena& arena, Carry* carry, const Parallel* par) const {
  const int width = x.w, stride = block.c2.stride;
  const int rows = mid_rows(o1 - o0), r0 = o0 * block.pool, r1 = r0 + rows;
  const int64_t c1_plane = c1_channel(o1 - o0), mid_plane = mid_channel(o1 - o0);
  float* c1_out = arena.take(c1_plane * block.c1.cout);
  float* mid = arena.take(mid_plane * block.c2.cout);
  const bool carries = carry && carry->rows;

  // conv1 on the rows of the band's windows that are inside the image; whole vectors from an
  // aligned start. Rows the band above left are copied.
  const int first = std::max(0, r0 * stride - 1), last = std::min(x.h, (r1 - 1) * stride + 2);
  const int next = r1 * stride - 1;  // of the band below
  const int64_t begin = int64_t{first} * width / 16 * 16, skip = int64_t{first} * width - begin;
  int row = first;
  if (carries && r0 > 0 && carry->first == first) {
    row = std::min(first + 3 - stride, last);
    const int64_t kept = int64_t{row - first} * width;
    each(block.c1.cout, par, [&](int64_t c) {
      std::memcpy(c1_out + c * c1_plane + skip, carry->rows + c * 2 * width, sizeof(float) * kept);
    });
  }
  Run run{};
  if (row < last) {
    const int64_t at = int64_t{row} * width / 16 * 16;
    run.w = &block.c1;
    run.x = x.data + at;
    run.x_channel = x.plane_stride;
    run.positions = int64_t{last} * width - at;
    run.out = c1_out + (at - begin);
    run.out_channel = c1_plane;
    run.act.kind = kRelu;
    execute(run, isa, par);
  }
  if (carries) {
    carry->first = next;
    const float* from = c1_out + skip + int64_t{next - first} * width;
    const int64_t kept = int64_t{std::max(0, last - next)} * width;
    each(block.c1.cout, par, [&](int64_t c) {
      std::memcpy(carry->rows + c * 2 * width, from + c * c1_plane, sizeof(float) * kept);
    });
  }

  Window window(block.c2, x.h, width, r0, r1, isa);
  window.y0 = first;
  window.y1 = last;
  window.readable = c1_out;
  window.readable_end = c1_out + c1_plane * block.c1.cout;
  run = {};
  run.w = &block.c2;
  run.x = c1_out + skip;
  run.x_channel = c1_plane;
  run.window = &window;
  run.out = mid;
  run.out_channel = mid_plane;
  run.act.kind = kRelu;
  execute(run, isa, par);

  const int64_t mid_pixels = int64_t{rows} * mid_width();
  if (mid_pixels % 16)
    each(block.c2.cout, par, [&](int64_t c) { clear_tail(mid + c * mid_plane, mid_pixels); });

  const int64_t pooled_plane = pooled_channel(o1 - o0);
  const float* c3_in = mid;
  int64_t c3_channel = mid_plane;
  if (block.pool > 1) {
    float* pooled = arena.take(pooled_plane * block.c2.cout);
    each(block.c2.cout, par, [&](int64_t c) {
      pool_plane(mid + c * mid_plane, mid_width(), pooled + c * pooled_plane, o1 - o0, out.w,
                 block.pool, isa);
      clear_tail(pooled + c * pooled_plane, int64_t{o1 - o0} * out.w);
    });
    c3_in = pooled;
    c3_channel = pooled_plane;
  }

  const int64_t offset = int64_t{o0} * out.w, pixels = int64_t{o1 - o0} * out.w;
  float* result = out.data + offset;
  if (block.has_down) {
    run = {};
    run.w = &block.down;
    run.x = x.data + offset;
    run.x_channel = x.plane_stride;
    if (shrinks()) {
      float* smaller = arena.take(pooled_plane * x.c);
      each(x.c, par, [&](int64_t c) {
        const float* from = x.data + c * x.plane_stride + int64_t{o0} * block.step() * width;
        float* to = smaller + c * pooled_plane;
        if (block.down_pool > 1)
          pool_plane(from, width, to, o1 - o0, out.w, block.down_pool, isa);
        else
          subsample_plane(from, width, width, 1, to, o1 - o0, out.w, stride, isa);
        clear_tail(to, pixels);
      });
      run.x = smaller;
      run.x_channel = pooled_plane;
    }
    run.positions = pixels;
    run.out = result;
    run.out_channel = out.plane_stride;
    execute(run, isa, par);
  }

  run = {};
  run.w = &block.c3;
  run.x = c3_in;
  run.x_channel = c3_channel;
  run.positions = pixels;
  run.out = result;
  run.out_channel = out.plane_stride;
  run.residual = block.has_down ? result : x.data + offset;
  run.residual_channel = block.has_down ? out.plane_stride : x.plane_stride;
  run.act.kind = kRelu;
  execute(run, isa, par);
}

}  // namespace otk
