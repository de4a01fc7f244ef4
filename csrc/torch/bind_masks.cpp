// The torch side of scores from masks: checks, and the call.
#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <vector>

#include "arguments.h"
#include "parallel.h"

using namespace otk_torch;
using torch::headeronly::ScalarType;

namespace {

constexpr const char* kOp = "mask_scores";
// Columns are counted in int32; a row of queries, and all classes, are held in memory.
constexpr int64_t kMaxSide = int64_t{1} << 23, kMaxCount = int64_t{1} << 24;
constexpr int64_t kMaxClasses = int64_t{1} << 30, kMaxOut = int64_t{1} << 48;

void check_floats(const char* name, const Tensor& t, int64_t dim, const char* shape) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == dim, kOp, ": ",
                  name, " must be a float32 CPU tensor ", shape, ", got dim ", t.dim(),
                  ". Convert it with .float() first");
}

// (height, width) of a step into `to`; false if it is left out.
bool read_size(const char* name, const std::vector<int64_t>& given, int64_t* to) {
  if (given.empty()) return false;
  STD_TORCH_CHECK(given.size() == 2 && given[0] > 0 && given[1] > 0 && given[0] < kMaxSide &&
                      given[1] < kMaxSide,
                  kOp, ": ", name, " must be a height and a width of at least 1 and less than ",
                  kMaxSide);
  to[0] = given[0];
  to[1] = given[1];
  return true;
}

Tensor mask_scores(const Tensor& masks, const Tensor& classes, std::vector<int64_t> size,
                   std::vector<int64_t> crop, std::vector<int64_t> resize) {
  check_isa();
  check_floats("masks", masks, 4, "[N, Q, h, w]");
  check_floats("classes", classes, 3, "[N, Q, K]");
  otk::MaskScores a{};
  a.n = masks.size(0);
  a.q = masks.size(1);
  a.h = masks.size(2);
  a.w = masks.size(3);
  a.k = classes.size(2);
  STD_TORCH_CHECK(classes.size(0) == a.n && classes.size(1) == a.q, kOp, ": classes must be [", a.n,
                  ", ", a.q, ", K] for these masks, got [", classes.size(0), ", ", classes.size(1),
                  ", ", a.k, "]");
  STD_TORCH_CHECK(a.n < kMaxCount && a.q < kMaxCount && a.k < kMaxCount && a.h < kMaxSide &&
                      a.w < kMaxSide && a.n * a.q < kMaxClasses && a.n * a.q * a.k < kMaxClasses,
                  kOp, ": ", a.n, " images, ", a.q, " masks of ", a.h, "x", a.w, " and ", a.k,
                  " classes are more than the kernel takes");
  a.size[0] = a.h;
  a.size[1] = a.w;
  a.first = read_size("size", size, a.size);
  a.crop[0] = a.size[0];
  a.crop[1] = a.size[1];
  read_size("crop", crop, a.crop);
  STD_TORCH_CHECK(a.crop[0] <= a.size[0] && a.crop[1] <= a.size[1], kOp, ": crop is ", a.crop[0],
                  "x", a.crop[1], ", larger than the masks, which are ", a.size[0], "x", a.size[1]);
  a.out[0] = a.crop[0];
  a.out[1] = a.crop[1];
  a.second = read_size("resize", resize, a.out);
  STD_TORCH_CHECK(!(a.first || a.second) || a.h * a.w > 0, kOp, ": masks of ", a.h, "x", a.w,
                  " have no pixels to resize");
  const int64_t plane = a.out[0] * a.out[1];
  STD_TORCH_CHECK(plane == 0 || a.n * a.k < kMaxOut / plane, kOp, ": scores of ", a.n, "x", a.k,
                  " times ", a.out[0], "x", a.out[1], " are more than fit into memory");
  a.masks = masks.const_data_ptr<float>();
  a.masks_n = masks.stride(0);
  a.masks_q = masks.stride(1);
  a.masks_h = masks.stride(2);
  a.masks_w = masks.stride(3);
  a.classes = classes.const_data_ptr<float>();
  a.classes_n = classes.stride(0);
  a.classes_q = classes.stride(1);
  a.classes_k = classes.stride(2);
  Tensor out =
      torch::stable::new_empty(masks, std::array<int64_t, 4>{a.n, a.k, a.out[0], a.out[1]});
  float* to = out.mutable_data_ptr<float>();
  run_kernel(kOp, [&] { otk::mask_scores(a, to, torch_threads()); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CPU, m) {
  m.impl("mask_scores", TORCH_BOX(&mask_scores));
}
