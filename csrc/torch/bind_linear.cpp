// The torch side of linear layers of tokens: checks, and the call.
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
using torch::headeronly::ScalarType;

namespace {

constexpr int64_t kMostTokens = int64_t{1} << 30;

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

// Floats between neighbouring tokens of [..., width]; nothing if they do not lie evenly.
std::optional<int64_t> even_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  std::optional<int64_t> step;
  int64_t expected = 0;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (step && t.stride(d) != expected) return std::nullopt;
    if (!step) step = t.stride(d);
    expected = t.stride(d) * t.size(d);
  }
  return step.value_or(t.size(last));
}

// The tokens of `t` or, where they do not lie evenly, of a copy. planes: dense tokens of each
// channel will do, too.
otk::Tokens tokens(const char* op, const char* name, const Tensor& t, int64_t width, bool planes,
                   std::optional<Tensor>& copy) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() >= 1, op, ": ",
                  name, " must be a float32 CPU tensor [..., channels]. Convert it with .float()");
  const int64_t last = t.size(t.dim() - 1);
  STD_TORCH_CHECK(last == width, op, ": ", name, " has ", last, " channels, the weight expects ",
                  width);
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d)
    STD_TORCH_CHECK(!__builtin_mul_overflow(count, t.size(d), &count), op, ": ", name,
                    " is larger than memory can be");
  STD_TORCH_CHECK(count <= kMostTokens, op, ": ", count, " tokens are more than the kernel takes");
  const Tensor* from = &t;
  std::optional<int64_t> stride = even_stride(t);
  int64_t channel = last > 1 ? t.stride(t.dim() - 1) : 1;
  if (!stride || (channel != 1 && (*stride != 1 || !planes))) {
    copy = torch::stable::contiguous(t);
    from = &*copy;
    stride = last;
    channel = 1;
  }
  // The kernels write to the outputs only.
  return {const_cast<float*>(from->const_data_ptr<float>()), count, last, *stride, channel};
}

otk::SparseWeight linear_weight(const char* op, const Tensor& structure, const Tensor& values,
                                const std::optional<Tensor>& bias) {
  const otk::SparseWeight w = read_weight(op, structure, values, bias);
  STD_TORCH_CHECK(w.kernel == 1 && w.stride == 1 && w.padding == 0, op,
                  ": the packed weight is a convolution with a window of ", w.kernel, ", stride ",
                  w.stride, " and padding ", w.padding,
                  ". Pack a linear layer's weight [out, in] as [out, in, 1, 1]");
  return w;
}

// Allocates the output and calls kernel(x, out, residual).
template <class Kernel>
Tensor with_tokens(const char* op, const Tensor& x, int64_t cin, int64_t cout,
                   const std::optional<Tensor>& residual, Kernel&& kernel) {
  std::optional<Tensor> x_copy, residual_copy;
  const otk::Tokens in = tokens(op, "x", x, cin, true, x_copy);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = cout;
  std::optional<otk::Tokens> extra;
  if (residual) {
    STD_TORCH_CHECK(sizes_of(*residual) == sizes, op, ": residual must have the output's shape");
    extra = tokens(op, "residual", *residual, cout, false, residual_copy);
  }
  Tensor out = torch::stable::new_empty(x, sizes);
  const otk::Tokens result{out.mutable_data_ptr<float>(), in.count, cout, cout, 1};
  run_kernel(op, [&] { kernel(in, result, extra ? &*extra : nullptr); });
  return out;
}

Tensor sparse_linear(const Tensor& x, const Tensor& structure, const Tensor& values,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                     int64_t cout, int64_t activation, double slope) {
  const char* op = "sparse_linear";
  check_isa();
  const otk::Activation act = activation_of(op, false, activation, slope);
  const otk::SparseWeight w = linear_weight(op, structure, values, bias);
  STD_TORCH_CHECK(w.cout == cout, op, ": cout is ", cout, ", the packed weight has ", w.cout,
                  " outputs");
  return with_tokens(op, x, w.cin, cout, residual, [&](auto& in, auto& out, auto* extra) {
    otk::sparse_linear(w, in, out, extra, act, torch_threads());
  });
}

Tensor sparse_mlp(const Tensor& x, const Tensor& structure1, const Tensor& values1,
                  const std::optional<Tensor>& bias1, const Tensor& structure2,
                  const Tensor& values2, const std::optional<Tensor>& bias2,
                  const std::optional<Tensor>& residual, int64_t cout, int64_t activation,
                  double slope) {
  const char* op = "sparse_mlp";
  check_isa();
  const otk::Activation act = activation_of(op, false, activation, slope);
  const otk::SparseWeight w1 = linear_weight(op, structure1, values1, bias1);
  const otk::SparseWeight w2 = linear_weight(op, structure2, values2, bias2);
  STD_TORCH_CHECK(w1.cout == w2.cin && w2.cout == cout, op, ": the layers are ", w1.cin, " -> ",
                  w1.cout, " and ", w2.cin, " -> ", w2.cout, ", cout is ", cout,
                  ": they do not follow each other");
  return with_tokens(op, x, w1.cin, cout, residual, [&](auto& in, auto& out, auto* extra) {
    otk::sparse_mlp(w1, w2, in, out, extra, act, torch_threads());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear));
  m.impl("sparse_mlp", TORCH_BOX(&sparse_mlp));
}
