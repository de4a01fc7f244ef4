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

// Layout of the structure tensor (int32); opentrans_kernels/pack/layout.py writes it.
enum Header {
  kMagic,
  kVersion,
  kCin,
  kCout,
  kKernel,
  kStride,
  kPadding,
  kChunk,
  kRowBlock,
  kChunks,
  kRowBlocks,
  kNnz,
  kEntries,
  kHeaderSize
};  // clang-format off
constexpr int32_t kMagicValue = 0x4b544f50;
constexpr int32_t kVersionValue = 1;
// clang-format on

constexpr int64_t kPoolBytes = 256 * 1024;  // smaller outputs come from torch's allocator

}  // namespace

void check_isa() {
  const char* why = nullptr;
  STD_TORCH_CHECK(otk::cpu_capability(&why), "OPENTRANS_CPU_CAPABILITY cannot be honoured: ", why,
                  ". Use one of avx512, avx2, neon, generic that this CPU has, or unset it.");
}

otk::SparseWeight read_weight(const char* op, const Tensor& structure, const Tensor& values,
                              const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(structure.is_cpu() && structure.scalar_type() == ScalarType::Int &&
                      structure.dim() == 1 && structure.is_contiguous() &&
                      structure.numel() >= kHeaderSize,
                  op, ": structure must be a contiguous 1-d int32 CPU tensor made by SparseWeight");
  const int32_t* h = structure.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(
      h[kMagic] == kMagicValue && h[kVersion] == kVersionValue, op,
      ": structure was not made by this version of SparseWeight; pack the weight again");
  otk::SparseWeight w{};
  w.cin = h[kCin];
  w.cout = h[kCout];
  w.kernel = h[kKernel];
  w.stride = h[kStride];
  w.padding = h[kPadding];
  w.chunk = h[kChunk];
  w.row_block = h[kRowBlock];
  w.n_chunks = h[kChunks];
  w.n_row_blocks = h[kRowBlocks];
  w.nnz = h[kNnz];
  const int64_t blocks = 2 * (int64_t{w.n_chunks} * w.n_row_blocks + 1);
  const int64_t size = kHeaderSize + blocks + h[kEntries] + (w.nnz + 1) / 2;
  STD_TORCH_CHECK(structure.numel() == size, op, ": structure has ", structure.numel(),
                  " elements but its header describes ", size, "; pack the weight again");
  w.blocks = h + kHeaderSize;
  w.entries = reinterpret_cast<const uint32_t*>(w.blocks + blocks);
  w.codes = reinterpret_cast<const uint16_t*>(w.entries + h[kEntries]);
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
  otk::Planes p{};
  p.data = const_cast<float*>(t.const_data_ptr<float>());
  p.n = static_cast<int>(t.size(0));
  p.c = static_cast<int>(t.size(1));
  p.h = static_cast<int>(t.size(2));
  p.w = static_cast<int>(t.size(3));
  p.batch_stride = t.stride(0);
  p.plane_stride = t.stride(1);
  p.row_stride = t.stride(2);
  p.col_stride = t.stride(3);
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  p.readable = bytes / 4 - t.storage_offset();
  return p;
}

Tensor new_planes(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t plane = otk::plane_stride(h * w);
  // One cache line more than the planes: the last vector of the last plane is written whole.
  // Four dimensions, because the shim's as_strided takes as many as its input has.
  const std::array<int64_t, 4> size{1, 1, 1, n * c * plane + 16};
  const int64_t bytes = size[3] * 4;
  Tensor flat =
      bytes < kPoolBytes
          ? torch::stable::new_empty(like, size)
          : torch::stable::from_blob(otk::pool_take(bytes), size, {size[3], size[3], size[3], 1},
                                     torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                     ScalarType::Float, &otk::pool_give);
  const std::array<int64_t, 4> sizes{n, c, h, w}, strides{c * plane, plane, w, 1};
  AtenTensorHandle view = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_as_strided(flat.get(), sizes.data(), strides.data(), &view));
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
Tensor repacked(const Tensor& t) {
  Tensor copy = new_planes(t, t.size(0), t.size(1), t.size(2), t.size(3));
  torch::stable::copy_(copy, t);
  return copy;
}

bool reachable(const otk::Planes& p, const otk::SparseWeight& w) {
  const int64_t border = 2 * w.padding + w.kernel;
  const int64_t floats = std::max(p.plane_stride, (p.h + border) * (p.w + border));
  return floats * w.chunk < int64_t{1} << 30;
}

}  // namespace otk_torch
