#include "pages.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace otk {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

// Not through the allocator: that hands out memory which was touched before, and a page that was
// once small stays small.
void* pages_take(size_t bytes) {
  const size_t whole = bytes + kHugePage;
  void* map = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<uintptr_t>(map);
  const uintptr_t block = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (block > begin) munmap(map, block - begin);
  if (begin + whole > block + bytes)
    munmap(reinterpret_cast<void*>(block + bytes), begin + whole - block - bytes);
  madvise(reinterpret_cast<void*>(block), bytes, MADV_HUGEPAGE);  // a hint; refusal is fine
  return reinterpret_cast<void*>(block);
}

void pages_give(void* block, size_t bytes) { munmap(block, bytes); }

void pages_advise(void* block, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(block);
  const uintptr_t begin = (at + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (at + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

#else

void* pages_take(size_t bytes) {
  void* block = std::aligned_alloc(kHugePage, bytes);
  if (!block) throw std::bad_alloc();
  return block;
}

void pages_give(void* block, size_t) { std::free(block); }

void pages_advise(void*, size_t) {}

#endif

}  // namespace otk
