// Checksums of tensors; opentrans_kernels/ops/contents.py says what they are for.
#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <vector>

#include "../otk.h"
#include "parallel.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

otk::Memory memory(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), op,
                  ": every tensor must be a contiguous CPU tensor");
  return {t.const_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size())};
}

int64_t blocks(const otk::Memory& memory) {
  return (memory.bytes + otk::kBlockBytes - 1) / otk::kBlockBytes;
}

// int64 [blocks of all tensors], one tensor after the other.
Tensor block_sums(std::vector<Tensor> tensors) {
  const char* op = "block_sums";
  STD_TORCH_CHECK(!tensors.empty(), op, ": no tensor");
  int64_t total = 0;
  for (const Tensor& t : tensors) total += blocks(memory(op, t));
  Tensor out = torch::stable::new_empty(tensors[0], std::array<int64_t, 1>{total},
                                        ScalarType::Long);
  int64_t* at = out.mutable_data_ptr<int64_t>();
  for (const Tensor& t : tensors) {
    const otk::Memory of = memory(op, t);
    otk::block_sums(of, at, torch_threads());
    at += blocks(of);
  }
  return out;
}

// Index of the first tensor of which a block that was read differs from its checksum, or -1.
int64_t first_changed(std::vector<Tensor> tensors, const Tensor& sums, int64_t turn,
                      int64_t turns) {
  const char* op = "first_changed";
  STD_TORCH_CHECK(sums.is_cpu() && sums.scalar_type() == ScalarType::Long && sums.dim() == 1 &&
                      sums.is_contiguous(),
                  op, ": sums must be a contiguous 1-d int64 CPU tensor");
  STD_TORCH_CHECK(turns >= 1 && turn >= 0 && turn < turns, op, ": turn ", turn, " of ", turns,
                  " does not exist");
  int64_t left = sums.numel();
  std::vector<otk::Memory> parts;
  for (const Tensor& t : tensors) {
    parts.push_back(memory(op, t));
    left -= blocks(parts.back());
  }
  STD_TORCH_CHECK(left == 0, op, ": sums belong to other tensors");
  // A few blocks are read sooner than another thread wakes up.
  otk::Parallel par = torch_threads();
  if (turns > 1) par.threads = 1;
  const int64_t* at = sums.const_data_ptr<int64_t>();
  for (size_t i = 0; i < parts.size(); ++i) {
    if (otk::blocks_differ(parts[i], at, turn, turns, par)) return static_cast<int64_t>(i);
    at += blocks(parts[i]);
  }
  return -1;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CPU, m) {
  m.impl("block_sums", TORCH_BOX(&block_sums));
  m.impl("first_changed", TORCH_BOX(&first_changed));
}
