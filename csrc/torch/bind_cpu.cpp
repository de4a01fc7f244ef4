// The torch side of the kernels on activations: checks arguments, allocates outputs, calls otk.h.
// Schemas, fakes and autograd live in opentrans_kernels/ops.
#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "../otk.h"
#include "parallel.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// Dense rows inside each plane, and whole vectors readable at the end of every plane.
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

// A nonzero's offset is 32 bits wide: the channels of a chunk must lie within 4 GB.
bool reachable(const otk::Planes& p, const otk::SparseWeight& w) {
  const int64_t border = 2 * w.padding + w.kernel;
  const int64_t floats = std::max(p.plane_stride, (p.h + border) * (p.w + border));
  return floats * w.chunk < int64_t{1} << 30;
}

Tensor sparse_conv2d(const Tensor& x, const Tensor& structure, const Tensor& values,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                     int64_t cout, int64_t kernel, int64_t stride, int64_t padding, bool relu) {
  const char* op = "sparse_conv2d";
  check_isa();
  const otk::SparseWeight w = read_weight(op, structure, values, bias);
  STD_TORCH_CHECK(
      w.cout == cout && w.kernel == kernel && w.stride == stride && w.padding == padding, op,
      ": cout, kernel, stride, padding do not match the packed structure");
  otk::Planes in = planes(op, "x", x);
  STD_TORCH_CHECK(in.c == w.cin, op, ": x has ", in.c, " channels, the weight expects ", w.cin);
  const int64_t h = (in.h + 2 * padding - kernel) / stride + 1;
  const int64_t width = (in.w + 2 * padding - kernel) / stride + 1;
  STD_TORCH_CHECK(in.h + 2 * padding >= kernel && in.w + 2 * padding >= kernel, op, ": input ",
                  in.h, "x", in.w, " is smaller than the ", kernel, "x", kernel, " kernel");
  std::optional<Tensor> packed;
  if (!reachable(in, w)) {  // a view with far-apart planes, unless the image itself is too large
    packed = repacked(x);
    in = planes(op, "x", *packed);
    STD_TORCH_CHECK(reachable(in, w), op, ": an image of ", in.h, "x", in.w,
                    " is too large; split it into tiles");
  }
  Tensor out = new_planes(x, in.n, cout, h, width);
  const otk::Planes result = planes(op, "out", out);
  otk::Planes extra{};
  std::optional<Tensor> copy;
  if (residual) {
    extra = planes(op, "residual", *residual);
    STD_TORCH_CHECK(extra.n == in.n && extra.c == cout && extra.h == h && extra.w == width, op,
                    ": residual must have the output's shape [", in.n, ", ", cout, ", ", h, ", ",
                    width, "]");
    if (!dense_planes(extra)) {
      copy = repacked(*residual);
      extra = planes(op, "residual", *copy);
    }
  }
  otk::sparse_conv2d(w, in, result, residual ? &extra : nullptr, relu, torch_threads());
  return out;
}

Tensor sparse_conv2d_wgrad(const Tensor& x, const Tensor& grad_out, const Tensor& structure,
                           const Tensor& values) {
  const char* op = "sparse_conv2d_wgrad";
  check_isa();
  const otk::SparseWeight w = read_weight(op, structure, values, std::nullopt);
  const otk::Planes in = planes(op, "x", x), grad = planes(op, "grad_out", grad_out);
  STD_TORCH_CHECK(in.c == w.cin && grad.c == w.cout && in.n == grad.n &&
                      grad.h == (in.h + 2 * w.padding - w.kernel) / w.stride + 1 &&
                      grad.w == (in.w + 2 * w.padding - w.kernel) / w.stride + 1,
                  op, ": x and grad_out do not fit the packed convolution");
  STD_TORCH_CHECK(reachable(in, w), op, ": an image of ", in.h, "x", in.w,
                  " is too large; split it into tiles");
  Tensor out = torch::stable::empty_like(values);
  otk::sparse_conv2d_wgrad(w, in, grad, out.mutable_data_ptr<float>(), torch_threads());
  return out;
}

Tensor sparse_bottleneck(const Tensor& x, const Tensor& s1, const Tensor& v1, const Tensor& b1,
                         const Tensor& s2, const Tensor& v2, const Tensor& b2, const Tensor& s3,
                         const Tensor& v3, const Tensor& b3, const std::optional<Tensor>& sd,
                         const std::optional<Tensor>& vd, const std::optional<Tensor>& bd,
                         int64_t cout, int64_t pool, int64_t down_pool) {
  const char* op = "sparse_bottleneck";
  check_isa();
  otk::Bottleneck block{};
  block.c1 = read_weight(op, s1, v1, b1);
  block.c2 = read_weight(op, s2, v2, b2);
  block.c3 = read_weight(op, s3, v3, b3);
  block.has_down = sd.has_value();
  STD_TORCH_CHECK(sd.has_value() == vd.has_value(), op,
                  ": the shortcut needs both its structure and its values");
  if (sd) block.down = read_weight(op, *sd, *vd, bd);
  block.pool = static_cast<int>(pool);
  block.down_pool = static_cast<int>(down_pool);
  const auto pointwise = [](const otk::SparseWeight& w) {
    return w.kernel == 1 && w.stride == 1 && w.padding == 0;
  };
  STD_TORCH_CHECK(pointwise(block.c1) && pointwise(block.c3) && block.c2.kernel == 3 &&
                      block.c2.stride == 1 && block.c2.padding == 1 &&
                      (!sd || pointwise(block.down)),
                  op, ": needs 1x1, 3x3 (stride 1, padding 1), 1x1 and a 1x1 shortcut");
  otk::Planes in = planes(op, "x", x);
  STD_TORCH_CHECK(block.c1.cin == in.c && block.c2.cin == block.c1.cout &&
                      block.c3.cin == block.c2.cout && block.c3.cout == cout &&
                      (sd ? block.down.cin == in.c && block.down.cout == cout : in.c == cout),
                  op, ": channel counts of x and the convolutions do not chain");
  STD_TORCH_CHECK(pool >= 1 && down_pool >= 1 && (sd ? pool == down_pool : pool == 1), op,
                  ": pool ", pool, " and down_pool ", down_pool, " give different output sizes");
  STD_TORCH_CHECK(in.h >= pool && in.w >= pool, op, ": the image ", in.h, "x", in.w,
                  " is too small for a ", pool, "x", pool, " window");
  Tensor out = new_planes(x, in.n, cout, in.h / pool, in.w / pool);
  std::optional<Tensor> copy;
  if (!whole_vectors(in) || !reachable(in, block.c1)) {
    copy = repacked(x);
    in = planes(op, "x", *copy);
  }
  STD_TORCH_CHECK(reachable(in, block.c1) && reachable(in, block.c2), op, ": an image of ", in.h,
                  "x", in.w, " is too large; split it into tiles");
  otk::sparse_bottleneck(block, in, planes(op, "out", out), torch_threads());
  return out;
}

Tensor avg_pool2d(const Tensor& x, int64_t k) {
  const char* op = "avg_pool2d";
  check_isa();
  STD_TORCH_CHECK(k >= 1, op, ": the window must be at least 1, got ", k);
  otk::Planes in = planes(op, "x", x);
  std::optional<Tensor> copy;
  if (in.col_stride != 1) {
    copy = repacked(x);
    in = planes(op, "x", *copy);
  }
  STD_TORCH_CHECK(in.h >= k && in.w >= k, op, ": the image ", in.h, "x", in.w,
                  " is too small for a ", k, "x", k, " window");
  Tensor out = new_planes(x, in.n, in.c, in.h / k, in.w / k);
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

Tensor relu_bits(const Tensor& z, const std::optional<Tensor>& residual, bool channels_last) {
  const char* op = "relu_bits";
  check_isa();
  const otk::Rows out = rows(op, "z", z, channels_last);
  const int64_t count = out.outer * out.inner, bytes = (out.length + 7) / 8;
  const std::array<int64_t, 2> size{count, bytes};
  Tensor bits = torch::stable::new_empty(z, size, ScalarType::Byte);
  if (residual) {
    STD_TORCH_CHECK(residual->dim() == 4 && residual->size(0) == z.size(0) &&
                        residual->size(1) == z.size(1) && residual->size(2) == z.size(2) &&
                        residual->size(3) == z.size(3),
                    op, ": residual must have the shape of z");
    const otk::Rows extra = rows(op, "residual", *residual, channels_last);
    otk::relu_bits(out, &extra, bits.mutable_data_ptr<uint8_t>(), torch_threads());
  } else {
    otk::relu_bits(out, nullptr, bits.mutable_data_ptr<uint8_t>(), torch_threads());
  }
  return bits;
}

void relu_bits_backward(const Tensor& grad, const Tensor& bits, const Tensor& out,
                        bool channels_last) {
  const char* op = "relu_bits_backward";
  check_isa();
  const otk::Rows from = rows(op, "grad", grad, channels_last);
  const otk::Rows to = rows(op, "out", out, channels_last);
  STD_TORCH_CHECK(to.outer == from.outer && to.inner == from.inner && to.length == from.length, op,
                  ": out must have the shape of grad");
  STD_TORCH_CHECK(bits.is_cpu() && bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() &&
                      bits.numel() == from.outer * from.inner * ((from.length + 7) / 8),
                  op, ": bits do not belong to this activation");
  otk::relu_bits_backward(from, bits.const_data_ptr<uint8_t>(), to, torch_threads());
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
  m.impl("sparse_bottleneck", TORCH_BOX(&sparse_bottleneck));
  m.impl("avg_pool2d", TORCH_BOX(&avg_pool2d));
  m.impl("relu_bits", TORCH_BOX(&relu_bits));
  m.impl("relu_bits_backward", TORCH_BOX(&relu_bits_backward));
}

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("scratch_bytes", TORCH_BOX(&scratch_bytes));
  m.impl("release_memory", TORCH_BOX(&release_memory));
}
