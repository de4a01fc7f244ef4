// Maximum-likelihood power-law fit with the smallest Kolmogorov-Smirnov distance, exact.
//
// For a start i of the ascending values x_i .. x_{N-1}, n = N - i, l = ln x:
//   alpha_i = 1 + n / sum_{j >= i} (l_j - l_i)
//   D_i     = max over j >= i of |F_j - (j - i) / n|,  F_j = 1 - (x_j / x_i)^(1 - alpha_i)
// and the i of a window with the smallest D_i is wanted, the first one of equals. The scan costs
// N^2 / 2 exponentials. Two bounds save nearly all of them without changing the result:
// - |F - E| at a few offsets bounds D_i from below, so candidates are visited by rising bound and
//   the search ends at the first bound above the best D;
// - F and E both rise with j, so over the offsets [a, b] of a block |F - E| is at most
//   max(F_b - E_{a+1}, E_{b-1} - F_a), and blocks that cannot raise the maximum are passed over.
// Infinities are results here: do not build with -ffast-math.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../../otk.h"
#include "../support/parallel.h"

namespace otk {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kInf = std::numeric_limits<double>::infinity();
// exp is monotonic to an ulp only, so a block's bound gets this much slack.
constexpr double kSlack = 16 * kEps;

// One layer: logs, and the exponent of every start.
struct Tail {
  const double* logs;
  const double* alpha;  // infinite where all values from i on are equal
  int64_t count;        // N

  // |F - E| at offset k behind the start i.
  double gap(int64_t i, int64_t k) const {
    return std::fabs(cdf(i, k) - static_cast<double>(k) / static_cast<double>(count - i));
  }
  double cdf(int64_t i, int64_t k) const {
    return 1.0 - std::exp((1.0 - alpha[i]) * (logs[i + k] - logs[i]));
  }

  double distance_of_ties(int64_t i) const {
    const double n = static_cast<double>(count - i);
    return (n - 1.0) / n;
  }

  double naive(int64_t i) const {
    if (std::isinf(alpha[i])) return distance_of_ties(i);
    double found = 0;
    for (int64_t k = 0; k < count - i; ++k) found = std::max(found, gap(i, k));
    return found;
  }

  // At most D_i, and D_i itself if the tail has no more than 2 * samples values.
  double lower_bound(int64_t i, int samples) const {
    const int64_t n = count - i;
    if (std::isinf(alpha[i])) return distance_of_ties(i);
    if (n <= 2 * samples) return naive(i);
    double found = 0;
    for (int64_t s = 1; s <= samples; ++s) found = std::max(found, gap(i, s * (n - 1) / samples));
    return found;
  }

  // D_i, or anything above `best` once it is certain that D_i is above it.
  double distance(int64_t i, int block, double best, std::vector<double>& ends) const {
    if (std::isinf(alpha[i])) return distance_of_ties(i);
    const int64_t n = count - i, blocks = (n - 1 + block - 1) / block;
    const double inverse = 1.0 / static_cast<double>(n);
    ends.resize(static_cast<size_t>(blocks) + 1);
    double found = 0;  // at offset 0 both are 0
    ends[0] = 0;
    for (int64_t b = 1; b <= blocks; ++b) {
      const int64_t k = std::min(b * block, n - 1);
      ends[b] = cdf(i, k);
      found = std::max(found, std::fabs(ends[b] - static_cast<double>(k) / static_cast<double>(n)));
      if (found > best) return found;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * block, last = std::min(first + block, n - 1);
      const double bound = std::max(ends[b + 1] - static_cast<double>(first + 1) * inverse,
                                    static_cast<double>(last - 1) * inverse - ends[b]);
      if (bound + kSlack <= found) continue;
      for (int64_t k = first + 1; k < last; ++k) found = std::max(found, gap(i, k));
      if (found > best) return found;
    }
    return found;
  }
};

// Logs and exponents. The sums of l_j - l_i grow by non-negative terms from the top, so nothing
// cancels; sums within rounding of 0 are ties.
void prepare(const double* x, int64_t count, double* logs, double* alpha) {
  double largest = 0;
  for (int64_t j = 0; j < count; ++j) {
    logs[j] = std::log(x[j]);
    largest = std::max(largest, std::fabs(logs[j]));
  }
  double sum = 0;
  for (int64_t i = count - 1; i >= 0; --i) {
    const double n = static_cast<double>(count - i);
    if (i + 1 < count) sum += (n - 1.0) * (logs[i + 1] - logs[i]);
    alpha[i] = sum <= 4 * kEps * n * largest ? kInf : 1.0 + n / sum;
  }
}

struct Scratch {
  std::vector<double> logs, alpha, bounds, ends;
  std::vector<int64_t> order;
};

void fit_one(const double* x, int64_t count, int64_t first, int64_t last, int samples, int block,
             Scratch& s, double* out) {
  out[0] = -1, out[1] = std::numeric_limits<double>::quiet_NaN(), out[2] = 1;
  if (first >= last) return;
  s.logs.resize(count), s.alpha.resize(count);
  prepare(x, count, s.logs.data(), s.alpha.data());
  const Tail tail{s.logs.data(), s.alpha.data(), count};
  const int64_t candidates = last - first;
  int64_t index = -1;
  double best = kInf;
  if (samples == 0) {
    for (int64_t i = first; i < last; ++i) {
      const double d = tail.naive(i);
      if (d < best) best = d, index = i;
    }
  } else {
    s.bounds.resize(candidates), s.order.resize(candidates);
    for (int64_t c = 0; c < candidates; ++c) {
      s.bounds[c] = candidates > 1 ? tail.lower_bound(first + c, samples) : 0;
      s.order[c] = c;
    }
    std::sort(s.order.begin(), s.order.end(), [&](int64_t a, int64_t b) {
      return s.bounds[a] < s.bounds[b] || (s.bounds[a] == s.bounds[b] && a < b);
    });
    for (const int64_t c : s.order) {
      if (s.bounds[c] > best) break;
      const double d = tail.distance(first + c, block, best, s.ends);
      if (d < best || (d == best && first + c < index)) best = d, index = first + c;
    }
  }
  out[0] = static_cast<double>(index), out[1] = s.alpha[index], out[2] = best;
}

}  // namespace

void powerlaw_fit(const double* x, const int64_t* offsets, const int64_t* first,
                  const int64_t* last, int64_t layers, int samples, int block, double* out,
                  const Parallel& par) {
  parallel_for(par, layers, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i)
      fit_one(x + offsets[i], offsets[i + 1] - offsets[i], first[i], last[i], samples, block,
              scratch, out + 3 * i);
  });
}

}  // namespace otk
