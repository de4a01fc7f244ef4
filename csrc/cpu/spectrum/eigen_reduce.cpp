// Gram matrices and the first stage: full -> band by blocked Householder reflections.
//
// Per block column: A -= V W^T + W V^T of the last column's reflectors, and Y = A V of this one's,
// are done tile by tile in one pass, so that each tile is read once. 4/3 n^3 operations, all of
// them products of tiles; only the lower triangle is touched.
#include <cmath>
#include <cstring>

#include "../support/capability.h"
#include "eigen.h"

namespace otk {

extern const EigenIsa eigen_avx2, eigen_avx512, eigen_neon, eigen_generic;

const EigenIsa& eigen_isa() {
  switch (capability()) {
#if defined(__x86_64__)
    case Capability::kAvx512:
      return eigen_avx512;
    case Capability::kAvx2:
      return eigen_avx2;
#elif defined(__aarch64__)
    case Capability::kNeon:
      return eigen_neon;
#endif
    default:
      return eigen_generic;
  }
}

Doubles::Doubles(int64_t count) {
  const size_t wanted = static_cast<size_t>(count > 0 ? count : 1) * sizeof(double);
  if (wanted >= size_t{1} << 20) {
    bytes_ = (wanted + kHugePage - 1) / kHugePage * kHugePage;
    data_ = static_cast<double*>(pages_take(bytes_));
  } else {
    data_ = static_cast<double*>(::operator new(wanted, std::align_val_t{64}));
  }
}

Doubles::~Doubles() {
  if (bytes_)
    pages_give(data_, bytes_);
  else
    ::operator delete(data_, std::align_val_t{64});
}

namespace {

constexpr int kSuper = 4;  // tiles per side of a block that stays in the second cache level
constexpr int kDepth = 4;  // tiles of the Gram's inner dimension at a time: all then fit that level

void transpose(const double* from, double* to) {
  for (int r = 0; r < kTile; ++r)
    for (int c = 0; c < kTile; ++c) to[c * kTile + r] = from[r * kTile + c];
}

}  // namespace

void pack_column(const MatrixView& a, int64_t column, double* tiles) {
  const EigenIsa& isa = eigen_isa();
  const auto within = [](int64_t left) { return static_cast<int>(left < kTile ? left : kTile); };
  const int columns = within(a.columns - column);
  for (int64_t row = 0; row < a.rows; row += kTile, tiles += kTileSize) {
    const int rows = within(a.rows - row);
    const int64_t start = row * a.row_stride + column * a.column_stride;
    if (a.is_double)
      isa.pack64(static_cast<const double*>(a.data) + start, a.row_stride, a.column_stride, rows,
                 columns, tiles);
    else
      isa.pack32(static_cast<const float*>(a.data) + start, a.row_stride, a.column_stride, rows,
                 columns, tiles);
  }
}

void gram_tiles(const MatrixView& a, const TileTriangle& out) {
  const EigenIsa& isa = eigen_isa();
  const int64_t side = out.side, depth = (a.columns + kTile - 1) / kTile;
  if (depth == 0) std::memset(out.store.data(), 0, side * (side + 1) / 2 * kTileSize * 8);
  Doubles packed(side * (depth < kDepth ? depth : kDepth) * kTileSize);
  const auto at = [&](int64_t i, int64_t k) { return packed.data() + (k * side + i) * kTileSize; };
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    const int count = static_cast<int>(k0 + kDepth < depth ? kDepth : depth - k0);
    for (int k = 0; k < count; ++k) pack_column(a, (k0 + k) * kTile, at(0, k));
    for (int64_t i0 = 0; i0 < side; i0 += kSuper)
      for (int64_t j0 = 0; j0 <= i0; j0 += kSuper)
        for (int64_t i = i0; i < i0 + kSuper && i < side; ++i)
          for (int64_t j = j0; j < j0 + kSuper && j <= i; ++j) {
            const double *left[kDepth], *right[kDepth];
            for (int k = 0; k < count; ++k) left[k] = at(i, k), right[k] = at(j, k);
            (i == j ? isa.symmetric : isa.product)(out.tile(i, j), left, right, count,
                                                   k0 == 0 ? EigenIsa::kSet : EigenIsa::kAdd, true);
          }
  }
}

SymmetricBand::SymmetricBand(int64_t size)
    : n(size), store((size + 2 * kTile) * kBandStep + 4 * kTile) {
  std::memset(store.data(), 0, doubles() * sizeof(double));
}

namespace {

// Factors a panel [rows][32] in place: reflectors V in it, R in `band` from column `first` on, and
// the 32 x 32 factor T of H_0 H_1 .. = I - V T V^T.
void factor_panel(double* panel, int64_t rows, int64_t first, SymmetricBand& band, double* t) {
  const EigenIsa& isa = eigen_isa();
  alignas(64) double z[kTile], w[kTile] = {};
  std::memset(t, 0, kTileSize * sizeof(double));
  double r[kTile][kTile];
  isa.panel(panel + kTile, rows - 1, -1, w, 1, z);
  // The sums of column 0 over the rows below the first.
  for (int k = 0; k < kTile; ++k) {
    double* pivot = panel + k * kTile;
    const double top = pivot[k], rest = z[k];
    double beta = top, tau = 0, inverse = 0;
    if (rest > 1e-280) {
      const double norm = std::sqrt(top * top + rest);
      beta = top > 0 ? -norm : norm;
      tau = (beta - top) / beta;
      inverse = 1.0 / (top - beta);
    }
    for (int c = 0; c < k; ++c) w[c] = 0, r[k][c] = 0;
    // T of one more column: -tau T (V^T v).
    double* column = t + k;
    for (int c = 0; c < k; ++c) {
      double found = 0;
      for (int m = c; m < k; ++m) found += t[c * kTile + m] * (pivot[m] + z[m] * inverse);
      column[c * kTile] = -tau * found;
    }
    column[k * kTile] = tau;
    r[k][k] = beta;
    w[k] = 0;
    for (int c = k + 1; c < kTile; ++c) {
      const double along = tau * (pivot[c] + z[c] * inverse);
      r[k][c] = pivot[c] - along;
      w[c] = along * inverse;
    }
    pivot[k] = 1;
    for (int c = k + 1; c < kTile; ++c) pivot[c] = 0;
    if (k + 1 < rows) {
      isa.panel(panel + (k + 1) * kTile, rows - k - 1, k, w, inverse, z);
      z[k] *= inverse;
    }
  }
  for (int k = 0; k < kTile; ++k)
    for (int c = k; c < kTile; ++c) *band.at(first + kTile + k, first + c) = r[k][c];
}

// The tiles [begin, side) of one block column's quantities, one below the other.
struct Column {
  Column(int64_t side) : store(side * kTileSize) {}
  double* tile(int64_t i) const { return store.data() + i * kTileSize; }
  Doubles store;
};

}  // namespace

void reduce_to_band(const TileTriangle& a, SymmetricBand& band, Doubles& factors) {
  const EigenIsa& isa = eigen_isa();
  const int64_t side = a.side;
  Column v(side), w(side), vt(side), wt(side), next(side), y(side);
  alignas(64) double inner[kTileSize], s[kTileSize], st[kTileSize];
  const auto update = [&](int64_t i, int64_t j) {
    const double* left[] = {v.tile(i), w.tile(i)};
    const double* right[] = {wt.tile(j), vt.tile(j)};
    (i == j ? isa.symmetric : isa.product)(a.tile(i, j), left, right, 2, EigenIsa::kSubtract,
                                           false);
  };
  for (int64_t c = 0; c < side; ++c) {
    if (c > 0)
      for (int64_t i = c; i < side; ++i) update(i, c);
    const double* diagonal = a.tile(c, c);
    for (int i = 0; i < kTile; ++i)
      for (int j = 0; j <= i; ++j) *band.at(c * kTile + i, c * kTile + j) = diagonal[i * kTile + j];
    const int64_t begin = c + 1;
    if (begin == side) break;
    for (int64_t i = begin; i < side; ++i)
      std::memcpy(next.tile(i), a.tile(i, c), kTileSize * sizeof(double));
    double* t = factors.data() + c * kTileSize;
    factor_panel(next.tile(begin), (side - begin) * kTile, c * kTile, band, t);
    for (int64_t i = begin; i < side; ++i)
      std::memcpy(a.tile(i, c), next.tile(i), kTileSize * sizeof(double));
    std::memset(y.tile(begin), 0, (side - begin) * kTileSize * sizeof(double));
    // Each block of tiles: bring up to date, then multiply, while it is in the cache.
    for (int64_t i0 = begin; i0 < side; i0 += kSuper)
      for (int64_t j0 = begin; j0 <= i0; j0 += kSuper) {
        const int64_t i1 = i0 + kSuper < side ? i0 + kSuper : side;
        const int64_t j1 = j0 + kSuper < side ? j0 + kSuper : side;
        const double *left[kSuper], *right[kSuper];
        for (int64_t i = i0; i < i1; ++i) {
          int count = 0;
          for (int64_t j = j0; j < j1 && j <= i; ++j) {
            if (c > 0) update(i, j);
            left[count] = a.tile(i, j), right[count++] = next.tile(j);
          }
          isa.product(y.tile(i), left, right, count, EigenIsa::kAdd, false);
        }
        for (int64_t j = j0; j < j1; ++j) {
          int count = 0;
          for (int64_t i = i0; i < i1; ++i)
            if (i > j) left[count] = a.tile(i, j), right[count++] = next.tile(i);
          if (count) isa.product(y.tile(j), left, right, count, EigenIsa::kAdd, true);
        }
      }
    // W = Y T + V S, S = -1/2 T^T (V^T Y) T.
    std::memset(inner, 0, sizeof inner);
    for (int64_t i = begin; i < side; ++i) {
      const double *left = next.tile(i), *right = y.tile(i);
      isa.product(inner, &left, &right, 1, EigenIsa::kAdd, true);
    }
    const double *one = inner, *two = t;
    isa.product(st, &one, &two, 1, EigenIsa::kSet, false);
    one = t, two = st;
    isa.product(s, &one, &two, 1, EigenIsa::kSet, true);
    for (double& x : s) x *= -0.5;
    for (int64_t i = begin; i < side; ++i) {
      const double* left[] = {y.tile(i), next.tile(i)};
      const double* right[] = {t, s};
      isa.product(w.tile(i), left, right, 2, EigenIsa::kSet, false);
      std::memcpy(v.tile(i), next.tile(i), kTileSize * sizeof(double));
      transpose(v.tile(i), vt.tile(i));
      transpose(w.tile(i), wt.tile(i));
    }
  }
}

void apply_first_stage(const TileTriangle& reduced, const Doubles& factors, double* vectors) {
  const EigenIsa& isa = eigen_isa();
  alignas(64) double inner[kTileSize], scaled[kTileSize];
  for (int64_t c = reduced.side - 2; c >= 0; --c) {
    std::memset(inner, 0, sizeof inner);
    for (int64_t i = c + 1; i < reduced.side; ++i) {
      const double *left = reduced.tile(i, c), *right = vectors + i * kTileSize;
      isa.product(inner, &left, &right, 1, EigenIsa::kAdd, true);
    }
    const double *left = factors.data() + c * kTileSize, *right = inner;
    isa.product(scaled, &left, &right, 1, EigenIsa::kSet, false);
    for (int64_t i = c + 1; i < reduced.side; ++i) {
      left = reduced.tile(i, c), right = scaled;
      isa.product(vectors + i * kTileSize, &left, &right, 1, EigenIsa::kSubtract, false);
    }
  }
}

}  // namespace otk
