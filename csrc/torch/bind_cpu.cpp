// The torch side of the kernels on activations: checks arguments, allocates outputs, calls otk.h.
// Schemas, fakes and autograd live in opentrans_kernels/ops.
#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "../otk.h"
#include "arguments.h"
#include "parallel.h"

using namespace otk_torch;
using torch::headeronly::ScalarType;

namespace {

// The input of a convolution, and its output's height and width. `copy`: of x, where one is needed.
struct ConvInput {
  otk::Planes planes;
  int64_t h, w;
};
ConvInput conv_input(const char* op, const Tensor& x, const otk::SparseWeight& w,
                     std::optional<Tensor>& copy) {
  const otk::Planes in = planes(op, "x", x);
  STD_TORCH_CHECK(in.c == w.cin, op, ": x has ", in.c, " channels, the weight expects ", w.cin);
  const int64_t h = int64_t{in.h} + 2 * w.padding - otk::span(w);
  const int64_t width = int64_t{in.w} + 2 * w.padding - otk::span(w);
  STD_TORCH_CHECK(h >= 0 && width >= 0, op, ": input ", in.h, "x", in.w, " is smaller than the ",
                  otk::span(w), "x", otk::span(w), " kernel");
  return {reachable_planes(op, x, w, copy), h / w.stride + 1, width / w.stride + 1};
}

// What is added to `out`; `copy`: of it, where its rows are not dense.
std::optional<otk::Planes> residual_planes(const char* op, const std::optional<Tensor>& residual,
                                           const Tensor& out, std::optional<Tensor>& copy) {
  if (!residual) return std::nullopt;
  const otk::Planes extra = planes(op, "residual", *residual);
  STD_TORCH_CHECK(extra.n == out.size(0) && extra.c == out.size(1) && extra.h == out.size(2) &&
                      extra.w == out.size(3),
                  op, ": residual must have the output's shape [", out.size(0), ", ", out.size(1),
                  ", ", out.size(2), ", ", out.size(3), "]");
  if (dense_planes(extra)) return extra;
  copy = repacked(op, *residual);
  return planes(op, "residual", *copy);
}

Tensor sparse_conv2d(const Tensor& x, const Tensor& structure, const Tensor& values,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                     int64_t cout, int64_t kernel, int64_t stride, int64_t padding, bool relu,
                     int64_t activation, double slope, int64_t dilation) {
  const char* op = "sparse_conv2d";
  check_isa();
  const otk::Activation act = activation_of(op, relu, activation, slope);
  const otk::SparseWeight w = read_weight(op, structure, values, bias);
  STD_TORCH_CHECK(w.cout == cout && w.kernel == kernel && w.stride == stride &&
                      w.padding == padding && w.dilation == dilation,
                  op,
                  ": cout, kernel, stride, padding, dilation do not match the packed structure");
  std::optional<Tensor> packed;
  const ConvInput input = conv_input(op, x, w, packed);
  const otk::Planes& in = input.planes;
  const int64_t h = input.h, width = input.w;
  Tensor out = new_planes(op, x, in.n, cout, h, width);
  std::optional<Tensor> copy;
  const std::optional<otk::Planes> extra = residual_planes(op, residual, out, copy);
  const otk::Planes result = planes(op, "out", out);
  run_kernel(op, [&] {
    otk::sparse_conv2d(w, in, result, extra ? &*extra : nullptr, act, torch_threads());
  });
  return out;
}

Tensor sparse_conv2d_wgrad(const Tensor& x, const Tensor& grad_out, const Tensor& structure,
                           const Tensor& values) {
  const char* op = "sparse_conv2d_wgrad";
  check_isa();
  const otk::SparseWeight w = read_weight(op, structure, values, std::nullopt);
  std::optional<Tensor> packed;
  const ConvInput input = conv_input(op, x, w, packed);
  const otk::Planes &in = input.planes, grad = planes(op, "grad_out", grad_out);
  STD_TORCH_CHECK(grad.c == w.cout && in.n == grad.n && grad.h == input.h && grad.w == input.w, op,
                  ": x and grad_out do not fit the packed convolution");
  Tensor out = torch::stable::empty_like(values);
  float* to = out.mutable_data_ptr<float>();
  run_kernel(op, [&] { otk::sparse_conv2d_wgrad(w, in, grad, to, torch_threads()); });
  return out;
}

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        int64_t stride, int64_t padding, int64_t activation, double slope) {
  const char* op = "depthwise_conv2d";
  check_isa();
  otk::Depthwise conv{};
  conv.act = activation_of(op, false, activation, slope);
  otk::Planes in = planes(op, "x", x);
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Float &&
                      weight.dim() == 4 && weight.size(0) == in.c && weight.size(1) == 1 &&
                      weight.size(2) == weight.size(3) && weight.size(2) >= 1 &&
                      weight.is_contiguous(),
                  op, ": weight must be a contiguous float32 CPU tensor [", in.c,
                  ", 1, k, k], one window per channel of x");
  STD_TORCH_CHECK(!bias || (bias->is_cpu() && bias->scalar_type() == ScalarType::Float &&
                            bias->is_contiguous() && bias->numel() == in.c),
                  op, ": bias must be a contiguous float32 CPU tensor of ", in.c, " elements");
  STD_TORCH_CHECK(stride >= 1 && stride <= otk::kMaxStep && padding >= 0 &&
                      padding <= otk::kMaxStep && weight.size(2) <= otk::kMaxStep,
                  op, ": kernel and stride must be from 1, padding from 0, each to ", otk::kMaxStep,
                  "; got ", weight.size(2), ", ", stride, ", ", padding);
  conv.kernel = static_cast<int>(weight.size(2));
  conv.stride = static_cast<int>(stride);
  conv.padding = static_cast<int>(padding);
  conv.weight = weight.const_data_ptr<float>();
  conv.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  const int64_t h = in.h + 2 * padding - conv.kernel, width = in.w + 2 * padding - conv.kernel;
  STD_TORCH_CHECK(h >= 0 && width >= 0, op, ": input ", in.h, "x", in.w, " with padding ", padding,
                  " is smaller than the ", conv.kernel, "x", conv.kernel, " kernel");
  std::optional<Tensor> copy;
  if (in.col_stride != 1 && in.w > 1) {
    copy = repacked(op, x);
    in = planes(op, "x", *copy);
  }
  Tensor out = new_planes(op, x, in.n, in.c, h / stride + 1, width / stride + 1);
  const otk::Planes result = planes(op, "out", out);
  run_kernel(op, [&] { otk::depthwise_conv2d(conv, in, result, torch_threads()); });
  return out;
}

Tensor winograd_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, int64_t cout, int64_t padding,
                       int64_t activation, double slope) {
  const char* op = "winograd_conv2d";
  check_isa();
  otk::Winograd conv{};
  conv.act = activation_of(op, false, activation, slope);
  const otk::Planes in = planes(op, "x", x);
  STD_TORCH_CHECK(cout >= 0 && cout <= INT32_MAX - otk::kWinogradRows && padding >= 0 &&
                      padding <= otk::kMaxStep,
                  op, ": cout and padding must be from 0, padding to ", otk::kMaxStep, "; got ",
                  cout, ", ", padding);
  const int64_t blocks = (cout + otk::kWinogradRows - 1) / otk::kWinogradRows;
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Float &&
                      weight.dim() == 4 && weight.size(0) == 16 && weight.size(1) == blocks &&
                      weight.size(2) == in.c && weight.size(3) == otk::kWinogradRows &&
                      weight.is_contiguous(),
                  op, ": weight must be a contiguous float32 CPU tensor [16, ", blocks, ", ", in.c,
                  ", ", otk::kWinogradRows, "] as transform_weight() makes it");
  STD_TORCH_CHECK(!bias || (bias->is_cpu() && bias->scalar_type() == ScalarType::Float &&
                            bias->is_contiguous() && bias->numel() == cout),
                  op, ": bias must be a contiguous float32 CPU tensor of ", cout, " elements");
  conv.weight = weight.const_data_ptr<float>();
  conv.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  conv.cin = in.c;
  conv.cout = static_cast<int>(cout);
  conv.padding = static_cast<int>(padding);
  const int64_t h = in.h + 2 * padding - 2, width = in.w + 2 * padding - 2;
  STD_TORCH_CHECK(h >= 1 && width >= 1, op, ": input ", in.h, "x", in.w, " with padding ", padding,
                  " is smaller than the 3x3 kernel");
  Tensor out = new_planes(op, x, in.n, cout, h, width);
  std::optional<Tensor> copy;
  const std::optional<otk::Planes> extra = residual_planes(op, residual, out, copy);
  const otk::Planes result = planes(op, "out", out);
  run_kernel(op, [&] {
    otk::winograd_conv2d(conv, in, result, extra ? &*extra : nullptr, torch_threads());
  });
  return out;
}

Tensor avg_pool2d(const Tensor& x, int64_t k) {
  const char* op = "avg_pool2d";
  check_isa();
  STD_TORCH_CHECK(k >= 1, op, ": the window must be at least 1, got ", k);
  otk::Planes in = planes(op, "x", x);
  std::optional<Tensor> copy;
  if (in.col_stride != 1) {
    copy = repacked(op, x);
    in = planes(op, "x", *copy);
  }
  STD_TORCH_CHECK(in.h >= k && in.w >= k, op, ": the image ", in.h, "x", in.w,
                  " is too small for a ", k, "x", k, " window");
  Tensor out = new_planes(op, x, in.n, in.c, in.h / k, in.w / k);
  otk::avg_pool2d(in, planes(op, "out", out), static_cast<int>(k), torch_threads());
  return out;
}

// Dense rows of an image tensor: planes, or whole images if channels are the last dimension.
otk::Rows rows(const char* op, const char* name, const Tensor& t, bool channels_last) {
  const otk::Planes p = planes(op, name, t);
  const bool dense = channels_last
                         ? (p.c <= 1 || t.stride(1) == 1) && (p.w <= 1 || p.col_stride == p.c) &&
                               (p.h <= 1 || p.row_stride == int64_t{p.w} * p.c)
                         : (p.w <= 1 || p.col_stride == 1) && (p.h <= 1 || p.row_stride == p.w);
  STD_TORCH_CHECK(dense, op, ": ", name, " does not have dense ",
                  channels_last ? "channels_last images" : "planes", "; call .contiguous() first");
  const int64_t pixels = int64_t{p.h} * p.w;
  if (channels_last) return {p.data, p.n, 1, p.batch_stride, 0, pixels * p.c, 0};
  // Planes as plane_stride() lays them out; other gaps may be somebody else's.
  const bool padded = p.plane_stride == otk::plane_stride(pixels) && whole_vectors(p);
  const int64_t padding = padded ? (pixels + 15) / 16 * 16 - pixels : 0;
  return {p.data, p.n, p.c, p.batch_stride, p.plane_stride, pixels, padding};
}

// The shape of an activation, checked against another one's.
void same_shape(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == like.size(0) && t.size(1) == like.size(1) &&
                      t.size(2) == like.size(2) && t.size(3) == like.size(3),
                  op, ": ", name, " must have the shape of the activation");
}

std::optional<otk::Rows> rows(const char* op, const char* name, const std::optional<Tensor>& t,
                              const Tensor& like, bool channels_last) {
  if (!t) return std::nullopt;
  same_shape(op, name, *t, like);
  return rows(op, name, *t, channels_last);
}

const otk::Rows* pointer(const std::optional<otk::Rows>& r) { return r ? &*r : nullptr; }

const float* channel_values(const char* op, const char* name, const std::optional<Tensor>& t,
                            int64_t channels) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->is_contiguous() &&
                      t->numel() == channels,
                  op, ": ", name, " must be a contiguous float32 CPU tensor of ", channels,
                  " elements, one per channel");
  return t->const_data_ptr<float>();
}

Tensor relu_bits(const Tensor& z, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& shift, const std::optional<Tensor>& residual,
                 bool with_bits, bool channels_last) {
  const char* op = "relu_bits";
  check_isa();
  const otk::Rows out = rows(op, "z", z, channels_last);
  const int64_t channels = z.size(1);
  const otk::ChannelMap map{channel_values(op, "scale", scale, channels),
                            channel_values(op, "shift", shift, channels), channels};
  const std::optional<otk::Rows> extra = rows(op, "residual", residual, z, channels_last);
  const std::array<int64_t, 2> size{with_bits ? out.outer * out.inner : 0, (out.length + 7) / 8};
  Tensor bits = torch::stable::new_empty(z, size, ScalarType::Byte);
  otk::relu_bits(out, map, pointer(extra), with_bits ? bits.mutable_data_ptr<uint8_t>() : nullptr,
                 torch_threads());
  return bits;
}

void relu_bits_backward(const Tensor& grad, const std::optional<Tensor>& bits,
                        const std::optional<Tensor>& y, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& out, const std::optional<Tensor>& scaled,
                        bool channels_last) {
  const char* op = "relu_bits_backward";
  check_isa();
  const otk::Rows from = rows(op, "grad", grad, channels_last);
  const auto to = rows(op, "out", out, grad, channels_last);
  const auto multiplied = rows(op, "scaled", scaled, grad, channels_last);
  const auto output = rows(op, "y", y, grad, channels_last);
  const int64_t channels = grad.size(1);
  const otk::ChannelMap map{channel_values(op, "scale", scale, channels), nullptr, channels};
  STD_TORCH_CHECK(bool(bits) != bool(y), op, ": pass either bits or y");
  STD_TORCH_CHECK(bool(scale) == bool(scaled), op, ": scale and scaled belong together");
  STD_TORCH_CHECK(!bits || (bits->is_cpu() && bits->scalar_type() == ScalarType::Byte &&
                            bits->is_contiguous() &&
                            bits->numel() == from.outer * from.inner * ((from.length + 7) / 8)),
                  op, ": bits do not belong to this activation");
  otk::relu_bits_backward(from, bits ? bits->const_data_ptr<uint8_t>() : nullptr, pointer(output),
                          map, pointer(to), pointer(multiplied), torch_threads());
}

void avg_pool2d_backward(const Tensor& grad, const Tensor& out, int64_t k) {
  const char* op = "avg_pool2d_backward";
  check_isa();
  STD_TORCH_CHECK(k >= 1, op, ": the window must be at least 1, got ", k);
  const otk::Rows from = rows(op, "grad", grad, false), to = rows(op, "out", out, false);
  STD_TORCH_CHECK(out.size(0) == grad.size(0) && out.size(1) == grad.size(1) &&
                      out.size(2) / k == grad.size(2) && out.size(3) / k == grad.size(3),
                  op, ": grad is not the gradient of a ", k, "x", k, " pooling of out");
  otk::avg_pool2d_backward(from, to, static_cast<int>(out.size(3)), static_cast<int>(k),
                           torch_threads());
}

std::string cpu_capability() {
  check_isa();
  const char* why = nullptr;
  return otk::cpu_capability(&why);
}

int64_t scratch_bytes() { return otk::scratch_bytes() + otk::pool_bytes(); }
void release_memory() { otk::pool_trim(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CPU, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d));
  m.impl("sparse_conv2d_wgrad", TORCH_BOX(&sparse_conv2d_wgrad));
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("winograd_conv2d", TORCH_BOX(&winograd_conv2d));
  m.impl("avg_pool2d", TORCH_BOX(&avg_pool2d));
  m.impl("avg_pool2d_backward", TORCH_BOX(&avg_pool2d_backward));
  m.impl("relu_bits", TORCH_BOX(&relu_bits));
  m.impl("relu_bits_backward", TORCH_BOX(&relu_bits_backward));
}

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("scratch_bytes", TORCH_BOX(&scratch_bytes));
  m.impl("release_memory", TORCH_BOX(&release_memory));
}
