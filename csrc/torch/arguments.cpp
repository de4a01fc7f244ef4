// What the torch side of every kernel on activations needs; see arguments.h.
#include "arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>

using torch::headeronly::ScalarType;

namespace otk_torch {
namespace {

// Coordinates are int in the kernels, with the padding around an image and steps past its end.
constexpr int64_t kMaxSize = int64_t{1} << 30;
// Floats of a tensor: their bytes are counted in int64, with room for what rounding adds.
constexpr int64_t kMaxFloats = int64_t{1} << 56;
constexpr int64_t kPoolBytes = 256 * 1024;  // smaller outputs come from torch's allocator

void* pool_memory(const char* op, int64_t bytes) {
  void* block = nullptr;
  run_kernel(op, [&] { block = otk::pool_take(bytes); });
  return block;
}

}  // namespace

void check_isa() {
  const char* why = nullptr;
  STD_TORCH_CHECK(otk::cpu_capability(&why), "OPENTRANS_CPU_CAPABILITY cannot be honoured: ", why,
                  ". Use one of avx512, avx2, neon, generic that this CPU has, or unset it.");
}

otk::SparseWeight read_weight(const char* op, const Tensor& structure, const Tensor& values,
                              const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(structure.is_cpu() && structure.scalar_type() == ScalarType::Int &&
                      structure.dim() == 1 && structure.is_contiguous(),
                  op, ": structure must be a contiguous 1-d int32 CPU tensor made by SparseWeight");
  otk::SparseWeight w{};
  const char* why = otk::read_pack(structure.const_data_ptr<int32_t>(), structure.numel(), &w);
  STD_TORCH_CHECK(!why, op, ": structure ", why, " (", structure.numel(),
                  " words); pack the weight again");
  STD_TORCH_CHECK(values.is_cpu() && values.scalar_type() == ScalarType::Float &&
                      values.is_contiguous() && values.numel() == w.nnz,
                  op, ": values must be a contiguous float32 CPU tensor of ", w.nnz,
                  " elements, one per nonzero, got ", values.numel());
  w.values = values.const_data_ptr<float>();
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->scalar_type() == ScalarType::Float &&
                        bias->is_contiguous() && bias->numel() == w.cout,
                    op, ": bias must be a contiguous float32 CPU tensor of ", w.cout,
                    " elements, got ", bias->numel());
    w.bias = bias->const_data_ptr<float>();
  }
  return w;
}

otk::Planes planes(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 4, op, ": ",
                  name, " must be a float32 CPU tensor [N, C, H, W], got dim ", t.dim(),
                  ". Convert it with .float() first");
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(t.size(i) <= kMaxSize, op, ": ", name, " has size ", t.size(i),
                    " in dimension ", i, ", but the kernels take at most ", kMaxSize,
                    "; split it into parts");
  otk::Planes p{};
  p.data = const_cast<float*>(t.const_data_ptr<float>());
  p.n = static_cast<int>(t.size(0));
  p.c = static_cast<int>(t.size(1));
  p.h = static_cast<int>(t.size(2));
  p.w = static_cast<int>(t.size(3));
  // The storage bounds a stride, unless its dimension has one element: that may have any.
  const auto stride = [&](int i) {
    return t.size(i) > 1 ? t.stride(i) : std::min(t.stride(i), kMaxSize);
  };
  p.batch_stride = stride(0);
  p.plane_stride = stride(1);
  p.row_stride = stride(2);
  p.col_stride = stride(3);
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  p.readable = bytes / 4 - t.storage_offset();
  return p;
}

Tensor new_planes(const char* op, const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t plane = otk::plane_stride(h * w);
  int64_t floats = 0;
  STD_TORCH_CHECK(h <= kMaxSize && w <= kMaxSize &&
                      !__builtin_mul_overflow(n * c, plane, &floats) && floats < kMaxFloats,
                  op, ": a result [", n, ", ", c, ", ", h, ", ", w,
                  "] is larger than memory can be; split the input into parts");
  // One cache line more than the planes: the last vector of the last plane is written whole.
  const std::array<int64_t, 1> size{floats + 16};
  const int64_t bytes = size[0] * 4;
  Tensor flat = bytes < kPoolBytes ? torch::stable::new_empty(like, size)
                                   : torch::stable::from_blob(
                                         pool_memory(op, bytes), size, {1},
                                         torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                         ScalarType::Float, &otk::pool_give);
  const std::array<int64_t, 4> sizes{n, c, h, w}, strides{c * plane, plane, w, 1};
  // The same storage, but no view to autograd, which would refuse to write to it in place.
  AtenTensorHandle view = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(flat.get(), 4, sizes.data(), strides.data(), 0, &view));
  // The lanes behind a plane are read with its last vector. What they hold does not reach a pixel,
  // but left-over bits that happen to be denormal cost 100 cycles per multiply-add.
  const int64_t pixels = h * w, whole = (pixels + 15) / 16 * 16;
  if (whole > pixels) {
    float* data = flat.mutable_data_ptr<float>();
    for (int64_t i = 0; i < n * c; ++i)
      std::fill(data + i * plane + pixels, data + i * plane + whole, 0.f);
  }
  return Tensor(view);
}

bool dense_planes(const otk::Planes& p) {
  return p.col_stride == 1 && (p.row_stride == p.w || p.h <= 1);
}
bool whole_vectors(const otk::Planes& p) {
  return dense_planes(p) && (p.n - 1) * p.batch_stride + (p.c - 1) * p.plane_stride +
                                    (int64_t{p.h} * p.w + 15) / 16 * 16 <=
                                p.readable;
}
Tensor repacked(const char* op, const Tensor& t) {
  Tensor copy = new_planes(op, t, t.size(0), t.size(1), t.size(2), t.size(3));
  torch::stable::copy_(copy, t);
  return copy;
}

bool reachable(const otk::Planes& p, const otk::SparseWeight& w) {
  const int64_t border = 2 * w.padding + otk::span(w);
  const int64_t floats = std::max(p.plane_stride, (p.h + border) * (p.w + border));
  return floats < (int64_t{1} << 30) / w.chunk;
}

otk::Planes reachable_planes(const char* op, const Tensor& x, const otk::SparseWeight& w,
                             std::optional<Tensor>& copy) {
  const otk::Planes in = planes(op, "x", x);
  if (reachable(in, w)) return in;
  otk::Planes dense = in;
  dense.plane_stride = otk::plane_stride(int64_t{in.h} * in.w);
  STD_TORCH_CHECK(reachable(dense, w), op, ": an image of ", in.h, "x", in.w,
                  " is too large; split it into tiles");
  copy = repacked(op, x);
  return planes(op, "x", *copy);
}

otk::Activation activation_of(const char* op, bool relu, int64_t kind, double slope) {
  STD_TORCH_CHECK(kind >= otk::kNone && kind <= otk::kQuickGelu, op, ": ", kind,
                  " is no activation; they are numbered from ", int{otk::kNone}, " to ",
                  int{otk::kQuickGelu});
  STD_TORCH_CHECK(!relu || kind <= otk::kRelu, op, ": relu and activation ", kind,
                  " exclude each other; pass one of them");
  return {relu ? otk::kRelu : static_cast<int32_t>(kind), static_cast<float>(slope)};
}

void refuse(const char* op, const char* why) { STD_TORCH_CHECK(false, op, ": ", why); }

}  // namespace otk_torch
