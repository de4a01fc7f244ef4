// Per-thread scratch memory: one block that grows to the largest request and is handed out from the
// front. Blocks of 1 MB and more sit on huge pages (pages.h).
#pragma once

#include <cstdint>

namespace otk {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // Forgets what was handed out and makes room for `floats` more. Throws std::bad_alloc.
  void reset(int64_t floats);
  // The next `floats` floats (rounded up to a cache line), 64-byte aligned, not initialised.
  float* take(int64_t floats);
  // Takes back what was handed out after used() was `mark`.
  int64_t used() const { return used_; }
  void rewind(int64_t mark);
  static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }

 private:
  void release();

  float* base_ = nullptr;
  int64_t capacity_ = 0, used_ = 0;
  bool pages_ = false;
};

// `local` belongs to the unit of work a thread is in; `shared` to the call it started.
struct ThreadScratch {
  Arena local, shared;
};
ThreadScratch& thread_scratch();

}  // namespace otk
