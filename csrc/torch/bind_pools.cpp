// The torch side of pooling: checks, and the calls.
#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "arguments.h"
#include "parallel.h"

using namespace otk_torch;

namespace {

constexpr int64_t kMaxStep = int64_t{1} << 15;

// What pools are given, and the height and width of their result.
struct Pool {
  otk::PoolWindow window;
  int64_t size[2];
};

Pool read_pool(const char* op, const otk::Planes& x, const std::vector<int64_t>& window,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
               bool ceil_mode) {
  STD_TORCH_CHECK(window.size() == 2 && stride.size() == 2 && padding.size() == 2, op,
                  ": window, stride and padding must have two numbers each, for rows and columns");
  Pool pool{};
  const int64_t image[2] = {x.h, x.w};
  for (int d = 0; d < 2; ++d) {
    const int64_t k = window[d], s = stride[d], p = padding[d];
    STD_TORCH_CHECK(k >= 1 && k <= kMaxStep && s >= 1 && s <= kMaxStep && p >= 0 && p <= k / 2, op,
                    ": window and stride must be 1 to ", kMaxStep,
                    " and padding at most half the window, got window ", k, ", stride ", s,
                    ", padding ", p);
    const int64_t room = image[d] + 2 * p - k + (ceil_mode ? s - 1 : 0);
    STD_TORCH_CHECK(image[d] >= 1 && room >= 0, op, ": the image ", x.h, "x", x.w,
                    " is too small for a ", window[0], "x", window[1], " window");
    int64_t size = room / s + 1;
    if (ceil_mode && (size - 1) * s >= image[d] + p) --size;  // it would hold no pixel
    pool.size[d] = size;
    pool.window.kernel[d] = static_cast<int>(k);
    pool.window.stride[d] = static_cast<int>(s);
    pool.window.padding[d] = static_cast<int>(p);
  }
  return pool;
}

// The planes of `x`, or of a copy where their rows are not dense.
otk::Planes dense_rows(const char* op, const Tensor& x, std::optional<Tensor>& copy) {
  const otk::Planes in = planes(op, "x", x);
  if (in.col_stride == 1 || in.w == 1) return in;
  copy = repacked(op, x);
  return planes(op, "x", *copy);
}

Tensor max_pool2d(const Tensor& x, std::vector<int64_t> window, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, bool ceil_mode) {
  const char* op = "max_pool2d";
  check_isa();
  std::optional<Tensor> copy;
  const otk::Planes in = dense_rows(op, x, copy);
  const Pool pool = read_pool(op, in, window, stride, padding, ceil_mode);
  Tensor out = new_planes(op, x, in.n, in.c, pool.size[0], pool.size[1]);
  const otk::Planes result = planes(op, "out", out);
  run_kernel(op, [&] { otk::max_pool2d(in, result, pool.window, torch_threads()); });
  return out;
}

Tensor window_avg_pool2d(const Tensor& x, std::vector<int64_t> window, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, bool ceil_mode, bool count_include_pad,
                         int64_t divisor) {
  const char* op = "window_avg_pool2d";
  check_isa();
  std::optional<Tensor> copy;
  const otk::Planes in = dense_rows(op, x, copy);
  const Pool pool = read_pool(op, in, window, stride, padding, ceil_mode);
  Tensor out = new_planes(op, x, in.n, in.c, pool.size[0], pool.size[1]);
  const otk::Planes result = planes(op, "out", out);
  run_kernel(op, [&] {
    otk::window_avg_pool2d(in, result, pool.window, count_include_pad, divisor, torch_threads());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("window_avg_pool2d", TORCH_BOX(&window_avg_pool2d));
}
