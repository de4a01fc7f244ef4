// Multi-scale deformable attention, head by head.
//
// A head's values lie among those of all heads, D floats in M * D: neighbouring pixels share few
// sets of the L1 cache. They are first copied into a map of their own (deform.h), which is what is
// read from then on, four corners for every point. Every number is computed in one order, however
// the work is split.
#include <algorithm>
#include <cstring>

#include "../../otk.h"
#include "../support/capability.h"
#include "../support/parallel.h"
#include "../support/scratch.h"
#include "deform.h"

namespace otk {

extern const DeformIsa deform_avx2, deform_avx512, deform_neon, deform_generic;

namespace {

const DeformIsa& deform_isa() {
  switch (capability()) {
#if defined(__x86_64__)
    case Capability::kAvx512:
      return deform_avx512;
    case Capability::kAvx2:
      return deform_avx2;
#elif defined(__aarch64__)
    case Capability::kNeon:
      return deform_neon;
#endif
    default:
      return deform_generic;
  }
}

constexpr int64_t kQueries = 256;  // of one unit of work, where heads are shared between threads

// Both are 0 if either is.
int64_t height_of(const DeformAttn& a, int64_t level) {
  return a.shapes[2 * level + 1] ? a.shapes[2 * level] : 0;
}
int64_t width_of(const DeformAttn& a, int64_t level) {
  return a.shapes[2 * level] ? a.shapes[2 * level + 1] : 0;
}

int64_t pixel_floats(const DeformAttn& a, const DeformIsa& isa) {
  return (a.d + isa.lanes - 1) / isa.lanes * isa.lanes;
}

int64_t map_pixels(const DeformAttn& a) {
  int64_t pixels = 1;
  for (int64_t l = 0; l < a.levels; ++l) pixels += (height_of(a, l) + 2) * (width_of(a, l) + 2);
  return pixels;
}

// Row `row` (frame included) of a level of head m of image n, from and to its place in a map.
struct MapRow {
  int64_t level, row, first_pixel, first_source;
};
template <class Body>
void for_rows(const DeformAttn& a, Body&& body) {
  int64_t pixel = 0, source = 0;
  for (int64_t l = 0; l < a.levels; ++l) {
    const int64_t h = height_of(a, l), w = width_of(a, l);
    for (int64_t r = 0; r < h + 2; ++r)
      body(MapRow{l, r, pixel + r * (w + 2), r > 0 && r <= h ? source + (r - 1) * w : -1});
    pixel += (h + 2) * (w + 2);
    source += h * w;
  }
}

void fill_row(const DeformAttn& a, const MapRow& row, int64_t n, int64_t m, int64_t pixel,
              float* map) {
  const int64_t w = width_of(a, row.level);
  float* to = map + row.first_pixel * pixel;
  if (row.first_source < 0) {
    std::fill(to, to + (w + 2) * pixel, 0.f);
    return;
  }
  std::fill(to, to + pixel, 0.f);
  std::fill(to + (w + 1) * pixel, to + (w + 2) * pixel, 0.f);
  const float* from = a.value + n * a.value_n + row.first_source * a.value_s + m * a.value_m;
  to += pixel;
  for (int64_t x = 0; x < w; ++x, from += a.value_s, to += pixel) {
    __builtin_prefetch(from + 8 * a.value_s);
    __builtin_prefetch(from + 8 * a.value_s + 16);
    std::copy(from, from + a.d, to);
    std::fill(to + a.d, to + pixel, 0.f);
  }
}

void fill_map(const DeformAttn& a, int64_t n, int64_t m, int64_t pixel, float* map) {
  for_rows(a, [&](const MapRow& row) { fill_row(a, row, n, m, pixel, map); });
  float* last = map + (map_pixels(a) - 1) * pixel;
  std::fill(last, last + pixel, 0.f);
}

// The arrays of one block of queries; what depends on the level alone is filled once.
struct Block {
  PointBlock points;
  Placement* levels;
  int64_t k;  // points of a query
  float *dots, *grad_weights, *grad_locations;
};

// Floats that a Block takes.
int64_t block_floats(const DeformAttn& a, const DeformIsa& isa) {
  return 22 * Arena::rounded(isa.lanes * a.levels * a.points) + Arena::rounded(4 * a.levels);
}

Block new_block(const DeformAttn& a, const DeformIsa& isa, int64_t pixel, Arena& arena) {
  Block b{};
  b.k = a.levels * a.points;
  const int64_t count = isa.lanes * b.k;
  const auto take = [&](int64_t arrays) { return arena.take(arrays * count); };
  const auto take_ints = [&] { return reinterpret_cast<int32_t*>(take(1)); };
  float *width = take(1), *height = take(1);
  int32_t *pitch = take_ints(), *first = take_ints();
  b.points = {count,   width,       height,  pitch,   first, take(2),
              take(1), take_ints(), take(1), take(1), {},    take_ints()};
  for (float*& share : b.points.share) share = take(1);
  b.dots = take(4);
  b.grad_weights = take(1);
  b.grad_locations = take(2);
  static_assert(sizeof(Placement) == 4 * sizeof(float));
  b.levels = reinterpret_cast<Placement*>(arena.take(4 * a.levels));
  int64_t pixels = 0, i = 0;
  for (int64_t l = 0; l < a.levels; ++l) {
    const auto h = static_cast<float>(height_of(a, l)), w = static_cast<float>(width_of(a, l));
    b.levels[l] = {{-0.5f, -0.5f}, {w, h}};
    for (int64_t p = 0; p < a.points; ++p, ++i) {
      width[i] = w;
      height[i] = h;
      pitch[i] = static_cast<int32_t>((width_of(a, l) + 2) * pixel);
      first[i] = static_cast<int32_t>(pixels);
    }
    pixels += (height_of(a, l) + 2) * (width_of(a, l) + 2);
  }
  for (; i < count; ++i) {
    width[i] = width[i - b.k];
    height[i] = height[i - b.k];
    pitch[i] = pitch[i - b.k];
    first[i] = first[i - b.k];
  }
  return b;
}

// Where the points around the reference of a query are, instead of around a location in [0, 1].
void refer(const DeformAttn& a, int64_t n, int64_t query, Placement* levels) {
  for (int64_t l = 0; l < a.levels; ++l) {
    const float* at = a.reference + n * a.reference_n + query * a.reference_q + l * a.reference_l;
    const float size[2] = {static_cast<float>(width_of(a, l)), static_cast<float>(height_of(a, l))};
    for (int axis = 0; axis < 2; ++axis) {
      levels[l].shift[axis] = at[axis] * size[axis] - 0.5f;
      levels[l].scale[axis] = a.reference_size == 4
                                  ? size[axis] * at[2 + axis] * 0.5f / static_cast<float>(a.points)
                                  : 1.f;
    }
  }
}

// Reads the points of `queries` queries from `first` on; the rest of the block repeats the last.
void read_points(const DeformAttn& a, const DeformIsa& isa, int64_t n, int64_t m, int64_t first,
                 int64_t queries, const Block& b) {
  const float* locations = a.locations + n * a.locations_n + m * a.locations_m;
  const float* weights = a.weights + n * a.weights_n + m * a.weights_m;
  for (int64_t q = 0; q < isa.lanes; ++q) {
    const int64_t query = first + std::min(q, queries - 1);
    // A head's points lie far apart: no hardware foresees them.
    if (const int64_t next = first + isa.lanes + q; next < a.q) {
      const char* ahead = reinterpret_cast<const char*>(locations + next * a.locations_q);
      for (int64_t byte = 0; byte < 8 * b.k; byte += 64) __builtin_prefetch(ahead + byte);
      __builtin_prefetch(ahead + 8 * b.k - 1);
      ahead = reinterpret_cast<const char*>(weights + next * a.weights_q);
      for (int64_t byte = 0; byte < 4 * b.k; byte += 64) __builtin_prefetch(ahead + byte);
    }
    if (a.reference) refer(a, n, query, b.levels);
    isa.place({locations + query * a.locations_q, weights + query * a.weights_q, b.levels, a.levels,
               a.points, b.points.coordinates + q * 2 * b.k, b.points.weights + q * b.k});
  }
  if (a.reference) isa.softmax(b.points.weights, isa.lanes, b.k);
  isa.locate(b.points);
}

SampleArgs sample_args(const DeformAttn& a, const Block& b, const float* map, int64_t pixel,
                       int64_t queries, float* out) {
  const PointBlock& p = b.points;
  return {map,
          pixel,
          queries,
          b.k,
          p.corner,
          p.pitch,
          {p.share[0], p.share[1], p.share[2], p.share[3]},
          out,
          a.m * a.d,
          a.d};
}

// Queries [q0, q1) of head m of image n.
void sample_head(const DeformAttn& a, const DeformIsa& isa, int64_t n, int64_t m, int64_t q0,
                 int64_t q1, const float* map, int64_t pixel, float* out, Arena& arena) {
  const int64_t mark = arena.used();
  const Block b = new_block(a, isa, pixel, arena);
  for (int64_t q = q0; q < q1; q += isa.lanes) {
    const int64_t queries = std::min<int64_t>(isa.lanes, q1 - q);
    read_points(a, isa, n, m, q, queries, b);
    isa.sample(sample_args(a, b, map, pixel, queries, out + ((n * a.q + q) * a.m + m) * a.d));
  }
  arena.rewind(mark);
}

bool empty(const DeformAttn& a) { return a.n * a.q * a.m * a.d == 0; }

}  // namespace

void ms_deform_attn(const DeformAttn& a, float* out, const Parallel& par) {
  if (empty(a)) return;
  const DeformIsa& isa = deform_isa();
  const int64_t pixel = pixel_floats(a, isa), heads = a.n * a.m;
  const int64_t floats = map_pixels(a) * pixel;
  if (a.levels * a.points == 0) {
    std::fill(out, out + a.n * a.q * a.m * a.d, 0.f);
    return;
  }
  if (par.threads <= 1 || heads % par.threads == 0 || heads >= 8 * par.threads) {
    parallel_for(par, heads, [&](int64_t begin, int64_t end) {
      Arena& arena = thread_scratch().local;
      arena.reset(Arena::rounded(floats) + block_floats(a, isa));
      float* map = arena.take(floats);
      for (int64_t i = begin; i < end; ++i) {
        fill_map(a, i / a.m, i % a.m, pixel, map);
        sample_head(a, isa, i / a.m, i % a.m, 0, a.q, map, pixel, out, arena);
      }
    });
    return;
  }
  // Fewer heads than would keep all threads busy: all maps of an image first.
  Arena& shared = thread_scratch().shared;
  shared.reset(a.m * Arena::rounded(floats));
  float* maps = shared.take(a.m * Arena::rounded(floats));
  const int64_t parts = (a.q + kQueries - 1) / kQueries;
  for (int64_t n = 0; n < a.n; ++n) {
    parallel_for(par, a.m, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        fill_map(a, n, m, pixel, maps + m * Arena::rounded(floats));
    });
    parallel_for(par, a.m * parts, [&](int64_t begin, int64_t end) {
      Arena& arena = thread_scratch().local;
      arena.reset(block_floats(a, isa));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m = i / parts, q = i % parts * kQueries;
        sample_head(a, isa, n, m, q, std::min(a.q, q + kQueries), maps + m * Arena::rounded(floats),
                    pixel, out, arena);
      }
    });
  }
}

void ms_deform_attn_backward(const DeformAttn& a, const float* grad, float* grad_value,
                             float* grad_locations, float* grad_weights, const Parallel& par) {
  const DeformIsa& isa = deform_isa();
  const int64_t pixel = pixel_floats(a, isa), k = a.levels * a.points;
  const int64_t floats = map_pixels(a) * pixel;
  parallel_for(par, a.n * a.m, [&](int64_t begin, int64_t end) {
    Arena& arena = thread_scratch().local;
    arena.reset(2 * Arena::rounded(floats) + block_floats(a, isa));
    float *map = arena.take(floats), *grad_map = arena.take(floats);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / a.m, m = i % a.m, mark = arena.used();
      fill_map(a, n, m, pixel, map);
      std::fill(grad_map, grad_map + floats, 0.f);
      const Block b = new_block(a, isa, pixel, arena);
      for (int64_t q = 0; k && q < a.q; q += isa.lanes) {
        const int64_t queries = std::min<int64_t>(isa.lanes, a.q - q);
        read_points(a, isa, n, m, q, queries, b);
        const int64_t count = b.points.count, first = (n * a.q + q) * a.m + m;
        std::fill(b.dots, b.dots + 4 * count, 0.f);
        float* const dots[4] = {b.dots, b.dots + count, b.dots + 2 * count, b.dots + 3 * count};
        isa.scatter({sample_args(a, b, map, pixel, queries, nullptr),
                     grad + first * a.d,
                     grad_map,
                     {dots[0], dots[1], dots[2], dots[3]}});
        isa.finish(
            {&b.points, {dots[0], dots[1], dots[2], dots[3]}, b.grad_weights, b.grad_locations});
        for (int64_t j = 0; j < queries; ++j) {
          const int64_t to = (first + j * a.m) * k;
          std::copy_n(b.grad_weights + j * k, k, grad_weights + to);
          std::copy_n(b.grad_locations + 2 * j * k, 2 * k, grad_locations + 2 * to);
        }
      }
      for_rows(a, [&](const MapRow& row) {
        const float* from = grad_map + (row.first_pixel + 1) * pixel;
        if (row.first_source < 0) return;
        float* to = grad_value + ((n * a.s + row.first_source) * a.m + m) * a.d;
        for (int64_t x = 0; x < width_of(a, row.level); ++x, from += pixel, to += a.m * a.d)
          std::copy_n(from, a.d, to);
      });
      arena.rewind(mark);
    }
  });
}

}  // namespace otk
