#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../otk.h"

namespace otk {
namespace {

constexpr int64_t kHuge = int64_t{1} << 21;
std::atomic<int64_t> held{0};

}  // namespace

Arena::~Arena() {
  held -= capacity_ * 4;
  std::free(base_);
}

void Arena::reset(int64_t floats) {
  used_ = 0;
  if (floats <= capacity_) return;
  held -= capacity_ * 4;
  std::free(base_);
  base_ = nullptr;
  capacity_ = 0;
  const bool huge = floats * 4 >= kHuge / 2;
  const int64_t unit = huge ? kHuge : 4096;
  const int64_t bytes = (floats * 4 + unit - 1) / unit * unit;
  void* block = std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(bytes));
  if (!block) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (huge) madvise(block, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a hint; refusal is fine
#endif
  base_ = static_cast<float*>(block);
  capacity_ = bytes / 4;
  held += bytes;
}

float* Arena::take(int64_t floats) {
  float* p = base_ + used_;
  used_ += rounded(floats);
  if (used_ > capacity_) throw std::bad_alloc();  // reset() was told too little
  return p;
}

ThreadScratch& thread_scratch() {
  thread_local ThreadScratch scratch;
  return scratch;
}

int64_t scratch_bytes() { return held.load(); }

}  // namespace otk
