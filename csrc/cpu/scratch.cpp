#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "../otk.h"
#include "pages.h"

namespace otk {
namespace {

std::atomic<int64_t> held{0};

}  // namespace

Arena::~Arena() { release(); }

void Arena::release() {
  held -= capacity_ * 4;
  if (pages_)
    pages_give(base_, static_cast<size_t>(capacity_) * 4);
  else
    std::free(base_);
  base_ = nullptr;
  capacity_ = 0;
}

void Arena::reset(int64_t floats) {
  used_ = 0;
  if (floats <= capacity_) return;
  release();
  pages_ = floats * 4 >= static_cast<int64_t>(kHugePage / 2);
  const size_t unit = pages_ ? kHugePage : 4096;
  const size_t bytes = (static_cast<size_t>(floats) * 4 + unit - 1) / unit * unit;
  void* block = pages_ ? pages_take(bytes) : std::aligned_alloc(unit, bytes);
  if (!block) throw std::bad_alloc();
  base_ = static_cast<float*>(block);
  capacity_ = static_cast<int64_t>(bytes / 4);
  held += capacity_ * 4;
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
