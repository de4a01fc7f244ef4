// The second stage, band -> tridiagonal by bulge chasing, and the eigenvalues of the result.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "eigen.h"

namespace otk {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kSweeps = 8;  // sweeps that follow each other, so that the band is read n / 8 times

struct Sweep {
  alignas(64) double v[kTile];
  double tau = 0;
};

}  // namespace

void chase_band(SymmetricBand& band, double* d, double* e, Reflectors* kept) {
  const EigenIsa& isa = eigen_isa();
  const int64_t n = band.n, sweeps = std::max<int64_t>(n - 2, 0);
  if (kept) kept->list.reserve(n * (n / (2 * kTile) + 2));
  const auto keep = [&](const Sweep& sweep, int64_t row) {
    if (!kept || sweep.tau == 0) return;
    Reflectors::One one;
    std::memcpy(one.v, sweep.v, sizeof one.v);
    one.tau = sweep.tau, one.row = row;
    kept->list.push_back(one);
  };
  // Sweep s annihilates column s below the subdiagonal. A step may run once the sweep before has
  // finished the next one, so a sweep starts two steps after its predecessor.
  for (int64_t s0 = 0; s0 < sweeps; s0 += kSweeps) {
    Sweep group[kSweeps];
    const int64_t count = std::min<int64_t>(kSweeps, sweeps - s0);
    const int64_t steps = (n - 2 - s0 + kTile - 1) / kTile;  // of the first, which has most
    for (int64_t time = 0; time < steps + 2 * (count - 1); ++time)
      for (int64_t q = 0; q < count; ++q) {
        const int64_t step = time - 2 * q, s = s0 + q, row = s + 1 + step * kTile;
        if (step < 0 || row >= n - 1) continue;
        Sweep& sweep = group[q];
        if (step == 0) {
          double* x = band.at(s + 1, s);
          double beta;
          sweep.tau = isa.reflector(x, sweep.v, &beta);
          std::memset(x, 0, kTile * sizeof(double));
          *x = beta;
          keep(sweep, row);
        }
        const bool last = row + kTile >= n;
        isa.chase(band.at(row, row), sweep.v, &sweep.tau, last);
        if (!last) keep(sweep, row + kTile);
      }
  }
  for (int64_t i = 0; i < n; ++i) {
    d[i] = *band.at(i, i);
    if (i + 1 < n) e[i] = *band.at(i + 1, i);
  }
}

void apply_second_stage(const Reflectors& kept, int64_t rows, double* vectors) {
  for (size_t i = kept.list.size(); i-- > 0;) {
    const Reflectors::One& one = kept.list[i];
    // Behind the matrix a reflector is zero.
    const int length = static_cast<int>(std::min<int64_t>(kTile, rows - one.row));
    eigen_isa().apply(vectors + one.row * kTile, length, one.v, one.tau);
  }
}

namespace {

// One QL step on rows low .. high of the tridiagonal (d, squares of e), shifted towards the
// eigenvalue at `low`: the root-free form of Pal, Walker and Kahan. The recurrence is arranged so
// that one division per row is on its critical path: with g = gamma r it is
// p' = gamma^2 / c = g^2 / (r p).
void ql_step(double* d, double* e2, int64_t low, int64_t high) {
  const double root = std::sqrt(e2[low]);
  double sigma = (d[low + 1] - d[low]) / (2 * root);
  const double r0 = std::sqrt(sigma * sigma + 1);
  sigma = d[low] - root / (sigma + std::copysign(r0, sigma));
  double c = 1, s = 0, gamma = d[high] - sigma, p = gamma * gamma;
  for (int64_t i = high - 1; i >= low; --i) {
    const double b = e2[i], r = p + b, inverse = 1 / r;
    if (i != high - 1) e2[i + 1] = s * r;
    const double before = c, old = gamma, a = d[i];
    const double g = p * (a - sigma) - b * old;
    c = p * inverse;
    s = b * inverse;
    gamma = g * inverse;
    d[i + 1] = old + (a - gamma);
    p = p != 0 ? g * g / (r * p) : before * b;
  }
  e2[low] = s * p;
  d[low] = sigma + gamma;
}

// Its mirror image: a QR step towards the eigenvalue at `high`.
void qr_step(double* d, double* e2, int64_t low, int64_t high) {
  const double root = std::sqrt(e2[high - 1]);
  double sigma = (d[high - 1] - d[high]) / (2 * root);
  const double r0 = std::sqrt(sigma * sigma + 1);
  sigma = d[high] - root / (sigma + std::copysign(r0, sigma));
  double c = 1, s = 0, gamma = d[low] - sigma, p = gamma * gamma;
  for (int64_t i = low; i < high; ++i) {
    const double b = e2[i], r = p + b, inverse = 1 / r;
    if (i != low) e2[i - 1] = s * r;
    const double before = c, old = gamma, a = d[i + 1];
    const double g = p * (a - sigma) - b * old;
    c = p * inverse;
    s = b * inverse;
    gamma = g * inverse;
    d[i] = old + (a - gamma);
    p = p != 0 ? g * g / (r * p) : before * b;
  }
  e2[high - 1] = s * p;
  d[high] = sigma + gamma;
}

}  // namespace

bool tridiagonal_values(double* d, double* e, int64_t n) {
  double norm = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double off = i + 1 < n ? e[i] : 0;
    if (!std::isfinite(d[i]) || !std::isfinite(off)) return false;
    norm = std::max({norm, std::fabs(d[i]), std::fabs(off)});
  }
  if (norm == 0) return true;
  // The steps form sixth powers: entries are brought near 1, by a power of two, which is exact.
  const int shift = std::ilogb(norm);
  norm = std::ldexp(norm, -shift);
  for (int64_t i = 0; i < n; ++i) d[i] = std::ldexp(d[i], -shift);
  for (int64_t i = 0; i + 1 < n; ++i) e[i] = std::ldexp(e[i], -shift);
  // Off-diagonals below a fraction of eps * norm change no eigenvalue by more than that.
  const double small = 0.03 * kEps * norm, floor = small * small;
  for (int64_t i = 0; i + 1 < n; ++i) e[i] *= e[i];
  const auto negligible = [&](int64_t i) {
    return e[i] <= floor || e[i] <= kEps * kEps * std::fabs(d[i] * d[i + 1]);
  };
  int64_t budget = 60 * n;
  // Blocks [low, high] from the bottom of the matrix to its top.
  int64_t high = n - 1;
  while (high > 0) {
    if (negligible(high - 1)) {
      --high;
      continue;
    }
    int64_t low = high - 1;
    while (low > 0 && !negligible(low - 1)) --low;
    // Towards the end with the smaller diagonal, where graded matrices keep their digits.
    const bool ql = std::fabs(d[low]) <= std::fabs(d[high]);
    int64_t a = low, b = high;
    while (a < b && budget-- > 0) {
      if (ql) {
        int64_t end = a;
        while (end < b && !negligible(end)) ++end;
        if (end == a)
          ++a;
        else
          ql_step(d, e, a, end);
      } else {
        int64_t end = b;
        while (end > a && !negligible(end - 1)) --end;
        if (end == b)
          --b;
        else
          qr_step(d, e, end, b);
      }
    }
    if (budget <= 0) return false;
    high = low;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(d[i])) return false;
    d[i] = std::ldexp(d[i], shift);
  }
  std::sort(d, d + n);
  return true;
}

}  // namespace otk
