// Checksums of tensors; opentrans_kernels/ops/contents.py says what they are for.
#include <torch/csrc/stable/macros.h>
//
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../otk.h"
#include "parallel.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

otk::Memory memory(const Tensor& t) {
  return {t.const_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size())};
}

void check(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), op,
                  ": every tensor must be a contiguous CPU tensor");
  STD_TORCH_CHECK(t.numel() == 0 || t.const_data_ptr(), op,
                  ": a tensor has no memory, its storage was freed");
}

int64_t blocks(const otk::Memory& memory) {
  return (memory.bytes + otk::kBlockBytes - 1) / otk::kBlockBytes;
}

// int64 [blocks of all tensors], one tensor after the other.
Tensor block_sums(std::vector<Tensor> tensors) {
  const char* op = "block_sums";
  STD_TORCH_CHECK(!tensors.empty(), op, ": no tensor");
  int64_t total = 0;
  for (const Tensor& t : tensors) {
    check(op, t);
    total += blocks(memory(t));
  }
  Tensor out =
      torch::stable::new_empty(tensors[0], std::array<int64_t, 1>{total}, ScalarType::Long);
  int64_t* at = out.mutable_data_ptr<int64_t>();
  for (const Tensor& t : tensors) {
    const otk::Memory of = memory(t);
    otk::block_sums(of, at, torch_threads());
    at += blocks(of);
  }
  return out;
}

void check(const char* op, const std::vector<Tensor>& tensors, const Tensor& sums) {
  STD_TORCH_CHECK(sums.is_cpu() && sums.scalar_type() == ScalarType::Long && sums.dim() == 1 &&
                      sums.is_contiguous(),
                  op, ": sums must be a contiguous 1-d int64 CPU tensor");
  int64_t left = sums.numel();
  for (const Tensor& t : tensors) {
    check(op, t);
    left -= blocks(memory(t));
  }
  STD_TORCH_CHECK(left == 0, op, ": sums belong to other tensors");
}

int64_t first_differing(const std::vector<Tensor>& tensors, const Tensor& sums, int64_t turn,
                        int64_t turns) {
  // A few blocks are read sooner than another thread wakes up.
  otk::Parallel par = torch_threads();
  if (turns > 1) par.threads = 1;
  const int64_t* at = sums.const_data_ptr<int64_t>();
  std::vector<otk::Memory> parts;
  parts.reserve(tensors.size());
  for (const Tensor& t : tensors) {
    parts.push_back(memory(t));
    // A storage may be freed behind the tensors that share it.
    if (parts.back().bytes > 0 && !parts.back().data) return static_cast<int64_t>(parts.size()) - 1;
    if (turns > 1) otk::prefetch_blocks(parts.back(), at, turn, turns);
    at += blocks(parts.back());
  }
  at = sums.const_data_ptr<int64_t>();
  for (size_t i = 0; i < parts.size(); ++i) {
    if (otk::blocks_differ(parts[i], at, turn, turns, par)) return static_cast<int64_t>(i);
    at += blocks(parts[i]);
  }
  return -1;
}

void check_turn(const char* op, int64_t turn, int64_t turns) {
  STD_TORCH_CHECK(turns >= 1 && turn >= 0 && turn < turns, op, ": turn ", turn, " of ", turns,
                  " does not exist");
}

// Index of the first tensor of which a block that was read differs from its checksum, or -1.
int64_t first_changed(std::vector<Tensor> tensors, const Tensor& sums, int64_t turn,
                      int64_t turns) {
  const char* op = "first_changed";
  check(op, tensors, sums);
  check_turn(op, turn, turns);
  return first_differing(tensors, sums, turn, turns);
}

// Tensors that are looked at again and again: handing over a list of them takes longer than reading
// a block of each.
struct Held {
  std::vector<Tensor> tensors;
  Tensor sums;
};
struct Holder {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Held>> held;
  int64_t next = 0;
};

// Never destroyed: at exit torch may be gone before its tensors.
Holder& holder() {
  static Holder* one = new Holder;
  return *one;
}

int64_t hold_contents(std::vector<Tensor> tensors, const Tensor& sums) {
  check("hold_contents", tensors, sums);
  auto held = std::make_shared<const Held>(std::move(tensors), sums);
  const std::lock_guard lock(holder().mutex);
  holder().held.emplace(++holder().next, std::move(held));
  return holder().next;
}

int64_t first_changed_held(int64_t handle, int64_t turn, int64_t turns) {
  const char* op = "first_changed_held";
  check_turn(op, turn, turns);
  std::shared_ptr<const Held> found;
  {
    const std::lock_guard lock(holder().mutex);
    const auto at = holder().held.find(handle);
    STD_TORCH_CHECK(at != holder().held.end(), op, ": nothing is held under ", handle);
    found = at->second;
  }
  return first_differing(found->tensors, found->sums, turn, turns);
}

void release_contents(int64_t handle) {
  std::shared_ptr<const Held> last;  // freed behind the lock
  const std::lock_guard lock(holder().mutex);
  const auto at = holder().held.find(handle);
  if (at == holder().held.end()) return;
  last = at->second;
  holder().held.erase(at);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CPU, m) {
  m.impl("block_sums", TORCH_BOX(&block_sums));
  m.impl("first_changed", TORCH_BOX(&first_changed));
  m.impl("hold_contents", TORCH_BOX(&hold_contents));
}

STABLE_TORCH_LIBRARY_IMPL(opentrans_kernels, CompositeExplicitAutograd, m) {
  m.impl("first_changed_held", TORCH_BOX(&first_changed_held));
  m.impl("release_contents", TORCH_BOX(&release_contents));
}
