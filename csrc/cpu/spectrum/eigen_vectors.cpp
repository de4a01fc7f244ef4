// Eigenvectors of the smallest eigenvalues of a tridiagonal matrix, by inverse iteration.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "eigen.h"

namespace otk {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kIterations = 3;

// LU factors of T - shift I with partial pivoting: U has two superdiagonals.
class Shifted {
 public:
  Shifted(const double* d, const double* e, int64_t n, double shift, double tiny)
      : n_(n), diagonal_(n), first_(n), second_(n), factor_(n), swapped_(n) {
    double here = d[0] - shift, right = n > 1 ? e[0] : 0;
    for (int64_t i = 0; i + 1 < n; ++i) {
      const double below = e[i], next = d[i + 1] - shift, after = i + 2 < n ? e[i + 1] : 0;
      swapped_[i] = std::fabs(below) > std::fabs(here);
      if (swapped_[i]) {
        factor_[i] = here / below;
        diagonal_[i] = below, first_[i] = next, second_[i] = after;
        here = right - factor_[i] * next, right = -factor_[i] * after;
      } else {
        if (here == 0) here = tiny;
        factor_[i] = below / here;
        diagonal_[i] = here, first_[i] = right, second_[i] = 0;
        here = next - factor_[i] * right, right = after;
      }
    }
    diagonal_[n - 1] = here;
    for (double& x : diagonal_)
      if (std::fabs(x) < tiny) x = tiny;
  }

  void solve(double* x) const {
    for (int64_t i = 0; i + 1 < n_; ++i) {
      if (swapped_[i]) std::swap(x[i], x[i + 1]);
      x[i + 1] -= factor_[i] * x[i];
    }
    for (int64_t i = n_ - 1; i >= 0; --i) {
      double found = x[i];
      if (i + 1 < n_) found -= first_[i] * x[i + 1];
      if (i + 2 < n_) found -= second_[i] * x[i + 2];
      x[i] = found / diagonal_[i];
    }
  }

 private:
  int64_t n_;
  std::vector<double> diagonal_, first_, second_, factor_;
  std::vector<char> swapped_;
};

void normalise(std::vector<double>& x) {
  double largest = 0, squares = 0;
  for (const double value : x) largest = std::max(largest, std::fabs(value));
  for (double& value : x) value /= largest, squares += value * value;
  const double inverse = 1 / std::sqrt(squares);
  for (double& value : x) value *= inverse;
}

}  // namespace

void tridiagonal_vectors(const double* d, const double* e, int64_t n, const double* values,
                         int count, double* vectors) {
  double norm = 0;
  for (int64_t i = 0; i < n; ++i)
    norm = std::max(norm, std::fabs(d[i]) + (i + 1 < n ? std::fabs(e[i]) : 0));
  const double tiny = std::max(kEps * norm, std::numeric_limits<double>::min());
  std::vector<std::vector<double>> found;
  uint64_t state = 0x9e3779b97f4a7c15;  // of the starting vectors, the same in every run
  double before = -std::numeric_limits<double>::infinity();
  for (int k = 0; k < count; ++k) {
    // Shifts of equal eigenvalues are kept apart, so that they do not all meet the same vector.
    const double shift = std::max(values[k], before + 4 * tiny);
    before = shift;
    const Shifted shifted(d, e, n, shift, tiny);
    std::vector<double> x(n);
    for (double& value : x) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      value = static_cast<double>(state >> 40) / (1 << 24) - 0.5;
    }
    for (int iteration = 0; iteration < kIterations; ++iteration) {
      normalise(x);
      shifted.solve(x.data());
      normalise(x);
      for (int pass = 0; pass < 2; ++pass)  // twice is enough
        for (const std::vector<double>& other : found) {
          double along = 0;
          for (int64_t i = 0; i < n; ++i) along += x[i] * other[i];
          for (int64_t i = 0; i < n; ++i) x[i] -= along * other[i];
        }
      normalise(x);
    }
    found.push_back(std::move(x));
  }
  const int64_t rows = (n + kTile - 1) / kTile * kTile, groups = (count + kTile - 1) / kTile;
  std::fill(vectors, vectors + groups * rows * kTile, 0.0);
  for (int k = 0; k < count; ++k)
    for (int64_t i = 0; i < n; ++i)
      vectors[(k / kTile) * rows * kTile + i * kTile + k % kTile] = found[k][i];
}

}  // namespace otk
