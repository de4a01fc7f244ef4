// Arguments of the ops on spectra: checked here, so that the kernel reads nothing outside them.
#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cmath>
#include <tuple>

#include "arguments.h"
#include "parallel.h"

using namespace otk_torch;
using torch::headeronly::ScalarType;

namespace {

// Rows of a matrix: the number of doubles in its triangle is far from an int64's end.
constexpr int64_t kMaxRows = int64_t{1} << 24;

// Whether a fit can order all values and their logarithms.
bool fits_powerlaw(const double* x, int64_t count) {
  double before = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!(x[i] > 0 && x[i] >= before && std::isfinite(x[i]))) return false;
    before = x[i];
  }
  return true;
}

const int64_t* int64_list(const char* op, const char* name, const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 1 &&
                      t.is_contiguous() && t.numel() == size,
                  op, ": ", name, " must be a contiguous 1-d int64 CPU tensor of ", size,
                  " elements, got ", t.numel());
  return t.const_data_ptr<int64_t>();
}

Tensor powerlaw_fit(const Tensor& x, const Tensor& offsets, const Tensor& first, const Tensor& last,
                    int64_t samples, int64_t block) {
  const char* op = "powerlaw_fit";
  STD_TORCH_CHECK(
      x.is_cpu() && x.scalar_type() == ScalarType::Double && x.dim() == 1 && x.is_contiguous(), op,
      ": x must be a contiguous 1-d float64 CPU tensor");
  STD_TORCH_CHECK(samples >= 0 && samples <= 1 << 20 && block >= 1 && block <= 1 << 20, op,
                  ": samples must be at least 0 and block at least 1, got ", samples, " and ",
                  block);
  const int64_t layers = offsets.numel() - 1;
  STD_TORCH_CHECK(layers >= 0, op, ": offsets must hold one element more than there are spectra");
  const int64_t* at = int64_list(op, "offsets", offsets, layers + 1);
  const int64_t* from = int64_list(op, "first", first, layers);
  const int64_t* to = int64_list(op, "last", last, layers);
  STD_TORCH_CHECK(at[0] == 0 && at[layers] == x.numel(), op, ": offsets must run from 0 to ",
                  x.numel(), ", the number of values");
  for (int64_t i = 0; i < layers; ++i)
    STD_TORCH_CHECK(at[i] <= at[i + 1] && from[i] >= 0 && to[i] <= at[i + 1] - at[i], op,
                    ": spectrum ", i, " has ", at[i + 1] - at[i], " values, but its window is ",
                    from[i], " to ", to[i]);
  const double* values = x.const_data_ptr<double>();
  for (int64_t i = 0; i < layers; ++i)
    STD_TORCH_CHECK(from[i] >= to[i] || fits_powerlaw(values + at[i], at[i + 1] - at[i]), op,
                    ": the values of spectrum ", i,
                    " must be positive, finite and ascending; drop zeros and sort them first");
  Tensor out = torch::stable::new_empty(x, std::array<int64_t, 2>{layers, 3});
  double* fits = out.mutable_data_ptr<double>();
  run_kernel(op, [&] {
    otk::powerlaw_fit(values, at, from, to, layers, static_cast<int>(samples),
                      static_cast<int>(block), fits, torch_threads());
  });
  return out;
}

std::tuple<Tensor, Tensor> gram_eigenvalues(const Tensor& matrices, double scale, double threshold,
                                            double relative) {
  const char* op = "gram_eigenvalues";
  const bool is_double = matrices.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(matrices.is_cpu() && matrices.dim() == 3 &&
                      (is_double || matrices.scalar_type() == ScalarType::Float),
                  op, ": matrices must be a 3-d float32 or float64 CPU tensor");
  STD_TORCH_CHECK(matrices.size(1) <= kMaxRows, op, ": matrices have ", matrices.size(1),
                  " rows, but at most ", kMaxRows, " can be reduced; transpose wide ones");
  STD_TORCH_CHECK(scale >= 0 && relative >= 0, op, ": scale and relative must be at least 0, got ",
                  scale, " and ", relative);
  const otk::StridedMatrices a{matrices.const_data_ptr(), is_double,         matrices.size(0),
                               matrices.size(1),          matrices.size(2),  matrices.stride(0),
                               matrices.stride(1),        matrices.stride(2)};
  Tensor values = torch::stable::new_empty(matrices, std::array<int64_t, 2>{a.count, a.rows},
                                           ScalarType::Double);
  Tensor redone =
      torch::stable::new_empty(matrices, std::array<int64_t, 1>{a.count}, ScalarType::Long);
  double* found = values.mutable_data_ptr<double>();
  int64_t* again = redone.mutable_data_ptr<int64_t>();
  run_kernel(op, [&] {
    otk::gram_eigenvalues(a, scale, threshold, relative, found, again, torch_threads());
  });
  return {values, redone};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CPU, m) {
  m.impl("gram_eigenvalues", TORCH_BOX(&gram_eigenvalues));
  m.impl("powerlaw_fit", TORCH_BOX(&powerlaw_fit));
}
