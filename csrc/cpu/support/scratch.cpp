#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "../../otk.h"
#include "pages.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace otk {
namespace {

#if defined(__SANITIZE_ADDRESS__)
// Under the sanitizer only what was handed out may be touched, and pieces have gaps between them.
constexpr int64_t kGap = 16, kGaps = 1024;
void close_off(float* p, int64_t floats) { __asan_poison_memory_region(p, floats * 4); }
void open_up(float* p, int64_t floats) { __asan_unpoison_memory_region(p, floats * 4); }
#else
constexpr int64_t kGap = 0, kGaps = 0;
void close_off(float*, int64_t) {}
void open_up(float*, int64_t) {}
#endif

std::atomic<int64_t> held{0};

}  // namespace

Arena::~Arena() { release(); }

void Arena::release() {
  held -= capacity_ * 4;
  open_up(base_, capacity_);
  if (pages_)
    pages_give(base_, static_cast<size_t>(capacity_) * 4);
  else
    std::free(base_);
  base_ = nullptr;
  capacity_ = 0;
}

void Arena::reset(int64_t floats) {
  rewind(0);
  floats += kGap * kGaps;
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
  rewind(0);
}

void Arena::rewind(int64_t mark) {
  used_ = mark;
  close_off(base_ + mark, capacity_ - mark);
}

float* Arena::take(int64_t floats) {
  float* p = base_ + used_;
  used_ += rounded(floats) + kGap;
  if (used_ > capacity_) throw std::bad_alloc();  // reset() was told too little
  open_up(p, floats);
  return p;
}

ThreadScratch& thread_scratch() {
  thread_local ThreadScratch scratch;
  return scratch;
}

int64_t scratch_bytes() { return held.load(); }

}  // namespace otk
