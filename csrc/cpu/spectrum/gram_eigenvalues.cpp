// Squared singular values: Gram matrix, two-stage reduction, and a second look at the small ones.
//
// An eigenvalue of the Gram matrix is off by about eps of the largest. Where that costs digits of
// those that count, the subspace Z of the smallest eigenvalues is taken from the reduction (its
// reflectors are still there), and they become the eigenvalues of (A^T Z)^T (A^T Z): with a
// residual of r and a gap of g to the rest the error is r^2 / g instead of r, and A^T Z is small,
// so squaring it loses nothing.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../../otk.h"
#include "../support/parallel.h"
#include "eigen.h"

namespace otk {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kNoise = 8;       // error of an eigenvalue of the Gram matrix, in eps * largest
constexpr int kMostVectors = 128;  // of the second look
constexpr int kGapSearch = 32;     // eigenvalues among which the gap to the rest is looked for
constexpr int64_t kNeedSingular = -1;

// How many of the smallest eigenvalues to look at again: 0 none, kNeedSingular if that cannot help.
int64_t suspects(const double* x, int64_t n, double threshold, double relative) {
  const double noise = kNoise * kEps * x[n - 1];
  const double* above = std::upper_bound(x, x + n, threshold - noise);
  if (above == x + n || !(noise > relative * *above)) return 0;
  const int64_t least = std::lower_bound(x, x + n, noise / relative) - x;
  int64_t count = kNeedSingular;
  double widest = 0;
  for (int64_t p = std::max<int64_t>(least, 1); p < std::min(least + kGapSearch, n); ++p) {
    const double gap = (x[p] - x[p - 1]) / x[p];
    if (gap > widest) widest = gap, count = p;
  }
  if (count < 1 || count > std::min<int64_t>(kMostVectors, n / 2)) return kNeedSingular;
  // r^2 / g, for the largest inside and for the smallest that counts.
  const double near = x[count] - x[count - 1], far = x[count] - *above;
  const double worst = noise * noise / std::min(near * x[count - 1], far * *above);
  return *above > noise && worst <= 0.01 * relative ? count : kNeedSingular;
}

// A matrix on its way down, with what a second look needs.
struct Reduction {
  explicit Reduction(int64_t n)
      : triangle(n), band(n), factors(triangle.side * kTileSize), d(n), e(n) {}
  TileTriangle triangle;
  SymmetricBand band;
  Doubles factors;
  std::vector<double> d, e;
};

// Eigenvalues of a symmetric matrix in tiles, which is destroyed; false if they do not converge.
bool solve(Reduction& r, double* values) {
  reduce_to_band(r.triangle, r.band, r.factors);
  SymmetricBand copy(r.band.n);
  std::memcpy(copy.store.data(), r.band.store.data(), r.band.doubles() * sizeof(double));
  chase_band(copy, r.d.data(), r.e.data(), nullptr);
  std::copy(r.d.begin(), r.d.end(), values);
  std::vector<double> squares(r.e);
  return tridiagonal_values(values, squares.data(), r.band.n);
}

// (A^T Z)^T (A^T Z) in the tiles of `out`; Z in groups of 32 columns.
void project(const MatrixView& a, const double* vectors, const TileTriangle& out) {
  const EigenIsa& isa = eigen_isa();
  const int64_t side = (a.rows + kTile - 1) / kTile, groups = out.side;
  Doubles packed(side * kTileSize), image(groups * kTileSize);
  std::vector<const double*> left(side), right(side);
  for (int64_t column = 0; column < a.columns; column += kTile) {
    pack_column(a, column, packed.data());
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < side; ++i) {
        left[i] = packed.data() + i * kTileSize;
        right[i] = vectors + (g * side + i) * kTileSize;
      }
      double* here = image.data() + g * kTileSize;
      isa.product(here, left.data(), right.data(), static_cast<int>(side), EigenIsa::kSet, false);
      for (int64_t h = 0; h <= g; ++h) {
        const double *one = here, *two = image.data() + h * kTileSize;
        isa.product(out.tile(g, h), &one, &two, 1, column == 0 ? EigenIsa::kSet : EigenIsa::kAdd,
                    true);
      }
    }
  }
}

bool look_again(const MatrixView& a, Reduction& r, double factor, int64_t count, double* values) {
  const int64_t n = a.rows, rows = r.triangle.side * kTile;
  const int64_t groups = (count + kTile - 1) / kTile;
  Doubles vectors(groups * rows * kTile);
  Reflectors kept;
  chase_band(r.band, r.d.data(), r.e.data(), &kept);
  std::vector<double> scaled(values, values + count);
  for (double& x : scaled) x /= factor;
  tridiagonal_vectors(r.d.data(), r.e.data(), n, scaled.data(), static_cast<int>(count),
                      vectors.data());
  for (int64_t g = 0; g < groups; ++g) {
    double* block = vectors.data() + g * rows * kTile;
    apply_second_stage(kept, n, block);
    apply_first_stage(r.triangle, r.factors, block);
  }
  Reduction small(count);
  project(a, vectors.data(), small.triangle);
  std::vector<double> found(count);
  if (!solve(small, found.data())) return false;
  for (int64_t i = 0; i < count; ++i) values[i] = found[i];
  return true;
}

// The only eigenvalue of a row, in four sums that do not wait for each other.
template <class T>
double squares(const T* row, int64_t step, int64_t count) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) {
      const double x = row[(i + k) * step];
      sums[k] += x * x;
    }
  for (; i < count; ++i) {
    const double x = row[i * step];
    sums[0] += x * x;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

double row_value(const MatrixView& a) {
  if (a.is_double) return squares(static_cast<const double*>(a.data), a.column_stride, a.columns);
  return squares(static_cast<const float*>(a.data), a.column_stride, a.columns);
}

int64_t one(const MatrixView& a, double scale, double threshold, double relative, double* values) {
  const int64_t n = a.rows;
  if (n == 0) return 0;
  if (n == 1) {
    const double value = row_value(a);
    values[0] = std::isfinite(value) ? value * scale : value * 0;
    return 0;
  }
  Reduction r(n);
  gram_tiles(a, r.triangle);
  double trace = 0;
  for (int64_t i = 0; i < n; ++i)
    trace += r.triangle.tile(i / kTile, i / kTile)[(i % kTile) * (kTile + 1)];
  if (!std::isfinite(trace) || trace == 0) {
    std::fill(values, values + n, trace * 0);
    return 0;
  }
  // Far from the ends of the exponent range; a power of two changes no bit otherwise.
  const int exponent = std::ilogb(trace);
  double factor = 1;
  if (std::abs(exponent) > 200) {
    factor = std::ldexp(1.0, exponent);
    const double inverse = std::ldexp(1.0, -exponent);
    double* all = r.triangle.store.data();
    for (int64_t i = 0; i < r.triangle.side * (r.triangle.side + 1) / 2 * kTileSize; ++i)
      all[i] *= inverse;
  }
  if (!solve(r, values)) return kNeedSingular;
  const auto finish = [&](double by, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = std::max(values[i] * by, 0.0);
  };
  finish(factor * scale, n);
  if (!(values[n - 1] <= std::numeric_limits<double>::max())) return 0;
  const int64_t count = suspects(values, n, threshold, relative);
  if (count <= 0) return count;
  if (!look_again(a, r, factor * scale, count, values)) return kNeedSingular;
  finish(scale, count);
  // What float64 cannot tell from zero, as in a singular value decomposition.
  const double limit = static_cast<double>(a.columns) * kEps;
  for (int64_t i = 0; i < count; ++i)
    if (values[i] <= limit * limit * values[n - 1]) values[i] = 0;
  return count;
}

}  // namespace

void gram_eigenvalues(const StridedMatrices& a, double scale, double threshold, double relative,
                      double* values, int64_t* redone, const Parallel& par) {
  parallel_for(par, a.count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto* data = static_cast<const char*>(a.data) + i * a.stride * (a.is_double ? 8 : 4);
      const MatrixView view{data, a.is_double, a.rows, a.columns, a.row_stride, a.column_stride};
      redone[i] = one(view, scale, threshold, relative, values + i * a.rows);
    }
  });
}

}  // namespace otk
