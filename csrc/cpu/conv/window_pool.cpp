// Pooling of any windows, plane by plane: the rows of the image are folded along their windows,
// each once, and the results of a window's rows are folded into its own.
#include <algorithm>
#include <vector>

#include "../../otk.h"
#include "../support/parallel.h"
#include "../support/scratch.h"
#include "isa.h"

namespace otk {
namespace {

using FoldRows = void (*)(const float* const* rows, int count, float* dst, int64_t n);

// The folded rows of one plane, as far as the windows of an output row need them.
class PlaneRows {
 public:
  static int64_t floats(const Planes& x, const Planes& out, const PoolWindow& window,
                        const Isa& isa) {
    const PlaneRows rows(x, out, window, 0, nullptr, isa, nullptr);
    return Arena::rounded(rows.phase_ * rows.phases_) + Arena::rounded(rows.row_ * rows.kept_);
  }

  // outside: what the padding holds.
  PlaneRows(const Planes& x, const Planes& out, const PoolWindow& window, float outside,
            FoldRows fold, const Isa& isa, Arena* arena)
      : x_(x),
        kernel_(window.kernel[1]),
        stride_(window.stride[1]),
        padding_(window.padding[1]),
        fold_(fold),
        isa_(isa) {
    row_ = (int64_t{out.w} + isa.lanes - 1) / isa.lanes * isa.lanes;
    reach_ = row_ + (kernel_ - 1) / stride_ + 1;
    phases_ = stride_ == 2 ? 2 : std::min(kernel_, stride_);
    phase_ = Arena::rounded(reach_);
    kept_ = std::min(window.kernel[0], x.h);
    if (!arena) return;
    split_ = arena->take(phase_ * phases_);
    folded_ = arena->take(row_ * kept_);
    std::fill(split_, split_ + phase_ * phases_, outside);
    for (int k = 0; k < kernel_; ++k) taps_.push_back(split_ + k % stride_ * phase_ + k / stride_);
  }

  void start(const float* plane) {
    plane_ = plane;
    next_ = 0;
  }

  // Row y, folded along its windows. Rows are asked for in order; the last `kernel` are kept.
  const float* at(int y) {
    float* row = folded_ + y % kept_ * row_;
    if (y < next_) return row;
    next_ = y + 1;
    split(plane_ + y * x_.row_stride);
    fold_(taps_.data(), kernel_, row, row_);
    return row;
  }

 private:
  // Pixel x goes to phase (x + padding) % stride, where each tap reads neighbours.
  void split(const float* src) {
    if (stride_ == 1) {
      std::copy_n(src, std::min<int64_t>(x_.w, reach_ - padding_), split_ + padding_);
      return;
    }
    if (stride_ == 2) {
      const int64_t n = std::min<int64_t>(x_.w, 2 * reach_ - padding_ - 1);
      isa_.split(src, n, split_ + padding_ % 2 * phase_ + padding_ / 2,
                 split_ + (padding_ + 1) % 2 * phase_ + (padding_ + 1) / 2);
      return;
    }
    for (int p = 0; p < phases_; ++p) {
      int64_t i = p < padding_ ? (padding_ - p + stride_ - 1) / stride_ : 0;
      for (int64_t at = i * stride_ + p - padding_; at < x_.w && i < reach_; at += stride_)
        split_[p * phase_ + i++] = src[at];
    }
  }

  const Planes& x_;
  const int kernel_, stride_, padding_;
  const FoldRows fold_;
  const Isa& isa_;
  int64_t row_;    // floats of a folded row, whole vectors
  int64_t reach_;  // floats of a phase that taps read
  int64_t phase_;  // floats between phases
  int phases_, kept_;
  float *split_ = nullptr, *folded_ = nullptr;
  std::vector<const float*> taps_;
  const float* plane_ = nullptr;
  int next_ = 0;  // rows below this one were folded
};

// finish(dst, o): row o of the output holds folded windows.
template <class Finish>
void pool(const Planes& x, const Planes& out, const PoolWindow& window, float outside,
          FoldRows fold, const Isa& isa, const Parallel& par, Finish&& finish) {
  if (x.n == 0 || x.c == 0 || out.h <= 0 || out.w <= 0) return;
  const int64_t floats = PlaneRows::floats(x, out, window, isa);
  parallel_for(par, int64_t{x.n} * x.c, [&](int64_t begin, int64_t end) {
    Arena& local = thread_scratch().local;
    local.reset(floats);
    PlaneRows folded(x, out, window, outside, fold, isa, &local);
    std::vector<const float*> rows;
    for (int64_t i = begin; i < end; ++i) {
      folded.start(x.data + i / x.c * x.batch_stride + i % x.c * x.plane_stride);
      float* dst = out.data + i / x.c * out.batch_stride + i % x.c * out.plane_stride;
      for (int o = 0; o < out.h; ++o, dst += out.w) {
        const int64_t top = int64_t{o} * window.stride[0] - window.padding[0];
        const int last = static_cast<int>(std::min<int64_t>(x.h, top + window.kernel[0]));
        rows.clear();
        for (int y = static_cast<int>(std::max<int64_t>(top, 0)); y < last; ++y)
          rows.push_back(folded.at(y));
        fold(rows.data(), static_cast<int>(rows.size()), dst, out.w);
        finish(dst, o);
      }
    }
  });
}

// Pixels of window `o` in one direction.
int64_t extent(int64_t o, const PoolWindow& window, int d, int64_t size, bool with_padding) {
  const int64_t begin = o * window.stride[d] - window.padding[d];
  const int64_t end = std::min(begin + window.kernel[d], size + window.padding[d]);
  return with_padding ? end - begin : std::min(end, size) - std::max<int64_t>(begin, 0);
}

}  // namespace

void max_pool2d(const Planes& x, const Planes& out, const PoolWindow& window, const Parallel& par) {
  const Isa& isa = active_isa();
  pool(x, out, window, -__builtin_inff(), isa.max_rows, isa, par, [](float*, int) {});
}

void window_avg_pool2d(const Planes& x, const Planes& out, const PoolWindow& window,
                       bool with_padding, int64_t divisor, const Parallel& par) {
  const Isa& isa = active_isa();
  std::vector<float> widths(std::max(out.w, 0), 1.f);
  if (!divisor)
    for (int w = 0; w < out.w; ++w)
      widths[w] = static_cast<float>(extent(w, window, 1, x.w, with_padding));
  pool(x, out, window, 0.f, isa.sum_rows, isa, par, [&](float* dst, int o) {
    const int64_t height = divisor ? divisor : extent(o, window, 0, x.h, with_padding);
    for (int w = 0; w < out.w; ++w) dst[w] /= static_cast<float>(height) * widths[w];
  });
}

}  // namespace otk
