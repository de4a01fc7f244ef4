// The torch side of attention by sampling: checks, copies of what is not dense, and the call.
#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "parallel.h"

using namespace otk_torch;
using torch::headeronly::ScalarType;

namespace {

// Pixels of a map and floats of a row are counted in int32, sizes are exact in float32.
constexpr int64_t kMaxSide = int64_t{1} << 23, kMaxPixels = int64_t{1} << 29;
constexpr int64_t kMaxChannels = 1 << 16, kMaxPoints = 1 << 20;

void check_floats(const char* op, const char* name, const Tensor& t, int64_t dim,
                  const char* shape) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == dim, op, ": ",
                  name, " must be a float32 CPU tensor ", shape, ", got dim ", t.dim(),
                  ". Convert it with .float() first");
}

// `t`, or a copy, with its last `dims` dimensions dense.
Tensor with_dense_rows(const Tensor& t, int64_t dims) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= t.dim() - dims; --i) {
    if (t.size(i) > 1 && t.stride(i) != expected) return torch::stable::contiguous(t);
    expected *= t.size(i);
  }
  return t;
}

struct Arguments {
  Tensor value, locations, weights;
  std::optional<Tensor> reference;
  otk::DeformAttn a;
};

void check_levels(const char* op, const otk::DeformAttn& a) {
  int64_t pixels = 0, row = 0;
  for (int64_t l = 0; l < a.levels; ++l) {
    const int64_t h = a.shapes[2 * l], w = a.shapes[2 * l + 1];
    STD_TORCH_CHECK(h >= 0 && w >= 0 && h < kMaxSide && w < kMaxSide, op, ": level ", l, " is ", h,
                    "x", w, "; sizes are at least 0 and less than ", kMaxSide);
    pixels += h * w;
    STD_TORCH_CHECK(pixels <= kMaxPixels && (w + 2) * (a.d + 16) < kMaxPixels, op, ": level ", l,
                    " of ", h, "x", w, " is larger than the kernel can count");
    row += h && w ? (h + 2) * (w + 2) : 4;
  }
  STD_TORCH_CHECK(pixels == a.s, op, ": the levels have ", pixels, " pixels, but value has ", a.s,
                  "; pass the (height, width) of every level in the order of value");
  STD_TORCH_CHECK(row < 4 * kMaxPixels, op, ": the levels are larger than the kernel can count");
}

// The arguments of `value` and points; raises unless all sizes agree.
Arguments arguments(const char* op, const Tensor& value, const Tensor& shapes,
                    const Tensor& locations, const Tensor& weights,
                    const std::optional<Tensor>& reference) {
  check_isa();
  check_floats(op, "value", value, 4, "[N, S, M, D]");
  check_floats(op, "locations", locations, 6, "[N, Q, M, L, P, 2]");
  check_floats(op, "weights", weights, 5, "[N, Q, M, L, P]");
  STD_TORCH_CHECK(shapes.is_cpu() && shapes.scalar_type() == ScalarType::Long &&
                      shapes.dim() == 2 && shapes.size(1) == 2 && shapes.is_contiguous(),
                  op,
                  ": shapes must be a contiguous int64 CPU tensor [L, 2] of heights and widths");
  Arguments found{with_dense_rows(value, 1),
                  with_dense_rows(locations, 3),
                  with_dense_rows(weights, 2),
                  std::nullopt,
                  {}};
  otk::DeformAttn& a = found.a;
  a.shapes = shapes.const_data_ptr<int64_t>();
  a.n = value.size(0);
  a.s = value.size(1);
  a.m = value.size(2);
  a.d = value.size(3);
  a.q = locations.size(1);
  a.levels = shapes.size(0);
  a.points = locations.size(4);
  STD_TORCH_CHECK(a.d <= kMaxChannels && a.levels <= kMaxPoints && a.points <= kMaxPoints &&
                      a.levels * a.points <= kMaxPoints,
                  op, ": ", a.d, " channels per head and ", a.levels, " x ", a.points,
                  " points are more than the kernel takes");
  check_levels(op, a);
  const std::array<int64_t, 6> points{a.n, a.q, a.m, a.levels, a.points, 2};
  for (int i = 0; i < 6; ++i) {
    STD_TORCH_CHECK(locations.size(i) == points[i], op, ": locations have size ", locations.size(i),
                    " in dimension ", i, ", expected ", points[i], " for [N, Q, M, L, P, 2]");
    STD_TORCH_CHECK(i == 5 || weights.size(i) == points[i], op, ": weights have size ",
                    weights.size(i == 5 ? 0 : i), " in dimension ", i, ", expected ", points[i],
                    " for [N, Q, M, L, P]");
  }
  a.value = found.value.const_data_ptr<float>();
  a.value_n = found.value.stride(0);
  a.value_s = found.value.stride(1);
  a.value_m = found.value.stride(2);
  a.locations = found.locations.const_data_ptr<float>();
  a.locations_n = found.locations.stride(0);
  a.locations_q = found.locations.stride(1);
  a.locations_m = found.locations.stride(2);
  a.weights = found.weights.const_data_ptr<float>();
  a.weights_n = found.weights.stride(0);
  a.weights_q = found.weights.stride(1);
  a.weights_m = found.weights.stride(2);
  if (reference) {
    check_floats(op, "reference", *reference, 4, "[N, Q, L, 2 or 4]");
    const int64_t size = reference->size(3);
    STD_TORCH_CHECK(reference->size(0) == a.n && reference->size(1) == a.q &&
                        reference->size(2) == a.levels && (size == 2 || size == 4),
                    op, ": reference must be [", a.n, ", ", a.q, ", ", a.levels, ", 2 or 4], got [",
                    reference->size(0), ", ", reference->size(1), ", ", reference->size(2), ", ",
                    size, "]");
    found.reference = with_dense_rows(*reference, 1);
    a.reference = found.reference->const_data_ptr<float>();
    a.reference_n = found.reference->stride(0);
    a.reference_q = found.reference->stride(1);
    a.reference_l = found.reference->stride(2);
    a.reference_size = size;
  }
  return found;
}

Tensor ms_deform_attn(const Tensor& value, const Tensor& shapes, const Tensor& locations,
                      const Tensor& weights, const std::optional<Tensor>& reference) {
  const char* op = "ms_deform_attn";
  const Arguments given = arguments(op, value, shapes, locations, weights, reference);
  const otk::DeformAttn& a = given.a;
  Tensor out = torch::stable::new_empty(value, std::array<int64_t, 3>{a.n, a.q, a.m * a.d});
  float* to = out.mutable_data_ptr<float>();
  run_kernel(op, [&] { otk::ms_deform_attn(a, to, torch_threads()); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad, const Tensor& value,
                                                           const Tensor& shapes,
                                                           const Tensor& locations,
                                                           const Tensor& weights) {
  const char* op = "ms_deform_attn_backward";
  const Arguments given = arguments(op, value, shapes, locations, weights, std::nullopt);
  const otk::DeformAttn& a = given.a;
  check_floats(op, "grad", grad, 3, "[N, Q, M * D]");
  STD_TORCH_CHECK(grad.size(0) == a.n && grad.size(1) == a.q && grad.size(2) == a.m * a.d, op,
                  ": grad must be [", a.n, ", ", a.q, ", ", a.m * a.d, "]");
  const Tensor dense = with_dense_rows(grad, 3);
  Tensor of_value = torch::stable::new_empty(value, std::array<int64_t, 4>{a.n, a.s, a.m, a.d});
  Tensor of_locations =
      torch::stable::new_empty(value, std::array<int64_t, 6>{a.n, a.q, a.m, a.levels, a.points, 2});
  Tensor of_weights =
      torch::stable::new_empty(value, std::array<int64_t, 5>{a.n, a.q, a.m, a.levels, a.points});
  const float* from = dense.const_data_ptr<float>();
  float* to_value = of_value.mutable_data_ptr<float>();
  float* to_locations = of_locations.mutable_data_ptr<float>();
  float* to_weights = of_weights.mutable_data_ptr<float>();
  run_kernel(op, [&] {
    otk::ms_deform_attn_backward(a, from, to_value, to_locations, to_weights, torch_threads());
  });
  return {of_value, of_locations, of_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
}
